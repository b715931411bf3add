"""What a training needs, checked before it begins: its data, room for its workers, and a place for what it leaves."""

from __future__ import annotations

import os
from pathlib import Path

from emolab.cluster import room
from emolab.names import UserError
from emolab.sessions.loading import split_blocks
from emolab.sessions.manifest import Manifest
from emolab.training.data import TRAINING_SPLITS, load_training_data
from emolab.training.recipe import TrainSettings, WorkerSettings, check_selection


def check_data(settings: TrainSettings, manifest: Manifest) -> None:
    """Read the two splits that a training may see, every digest checked.

    Raises:
        UserError: the data are damaged, inconsistent or without labels, or have no validation split where the weights
            are chosen by it.
    """
    check_selection(settings.training, manifest, data=settings.data)
    folder = Path(settings.data)
    if settings.workers.count == 1:
        load_training_data(folder)  # stays in this process, which is the one that trains
        return
    for split in TRAINING_SPLITS:  # the workers have the data from Ray: here one shard at a time is held
        for _ in split_blocks(folder, manifest, split):
            pass


def check_room(workers: WorkerSettings, *, count: int, purpose: str) -> None:
    """Refuse so many workers where the connected cluster can never hold them; Ray itself would wait for ever.

    Raises:
        UserError: naming what falls short.
    """
    room(workers.resources(1), purpose=purpose, count=count)


def check_writable(output: Path) -> None:
    """Refuse an output folder that cannot be made or written to.

    Raises:
        UserError: naming what is in the way.
    """
    place = output.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--output {output}: {place} is not a folder that can be written to: name another")
