"""Shards of new recordings: found again while they are whole, made again where one is not, scaled as the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.conftest import ToyCorpus

from emolab.serving.media import RECORD, write_recordings
from emolab.sessions.protocol import normalised
from emolab.sessions.schema import from_table
from emolab.sessions.work import WorkFolder
from emolab.training.recipe import fingerprint

CORPUS = ToyCorpus(sessions=5)


def write(output: Path, *, scaled: bool = False) -> tuple[Path, list[str]]:
    """The shards' folder and what was said; what can be read lies in the work folder already, so Ray has no part."""
    folder = output / f"recordings-{fingerprint({'options': CORPUS.options()})}"
    work = WorkFolder(folder)
    work.claim(CORPUS)
    for reference in CORPUS.references():
        work.add(CORPUS, reference, CORPUS.load(reference))
    model: Any = SimpleNamespace(scales_sessions=scaled)
    lines: list[str] = []
    written = write_recordings(
        CORPUS, output, model, shard_sessions=2, max_refused=0.0, stall_seconds=60.0, report=lines.append
    )
    assert written == folder
    return folder, lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five recordings in three shards."""
    return write(tmp_path)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".json")}


def test_whole_shards_are_found_again_and_nothing_is_read(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    assert sorted(before) == [f"part-0000{n}.parquet" for n in range(3)] + [RECORD]
    assert write(tmp_path)[1] == []
    assert contents(folder) == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: part.rename(part.parent.parent / "elsewhere"),
        lambda part: part.write_bytes(part.read_bytes()[:-40]),
        lambda part: part.write_bytes(part.read_bytes().replace(b"emolab.dimension.audio", b"emolab.dimension.oudia")),
        lambda part: (part.parent / "part-00009.parquet").write_bytes(part.read_bytes()),
        lambda part: (part.parent / RECORD).write_text("{"),
        lambda part: (part.parent / RECORD).unlink(),
    ],
    ids=["missing", "cut", "changed", "one too many", "half a record", "no record"],
)
def test_a_shard_that_is_missing_damaged_or_strange_is_noticed_and_mended(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    before = contents(folder)
    spoil(folder / "part-00001.parquet")
    assert contents(folder) != before
    assert "5 of 5 recordings" in write(tmp_path)[1][-1]
    assert contents(folder) == before


def test_no_record_speaks_of_shards_that_are_being_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> str:
        raise KeyboardInterrupt

    (folder / "part-00001.parquet").unlink()
    monkeypatch.setattr("emolab.serving.media.write_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert not (folder / RECORD).exists()


def test_sessions_are_standardised_where_the_models_were(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, scaled=True)
    table = pq.read_table(folder / "part-00000.parquet")
    for index, reference in enumerate(CORPUS.references()[:2]):
        expected = normalised(CORPUS.load(reference))
        for name, values in from_table(table, index).features.items():
            np.testing.assert_array_equal(values, expected.features[name])
