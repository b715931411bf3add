"""The loop on two workers of a group of its own, without Ray: what one of them meets, both know."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.test_loop import settings_for
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from emolab.names import UserError
from emolab.sessions.loading import SessionStore
from emolab.training.data import TrainingData, load_training_data
from emolab.training.loop import fit
from emolab.training.processes import Workers

WORKERS = 2


def first_epoch(data: TrainingData, folder: Path, rank: int) -> str:
    """Train one epoch; how it failed, or nothing."""
    settings = settings_for(folder, folder, model={"dropout": 0.0})
    torch.manual_seed(0)
    model = settings.model.build(data.manifest)
    workers = Workers(rank=rank, count=WORKERS)
    epochs = fit(model, DistributedDataParallel(model), data, settings.training, workers=workers)
    try:
        next(epochs)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def far_out(store: SessionStore) -> SessionStore:
    """The same sessions, of which the second, which is worker 1's, lies where no prediction is finite."""
    block = store.blocks[0]
    audio = np.array(block.features["audio"])
    audio[block.starts[1] : block.starts[2]] = np.finfo(np.float32).max
    return SessionStore([replace(block, features=block.features | {"audio": audio}), *store.blocks[1:]])


def unharmed(data: TrainingData, folder: Path, rank: int) -> str:
    return first_epoch(data, folder, rank)


def validation_is_far_out(data: TrainingData, folder: Path, rank: int) -> str:
    return first_epoch(replace(data, validation=far_out(data.validation)), folder, rank)


CASES: list[Callable[[TrainingData, Path, int], str]] = [unharmed, validation_is_far_out]


def worker(rank: int, data: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    training = load_training_data(Path(data))
    said = {case.__name__: case(training, Path(folder), rank) for case in CASES}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def said(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What both workers said to every case; one start of the processes for all of them."""
    folder = tmp_path_factory.mktemp("workers")
    spawn(worker, args=(str(toy_data), str(folder)), nprocs=WORKERS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORKERS)]


@pytest.mark.fault
def test_predictions_that_are_not_finite_on_one_worker_stop_both(said: list[dict[str, str]]) -> None:
    expected = "NonFiniteLossError: non-finite validation loss after epoch 1"
    assert [mine["validation_is_far_out"] for mine in said] == [expected] * WORKERS
    assert [mine["unharmed"] for mine in said] == [""] * WORKERS
