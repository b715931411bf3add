"""What a pickle of features may name, and the plain data that stands for it while the pickle is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DATA_TYPE = re.compile(r"[biu][1248]|f[248]|[US][0-9]{1,5}|O8?")


class RefusedPickleError(ValueError):
    """A pickle that is more, or less, than plain containers and arrays."""


class Name:
    """What the pickle calls by a name: a token of ours that stands for it."""

    def __init__(self, text: str) -> None:
        self.text = text


class DataType:
    """A numpy data type as it is being built: its code first, its byte order later."""

    def __init__(self, code: object) -> None:
        if not isinstance(code, str) or not _DATA_TYPE.fullmatch(code):
            shown = code[:20] if isinstance(code, str) else type(code).__name__
            raise RefusedPickleError(f"data type {shown!r} is not one of features")
        self.code, self.order = code, "="

    def set_state(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise RefusedPickleError("a structured data type")
        if state[1] not in ("<", ">", "=", "|"):
            raise RefusedPickleError("a byte order that does not exist")
        self.order = "=" if state[1] == "|" else state[1]

    @property
    def holds_objects(self) -> bool:
        return self.code.startswith("O")

    def resolved(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class PickledArray:
    """A numpy array of the file: numbers as a read-only array, which may lie in the file still, anything else as the
    flat list of its elements."""

    def __init__(self) -> None:
        self._values: NDArray[Any] | list[Any] | None = None

    @property
    def values(self) -> NDArray[Any] | list[Any]:
        if self._values is None:
            raise RefusedPickleError("an array without content")
        return self._values

    def set_state(self, state: object) -> None:
        # (version, shape, data type, Fortran order, content)
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedPickleError("an array's state")
        self.fill(state[4], state[2], state[1], "F" if state[3] else "C")

    def fill(self, content: object, data_type: object, shape: object, order: object) -> None:
        sizes = _shape(shape)
        if not isinstance(data_type, DataType) or order not in ("C", "F"):
            raise RefusedPickleError("an array's data type or order")
        if data_type.holds_objects:
            if not isinstance(content, list) or len(content) != math.prod(sizes):
                raise RefusedPickleError("an array of objects of another size than it says")
            self._values = content
            return
        kind = data_type.resolved()
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise RefusedPickleError("an array's content")
        if kind.itemsize == 0 or len(content) != kind.itemsize * math.prod(sizes):
            raise RefusedPickleError(f"an array of {len(content)} bytes that says it has another size")
        flat = np.frombuffer(content, dtype=kind)
        flat.flags.writeable = False
        # text becomes Python's own here and now, where a code that is no character is noticed
        self._values = flat.tolist() if kind.kind in "US" else flat.reshape(sizes, order=order)


def dictionary(values: Sequence[Any]) -> dict[str | int, Any]:
    """Of keys and values in turn."""
    if len(values) % 2 or not all(isinstance(key, (str, int)) for key in values[::2]):
        raise RefusedPickleError("a dictionary whose keys are not text or numbers")
    return dict(zip(values[::2], values[1::2], strict=True))


def _shape(value: object) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else value
    if not isinstance(sizes, tuple) or len(sizes) > 8:
        raise RefusedPickleError("an array's shape")
    if not all(isinstance(size, int) and 0 <= size < 2**40 for size in sizes):
        raise RefusedPickleError("an array's shape")
    return sizes


def _empty_array(*_: object) -> PickledArray:
    return PickledArray()


def _array_from_buffer(content: object, data_type: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.fill(content, data_type, shape, order)
    return array


def _scalar(data_type: object, content: object) -> Any:
    return np.asarray(_array_from_buffer(content, data_type, (), "C").values).item()


def _encoded(text: object, encoding: object) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise RefusedPickleError("an encoding other than latin1")
    return text.encode("latin1")


def _data_type(code: object, *_: object) -> DataType:
    return DataType(code)


def _ordered(pairs: object = ()) -> dict[str | int, Any]:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) for pair in pairs):
        raise RefusedPickleError("a dictionary that is not one")
    return dictionary([part for pair in pairs for part in pair])


def _no_bytes() -> bytes:
    return b""


def _not_called(*_: object) -> None:
    raise RefusedPickleError("it calls a class that only ever is an argument")


ALLOWED: dict[str, Callable[..., Any]] = {
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
    "numpy.dtype": _data_type,
    "numpy.ndarray": _not_called,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
}
"""What a pickle may name -> what happens in its stead. All of it is plain data handling of this module."""
