"""What a training needs, checked before it begins: its data, room for its workers, and a place for what it leaves."""

from __future__ import annotations

import os
from pathlib import Path

import torch

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


_BYTES = 16
"""Of a parameter in training, at the least: its value, its gradient, and the two moments of the optimizer."""


def check_memory(settings: TrainSettings, manifest: Manifest) -> None:
    """Refuse a model that can never be trained in the memory of this machine, or of its GPU.

    Raises:
        UserError: naming what it needs and what there is.
    """
    count = settings.model.parameters(manifest)
    if settings.workers.gpus and torch.cuda.is_available():
        memory, where = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        memory, where = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"
    if count * _BYTES > memory:
        raise UserError(
            f"{settings.model.name} has {count:,} parameters here: training takes at least "
            f"{count * _BYTES / 2**30:,.0f} GiB and {where} has {memory / 2**30:,.0f} GiB: choose a smaller model"
        )


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
