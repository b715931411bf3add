"""Why a tracker did not do what was asked, in the few words that people need; its client says it in a page."""

from __future__ import annotations

import re
import socket
import ssl
import textwrap
from collections.abc import Iterator

_LONGEST = 200
_WORDS: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "name not known"),
    (ConnectionRefusedError, "connection refused"),
    (ConnectionError, "connection broken off"),
    (TimeoutError, "no answer in time"),
    (ssl.SSLCertVerificationError, "its certificate is not trusted"),
    (ssl.SSLError, "no secure connection: is the address one of https?"),
)
"""Kind of error -> what it means. Names and refusals are kinds of OSError, which is looked at last."""
_STATUS = re.compile(r"error code (\d{3}) != 200|too many (\d{3}) error responses")
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)


def reason_of(error: BaseException) -> str:
    """An error as a few words; a refusal in the words of whoever refused."""
    chain = [*_causes(error)]
    for kind, words in _WORDS:
        if any(isinstance(cause, kind) for cause in chain):
            return words
    if status := _STATUS.search(" ".join(map(str, chain))):
        return f"HTTP {status[1] or status[2]}"
    if len(chain) > 1 and _TIMED_OUT.search(str(chain[-1])):
        return "no answer in time"
    told = " ".join(str(getattr(error, "orig", None) or error).split())  # SQLAlchemy adds an address of its manual
    return textwrap.shorten(told, _LONGEST, placeholder=" ...") or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, each once, whichever way the libraries on the way have kept it."""
    waiting, known = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in known:
            continue
        known.add(id(cause))
        yield cause
        inner = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args)
        waiting += [each for each in inner if isinstance(each, BaseException)]
