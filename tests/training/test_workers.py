"""The loop on two workers of a group of its own, without Ray: what one of them meets, both know."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.test_loop import settings_for
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from emolab.checkpoint import CheckpointFolder
from emolab.names import UserError
from emolab.sessions.loading import SessionStore
from emolab.training.data import TrainingData, load_training_data
from emolab.training.loop import fit
from emolab.training.processes import Workers
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process

WORKERS = 2


def settings_in(folder: Path, **training: Any) -> TrainSettings:
    return settings_for(folder / "data", folder, model={"dropout": 0.0}, **training)


def next_epoch(data: TrainingData, folder: Path, rank: int, checkpoints: CheckpointFolder | None = None) -> str:
    """Train one epoch: which it was, or how it failed."""
    settings = settings_in(folder)
    torch.manual_seed(0)
    model = settings.model.build(data.manifest)
    workers = Workers(rank=rank, count=WORKERS)
    epochs = fit(
        model, DistributedDataParallel(model), data, settings.training, workers=workers, checkpoints=checkpoints
    )
    try:
        return f"epoch {next(epochs).epoch}"
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def begins(data: TrainingData, folder: Path, rank: int) -> str:
    return next_epoch(data, folder, rank)


def meets_what_is_far_out(data: TrainingData, folder: Path, rank: int) -> str:
    """The second session of validation, which is worker 1's, lies where no prediction is finite."""
    block = data.validation.blocks[0]
    audio = np.array(block.features["audio"])
    audio[block.starts[1] : block.starts[2]] = np.finfo(np.float32).max
    far = replace(block, features=block.features | {"audio": audio})
    return next_epoch(replace(data, validation=SessionStore([far, *data.validation.blocks[1:]])), folder, rank)


def goes_on(data: TrainingData, folder: Path, rank: int, *, case: str) -> str:
    """Each worker from the checkpoints that it sees."""
    return next_epoch(data, folder, rank, CheckpointFolder(folder / case / SEEN[case][rank]))


SEEN = {
    "stale": ("whole", "stale"),
    "empty": ("empty", "whole"),
    "other": ("whole", "other"),
    "same": ("whole", "whole"),
}
"""Which folder of checkpoints each worker sees."""
CASES: dict[str, Callable[[TrainingData, Path, int], str]] = {
    "begins": begins,
    "far out": meets_what_is_far_out,
    **{case: partial(goes_on, case=case) for case in SEEN},
}


def worker(rank: int, data: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    training = load_training_data(Path(data))
    said = {name: case(training, Path(folder), rank) for name, case in CASES.items()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workers see in every case: the checkpoints of a run after two epochs, the same without the newest one,
    none, or those of a run at another rate."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "data").symlink_to(toy_data)
    for name, rate in (("whole", 1e-2), ("other", 2e-2)):
        checkpoints = CheckpointFolder(folder / "runs" / name)
        epochs = epochs_in_process(settings_in(folder, learning_rate=rate), checkpoints=checkpoints)
        assert [next(epochs).epoch for _ in range(2)] == [1, 2]
    shutil.copytree(folder / "runs" / "whole", folder / "runs" / "stale")
    shutil.rmtree(folder / "runs" / "stale" / "epoch-00002")
    for case, seen in SEEN.items():
        for name in {*seen} - {"empty"}:
            shutil.copytree(folder / "runs" / name, folder / case / name)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, str]]:
    """What both workers said to every case; one start of the processes for all of them."""
    spawn(worker, args=(str(folder / "data"), str(folder)), nprocs=WORKERS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORKERS)]


@pytest.mark.fault
def test_predictions_that_are_not_finite_on_one_worker_stop_both(said: list[dict[str, str]]) -> None:
    expected = "NonFiniteLossError: non-finite validation loss after epoch 1"
    assert [mine["far out"] for mine in said] == [expected] * WORKERS
    assert [mine["begins"] for mine in said] == ["epoch 1"] * WORKERS


@pytest.mark.fault
@pytest.mark.parametrize(("case", "epochs"), [("stale", "1 and 2"), ("empty", "0 and 2"), ("other", "2 and 2")])
def test_workers_that_see_different_checkpoints_do_not_mix_them(
    folder: Path, said: list[dict[str, str]], case: str, epochs: str
) -> None:
    for mine, seen in zip(said, SEEN[case], strict=True):
        assert mine[case] == (
            f"UserError: the workers would go on from different checkpoints in {folder / case / seen} "
            f"(after epochs {epochs}): make sure that all nodes share this folder, then run the same command again"
        )
        assert mine["same"] == "epoch 3"
