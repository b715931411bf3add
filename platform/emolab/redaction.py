"""Secrets stay out of everything that is written or printed.

The one place that knows what a secret looks like: a password in an address, a value whose name says that it is secret,
a credential of a known form, and whatever the environment holds under such a name. What is masked cannot be read back;
a configuration that holds a mask is refused.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast
from urllib.parse import unquote

MASK = "<redacted>"
_SHORTEST = 8
"""Shorter values of the environment are not looked for in texts: they would be found in ordinary words."""

_ANYWHERE = r"[\w.-]*?(?:password|passwd|passphrase|secret)"
_AS_A_WORD = r"(?:[\w.-]*?(?<![a-z]))?(?:token|credentials?|(?:api|access|private|account|signing)[_-]?key)"
_NAME = rf"(?:{_ANYWHERE}|{_AS_A_WORD}|[\w.-]*?[_-](?:key|pwd))"
"""``api_key``, ``RAY_AUTH_TOKEN``, ``storage.password``, ``PGPASSWORD``; neither ``max_tokens`` nor ``monkey``."""
_SECRET_NAME = re.compile(_NAME)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PAGE = r"https?://(?:localhost|[\w-]+(?:\.[\w-]+)+):\d{1,5}[/?#]"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s&;,'")\]}]+)"""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Up to the last @: a password may hold one, and a slash too. What follows a web server's name is its port.
    (
        re.compile(rf"(?<![\w+.-])(?!{_PAGE})([\w+.-]*://[^\s:/?#@]*:)(?:(?!://)[^\s'\"])*@"),
        rf"\1{MASK}@",
    ),
    (re.compile(r"(https?://)[^\s:/?#@]+@"), rf"\1{MASK}@"),
    (re.compile(rf"(?i)(?<![\w.-])({_NAME}\s*=\s*){_VALUE}"), rf"\1{MASK}"),
    (re.compile(rf"""(?i)(["']{_NAME}["']\s*:\s*){_VALUE}"""), rf'\1"{MASK}"'),
    (re.compile(rf"(?i)(?<![\w.-])(--{_NAME}\s+){_VALUE}"), rf"\1{MASK}"),
    (re.compile(rf"(?im)^(\s*(?:-\s+)?{_NAME}:[ \t]+){_VALUE}"), rf"\1{MASK}"),  # a line of YAML
    (re.compile(r"(?i)\b(bearer|authorization:?\s+\w+)\s+[\w.~+/=-]{8,}"), rf"\1 {MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (re.compile(r"\b(?:gh[opsur]_|github_pat_|hf_|xox[abprs]-|glpat-|sk-|dapi)[\w-]{20,}"), MASK),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"), MASK),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL), MASK),
)
_PASSWORD = re.compile(r"://[^\s:/?#@]*:(?P<password>\S*)@")


def redact(text: str) -> str:
    """A text without the secrets in it."""
    for secret in sorted(_secrets_of_the_environment(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """Plain values (what JSON and YAML hold) without the secrets in them; nothing but texts is ever changed."""
    if isinstance(value, Mapping):
        return {key: _redacted_entry(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret."""
    return _SECRET_NAME.fullmatch(_CAMEL_CASE.sub("_", name).lower()) is not None


def masked_key(values: Any, prefix: str = "") -> str | None:
    """The dotted key of the first value from which a secret was left out; None where there is none."""
    if isinstance(values, Mapping):
        entries = [(f"{prefix}.{key}" if prefix else str(key), each) for key, each in values.items()]
    elif isinstance(values, list | tuple):
        entries = [(prefix, each) for each in values]
    else:
        return prefix if isinstance(values, str) and MASK in values else None
    return next((found for key, each in entries if (found := masked_key(each, key)) is not None), None)


def command_line() -> str:
    """The command that started this process, without the secrets in it."""
    return redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def redact_output() -> None:
    """From here on, leave secrets out of what this process prints, also where a library does it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _RedactedStream):
            setattr(sys, name, cast(TextIO, _RedactedStream(stream)))


class _RedactedStream:
    """A text stream that masks what is written to it; for the rest, the stream below."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redacted_entry(key: str, value: Any) -> Any:
    return MASK if isinstance(value, str) and value and is_secret_name(key) else redacted(value)


def _secrets_of_the_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        found = _PASSWORD.search(value)
        if found is not None:
            yield from (each for each in {found["password"], unquote(found["password"])} if len(each) >= _SHORTEST)
        elif len(value) >= _SHORTEST and is_secret_name(name) and not _is_path(value):
            yield value


def _is_path(text: str) -> bool:
    """Whether a text names a file, such as one with a key in it: a path is no secret."""
    try:
        return Path(text).is_absolute() and Path(text).exists()
    except (OSError, ValueError):
        return False
