"""What a training needs, checked before it begins: its data, and room for its workers."""

from __future__ import annotations

from pathlib import Path

from emolab.cluster import fitting, nodes, require
from emolab.names import UserError
from emolab.sessions.loading import split_blocks
from emolab.sessions.manifest import Manifest
from emolab.training.data import TRAINING_SPLITS, load_training_data
from emolab.training.recipe import TrainSettings, WorkerSettings


def check_data(settings: TrainSettings, manifest: Manifest) -> None:
    """Read the two splits that a training may see, every digest checked.

    Raises:
        UserError: the data are damaged or inconsistent, or have no validation split where the weights are chosen by it.
    """
    if not manifest.split_shards("validation") and settings.training.selection == "best":
        raise UserError(f"{settings.data} has no validation split: set training.selection=last")
    folder = Path(settings.data)
    if settings.workers.count == 1:
        load_training_data(folder)  # stays in this process, which is the one that trains
        return
    for split in TRAINING_SPLITS:  # the workers have the data from Ray: here one shard at a time is held
        for _ in split_blocks(folder, manifest, split):
            pass


def check_room(workers: WorkerSettings) -> None:
    """Refuse workers whom the connected cluster can never hold; Ray itself would wait for ever.

    Raises:
        UserError: naming what falls short.
    """
    fewest = workers.minimum or workers.count
    alone = {"CPU": workers.cpus} | ({"GPU": float(workers.gpus)} if workers.gpus else {})
    require({name: fewest * amount for name, amount in alone.items()}, purpose=f"training with {fewest} workers")
    if fitting(alone) < fewest:
        largest = max((node.get("CPU", 0.0) for node in nodes()), default=0.0)
        raise UserError(
            f"training with {fewest} workers cannot run here: a worker needs {workers.cpus:g} CPU and {workers.gpus} "
            f"GPU of one node, and the largest node has {largest:g} CPU"
        )
