"""What the guides in docs/ show, taken out of their text: nothing of it is written down a second time."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
_HEADINGS = re.compile(r"^#.*\n", re.MULTILINE)
_NAMED = re.compile(r"`([\w.-]+)`")
_CELL = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    language: str
    """Empty where the fence names none: commands, or a picture of a folder."""
    text: str
    name: str | None
    """The file that it shows: the paragraph above begins with its name."""

    @property
    def commands(self) -> list[list[str]]:
        """Its command lines as their words, without comments."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def guide(name: str) -> str:
    """The text of docs/NAME."""
    return (REPOSITORY / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Every fenced block of a text, in order."""
    found, end = [], 0
    for match in _FENCE.finditer(text):
        above = text[end : match.start()].rsplit("\n\n", 1)[-1]
        named = _NAMED.match(_HEADINGS.sub("", above))
        found.append(Block(language=match[1], text=match[2], name=named[1] if named else None))
        end = match.end()
    return found


def files(text: str) -> dict[str, str]:
    """File name -> content, of all blocks that show a file."""
    return {block.name: block.text for block in blocks(text) if block.name is not None and block.language}


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose first column is headed so, without its header."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in _CELL.split(line)[1:-1]] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    """What stands between backticks; fenced blocks are left out."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))


def write(folder: Path, contents: dict[str, str]) -> None:
    """Write files as a reader copies them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """Heading of the second level -> the text below it."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run_section(heading: str, namespace: dict[str, Any], replaced: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the blocks of a section of docs/python.md in the current folder, one after the other, as a notebook does.

    Args:
        replaced: what a reader puts in: a part of the text -> what stands for it here.

    Returns:
        The namespace.
    """
    for block in blocks(sections(guide("python.md"))[heading]):
        if block.language == "python":
            code = block.text
            for word, here in (replaced or {}).items():
                code = code.replace(word, here)
            exec(compile(code, f"docs/python.md, {heading}", "exec"), namespace)
    return namespace


@contextmanager
def notebook(folder: Path, tracking_uri: str) -> Iterator[dict[str, Any]]:
    """A namespace in the folder in which the jobs ran, with what the first sections of docs/python.md bring into it."""
    import mlflow
    import pandas

    mlflow.set_tracking_uri(tracking_uri)
    try:
        with chdir(folder):
            yield {"mlflow": mlflow, "pd": pandas, "Path": Path}
    finally:
        mlflow.set_tracking_uri(None)  # it holds for the whole process, and for those that it starts
