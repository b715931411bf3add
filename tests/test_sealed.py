"""Sealed Parquet files: read as written, and refused where any byte has changed."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emolab import sealed

TABLE = pa.table(
    {
        "name": pa.array(["one", "two", "emolab.seal=sha256:" + "0" * 64]).dictionary_encode(),
        "values": pa.array([[0.5, 0.25], [], [1.0]], pa.list_(pa.float64())),
        "count": np.arange(3),
    }
)
CONTENT = sealed.to_parquet(TABLE, {b"made.by": b"a test"})
REFUSAL = r"its content has changed|it has no seal"
FOOTER = 8 + int.from_bytes(CONTENT[-8:-4], "little")


def test_a_table_reads_as_it_was_written_by_any_reader() -> None:
    for read in (sealed.from_parquet(CONTENT), pq.read_table(io.BytesIO(CONTENT))):
        assert read.equals(TABLE)
        assert read.schema.metadata[b"made.by"] == b"a test"
    assert sealed.to_parquet(TABLE, {b"made.by": b"a test"}) == CONTENT


@pytest.mark.fault
@given(footer=st.booleans(), place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=500, deadline=None)
def test_a_file_with_a_changed_byte_is_refused(footer: bool, place: float, change: int, cut: bool) -> None:
    first = len(CONTENT) - FOOTER if footer else 0
    position = first + int(place * (len(CONTENT) - first))
    damaged = bytearray(CONTENT)
    damaged[position] ^= change
    with pytest.raises(ValueError, match=REFUSAL):
        sealed.from_parquet(bytes(damaged[:position] if cut else damaged))


def test_a_footer_that_gives_other_values_is_refused_though_a_plain_reader_takes_it() -> None:
    """The reason for a seal: some changed bits of a footer are read without an error."""
    silent = 0
    for position in range(len(CONTENT) - FOOTER, len(CONTENT)):
        for bit in range(8):
            damaged = bytearray(CONTENT)
            damaged[position] ^= 1 << bit
            with pytest.raises(ValueError, match=REFUSAL):
                sealed.from_parquet(bytes(damaged))
            silent += _differs(bytes(damaged))
    assert silent


def _differs(content: bytes) -> bool:
    try:
        return not pq.read_table(io.BytesIO(content), page_checksum_verification=True).equals(TABLE)
    except Exception:  # whatever it is, the reader has seen it
        return False


@pytest.mark.parametrize("content", [b"", b"PAR1", b"emolab.seal=sha256:", b"PAR1 and something else PAR1"])
def test_something_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        sealed.from_parquet(content)
