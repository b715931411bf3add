"""Where trials that pause at a rung are kept: as checkpoints, from which any process can go on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from emolab.checkpoint import Checkpoint, CheckpointFolder, Checkpoints
from emolab.remote_checkpoints import run_checkpoints
from emolab.training.recipe import TrainSettings, fingerprint


class RungCheckpoints(Checkpoints):
    """Those of some epochs only: between two rungs a trial costs nothing but its training."""

    def __init__(self, inner: Checkpoints, rungs: Collection[int]) -> None:
        self._inner, self._rungs = inner, frozenset(rungs)

    def save(self, epoch: int, checkpoint: Checkpoint) -> None:
        if epoch in self._rungs:
            self._inner.save(epoch, checkpoint)

    def newest(self) -> Checkpoint | None:
        return self._inner.newest()

    def discard(self) -> None:
        self._inner.discard()


def paused_trial(
    folder: Path, number: int, parameters: Mapping[str, Any], base: TrainSettings, rungs: Collection[int]
) -> Checkpoints:
    """The checkpoints of a trial.

    Args:
        folder: of the study.
        base: what all its trials share. A trial of the same number with another configuration is another trial.

    Raises:
        UserError: the address of the checkpoints cannot be used.
    """
    identity = fingerprint({"base": base.identity(), "parameters": dict(parameters)})
    own = folder / "paused" / f"trial-{number:05d}-{identity}"
    if base.checkpoints is None:
        return RungCheckpoints(CheckpointFolder(own), rungs)
    return RungCheckpoints(run_checkpoints(base.checkpoints, own, folder.name), rungs)
