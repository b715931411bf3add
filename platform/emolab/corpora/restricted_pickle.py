"""Pickle files of numpy arrays, read without running anything in them.

A pickle is a program. Here the standard library's ``pickletools`` only takes it apart into instructions, and the few
that build plain containers and numpy arrays are carried out by this module; nothing is imported or called by name.
A name outside ``ALLOWED``, or an instruction that no such file needs, is refused with its name. Large arrays stay in
the file: they are views of its memory map, so a file of many gigabytes costs little memory (except with protocol 5,
which stores them as mutable and has them copied).
"""

from __future__ import annotations

import hashlib
import mmap
import pickletools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from emolab.corpora.pickled_arrays import ALLOWED, DataType, Name, PickledArray, RefusedPickleError, dictionary
from emolab.names import UserError

MAXIMUM_BYTES = 64 * 2**30
MAXIMUM_INSTRUCTIONS = 10_000_000
"""A corpus of 23,000 utterances needs about a million."""
_MAXIMUM_LINE = 2**16
_IN_FILE = 2**12
"""From this size on, bytes are not copied out of the file."""

_GETS, _PUTS = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT")


def read_pickle(path: Path, *, sha256: str | None = None) -> Any:
    """The content of a pickle of containers, text, numbers and numpy arrays (``PickledArray``).

    Args:
        sha256: the digest that the file must have; compared before anything else is read.

    Raises:
        UserError: the file cannot be read, has another digest, is not a whole pickle, or holds anything else. Nothing
            of its content has been run.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not 0 < size <= MAXIMUM_BYTES:
                raise UserError(f"{path} has {size} bytes, expected 1 to {MAXIMUM_BYTES}")
            file.seek(0)
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256.lower():
                raise UserError(f"{path}: its SHA-256 is not {sha256}; nothing of it was read")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return _Machine().run(content)
    except RefusedPickleError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a whole pickle ({' '.join(str(error).split())[:120]})") from None


class _File:
    """What pickletools reads from: small pieces as bytes, large ones as views of the memory map."""

    def __init__(self, content: mmap.mmap) -> None:
        self._view, self._place = memoryview(content), 0

    def read(self, count: int) -> bytes | memoryview:
        piece = self._view[self._place : self._place + max(0, count)]
        self._place += len(piece)
        return piece if len(piece) >= _IN_FILE else bytes(piece)

    def readline(self) -> bytes:
        line = bytes(self._view[self._place : self._place + _MAXIMUM_LINE])
        end = line.find(b"\n") + 1
        line = line[:end] if end else line
        self._place += len(line)
        return line

    def tell(self) -> int:
        return self._place


class _Machine:
    """Carries out a pickle's instructions on plain data. ``stack``, ``marks`` and ``memo`` are those of the format."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: mmap.mmap) -> Any:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(cast("Any", _File(content)))):
            name = instruction.name
            if count >= MAXIMUM_INSTRUCTIONS:
                raise RefusedPickleError(f"it has more than {MAXIMUM_INSTRUCTIONS} instructions")
            if name == "STOP":
                return self.stack.pop()
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                called = f" ({argument[:60]!r})" if isinstance(argument, str) else ""
                raise RefusedPickleError(f"it uses {name}{called}, which no file of features needs")
        raise RefusedPickleError("it ends before its end")

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack."""
        place = self.marks.pop()
        taken = self.stack[place:]
        del self.stack[place:]
        return taken

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedPickleError("a name that is not text")
        text = f"{module}.{name}"
        if text not in ALLOWED:
            raise RefusedPickleError(f"it names {text[:120]!r}, which no file of features needs; nothing of it was run")
        self.stack.append(Name(text))

    def append(self, values: Sequence[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedPickleError("something is appended to what is not a list")
        self.stack[-1].extend(values)

    def set_items(self, values: Sequence[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise RefusedPickleError("a key is set in what is not a dictionary")
        self.stack[-1].update(dictionary(values))

    def reduce(self, _: object) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise RefusedPickleError("it calls what is not a name")
        self.stack.append(ALLOWED[called.text](*arguments))

    def build(self, _: object) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if not isinstance(built, (DataType, PickledArray)):
            raise RefusedPickleError(f"it sets the state of a {type(built).__name__}")
        built.set_state(state)

    def tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise RefusedPickleError("a tuple of more values than there are")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)


_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
"""Instructions that put their argument on the stack."""

_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "NONE": lambda machine, argument: machine.stack.append(None),
    "NEWTRUE": lambda machine, argument: machine.stack.append(True),
    "NEWFALSE": lambda machine, argument: machine.stack.append(False),
    "MARK": lambda machine, argument: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, argument: machine.stack.pop(),
    "POP_MARK": lambda machine, argument: machine.since_mark(),
    "EMPTY_LIST": lambda machine, argument: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, argument: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, argument: machine.stack.append({}),
    "LIST": lambda machine, argument: machine.stack.append(machine.since_mark()),
    "TUPLE": lambda machine, argument: machine.stack.append(tuple(machine.since_mark())),
    "DICT": lambda machine, argument: machine.stack.append(dictionary(machine.since_mark())),
    "TUPLE1": lambda machine, argument: machine.tuple(1),
    "TUPLE2": lambda machine, argument: machine.tuple(2),
    "TUPLE3": lambda machine, argument: machine.tuple(3),
    "APPEND": lambda machine, argument: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, argument: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, argument: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, argument: machine.set_items(machine.since_mark()),
    **{name: lambda machine, argument: machine.stack.append(machine.memo[argument]) for name in _GETS},
    **{name: lambda machine, argument: machine.memo.__setitem__(argument, machine.stack[-1]) for name in _PUTS},
    "MEMOIZE": lambda machine, argument: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, argument: machine.name(machine.stack.pop(-2), machine.stack.pop()),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
