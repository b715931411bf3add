"""The two splits a training run may see. The test split is not among them, and its path is never formed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError

from emolab.cluster import user_error
from emolab.names import UserError
from emolab.sessions.loading import Block, SessionStore, load_split
from emolab.sessions.manifest import Manifest, Shard, read_manifest
from emolab.sessions.shards import claim_session, read_shard

TrainingSplit = Literal["train", "validation"]
TRAINING_SPLITS: tuple[TrainingSplit, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training and validation sessions, checked."""

    manifest: Manifest
    train: SessionStore
    validation: SessionStore

    def __post_init__(self) -> None:
        """Refuse an empty training split, repeated sessions, and a speaker on both sides.

        Raises:
            UserError: naming the session or the speaker.
        """
        if not len(self.train):
            raise UserError("the training split is empty")
        seen: dict[str, str] = {}
        speakers: dict[str, str] = {}
        for split, store in (("train", self.train), ("validation", self.validation)):
            for session_id, speaker_id in zip(store.session_ids, store.speaker_ids, strict=True):
                claim_session(session_id, speaker_id, split, seen, speakers)
        for split, summary in self.manifest.splits.items():
            for speaker in summary.speakers:
                if speakers.setdefault(speaker, split) != split:
                    raise UserError(f"speaker {speaker!r} is in two splits ({speakers[speaker]} and {split})")


def load_training_data(folder: Path) -> TrainingData:
    """Read train and validation into this process; read once per process and data set.

    Raises:
        UserError: the data set is missing, damaged or inconsistent.
    """
    manifest = read_manifest(folder)
    return _cached(folder.resolve(), manifest.digest)


@lru_cache(maxsize=2)
def _cached(folder: Path, digest: str) -> TrainingData:
    manifest = read_manifest(folder)
    assert manifest.digest == digest
    return TrainingData(
        manifest=manifest,
        train=load_split(folder, manifest, "train"),
        validation=load_split(folder, manifest, "validation"),
    )


def shared_datasets(folder: Path, manifest: Manifest) -> dict[str, ray.data.Dataset]:
    """Read train and validation with Ray Data into the object store, which all workers of a node share.

    Raises:
        UserError: what ``load_training_data`` refuses, before any worker starts.
    """
    datasets = {split: _dataset(folder.resolve(), manifest.split_shards(split)) for split in TRAINING_SPLITS}
    datasets = {split: dataset for split, dataset in datasets.items() if dataset is not None}
    from_datasets(manifest, datasets)
    return datasets


def from_datasets(manifest: Manifest, datasets: Mapping[str, Any]) -> TrainingData:
    """Materialised datasets, or a worker's iterators over them -> sessions, without copying."""
    stores = {}
    for split in TRAINING_SPLITS:
        tables: list[pa.Table] = ray.get(datasets[split].materialize().to_arrow_refs()) if split in datasets else []
        stores[split] = SessionStore([Block.from_table(table) for table in tables if table.num_rows])
    return TrainingData(manifest=manifest, train=stores["train"], validation=stores["validation"])


def _dataset(folder: Path, shards: list[Shard]) -> ray.data.Dataset | None:
    if not shards:
        return None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # the order of sessions is part of the result
    context.enable_progress_bars = False
    rows = ray.data.from_items([shard.model_dump() for shard in shards], override_num_blocks=len(shards))
    try:
        return rows.map_batches(
            _ShardReader(folder), batch_size=1, batch_format="pyarrow", zero_copy_batch=True
        ).materialize()
    except RayTaskError as error:
        raise user_error(error) from None


class _ShardReader:
    """Ray Data stage: manifest entry -> verified rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        (entry,) = rows.to_pylist()
        return read_shard(self.folder, Shard(**entry))
