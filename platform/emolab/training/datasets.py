"""The two splits a training run may see, through Ray Data: read once per node, shared by its workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError

from emolab.cluster import user_error
from emolab.sessions.loading import Block, SessionStore
from emolab.sessions.manifest import Manifest, Shard
from emolab.sessions.shards import ShardReader
from emolab.training.data import TRAINING_SPLITS, TrainingData


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
            ShardReader(folder), batch_size=1, batch_format="pyarrow", zero_copy_batch=True
        ).materialize()
    except RayTaskError as error:
        raise user_error(error) from None
