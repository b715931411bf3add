"""Parquet files of which every byte counts: one that was changed is refused before it is read.

Parquet's own checksums cover the pages of a file and not its footer, which says where the pages lie and what they mean:
a changed bit there can give other values without an error. Any reader of Parquet takes a sealed file.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

_SEAL = b"emolab.seal=sha256:"
_OPEN = _SEAL + b"0" * 64
"""What stands in the footer while the digest of the file is computed."""


def to_parquet(table: pa.Table, metadata: Mapping[bytes, bytes] | None = None) -> bytes:
    """A table as a sealed file.

    Args:
        metadata: of the file, by key.
    """
    buffer = io.BytesIO()
    sealed = table.replace_schema_metadata({**(metadata or {}), b"emolab.seal": _OPEN})
    pq.write_table(sealed, buffer, compression="zstd", write_page_checksum=True)
    return _with_seal(buffer.getvalue(), _SEAL + hashlib.sha256(buffer.getvalue()).hexdigest().encode())


def from_parquet(content: bytes) -> pa.Table:
    """What ``to_parquet`` wrote.

    Raises:
        ValueError: it is something else, or a byte of it has changed.
    """
    opened = _with_seal(content, _OPEN)
    if content != _with_seal(opened, _SEAL + hashlib.sha256(opened).hexdigest().encode()):
        raise ValueError("its content has changed")
    return pq.read_table(pa.BufferReader(content))


def _with_seal(content: bytes, seal: bytes) -> bytes:
    """A file with another seal in its place, which is the last in it: the columns' values stand before the footer."""
    place = content.rfind(_SEAL)
    if place < 0:
        raise ValueError("it has no seal")
    return content[:place] + seal + content[place + len(seal) :]
