"""Training on a cluster that loses workers in mid-epoch, or a node half-way: with a spare one, with none, and with one
that comes later. The run ends with the weights and the metrics of its clean twin."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims, processes
from tests.faults.nodes import Nodes, ended
from tests.faults.test_training_kills import recorded
from tests.training.test_loop import settings_for

from emolab.checkpoint import CheckpointFolder
from emolab.sessions.shards import sha256
from emolab.training.recipe import TrainSettings, WorkerSettings
from emolab.training.train import train

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]
Record = Callable[..., None]
EPOCHS = 8


def training(data: Path, output: Path, name: str, **workers: Any) -> dict[str, Any]:
    settings = settings_for(data, output, epochs=EPOCHS, patience=EPOCHS)
    plan = WorkerSettings.model_validate({"count": 2, "max_failures": 2} | workers)
    return settings.model_copy(update={"name": name, "workers": plan}).model_dump(mode="json")


def saved(folder: Path, epoch: int) -> None:
    """Wait until an epoch has its checkpoint."""
    deadline = time.monotonic() + 150
    while not (folder / "checkpoints" / f"epoch-{epoch:05d}" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, toy_data: Path, victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training with two workers that nothing happened to, under the name ``clean``."""
    output = tmp_path_factory.mktemp("undisturbed")
    nodes.are("a", "b")
    arguments = (training(toy_data, output, "clean"), nodes.address)
    ended(victims.start(jobs.training_together, *arguments, trigger=Trigger(folder=str(output))))
    return output


def living_workers(*, without: Sequence[int]) -> list[int]:
    """Wait until two workers are there, none of them one of those that were killed."""
    deadline = time.monotonic() + 150
    while len(found := processes("ray::RayTrainWorker")) != 2 or set(found) & set(without):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_training_that_loses_workers_and_a_node_goes_on_with_a_spare_one_and_ends_with_the_same_bits(
    nodes: Nodes,
    undisturbed: Path,
    toy_data: Path,
    tmp_path: Path,
    victims: Victims,
    record_faults: Record,
) -> None:
    """SIGKILL of a drawn worker, a drawn time after each of two drawn epochs was saved; then the loss of a node."""
    nodes.are("a", "b")
    arguments = (training(toy_data, tmp_path, "lost", max_failures=3), nodes.address)
    victim = victims.start(jobs.training_together, *arguments, trigger=Trigger(folder=str(tmp_path)))
    generator, killed = np.random.default_rng(20260741), []
    for epoch in sorted(generator.choice(np.arange(1, EPOCHS - 3), size=2, replace=False).tolist()):
        saved(tmp_path / "lost", epoch)
        time.sleep(float(generator.random()) * 0.2)
        worker = living_workers(without=killed)[int(generator.integers(2))]
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)
    saved(tmp_path / "lost", EPOCHS - 3)
    nodes.add("spare")
    nodes.lose("b")
    ended(victim)
    assert recorded(tmp_path, "lost") == recorded(undisturbed, "clean")
    weights = [sha256(run / "model" / "model.safetensors") for run in (tmp_path / "lost", undisturbed / "clean")]
    assert weights[0] == weights[1]
    record_faults("training", "SIGKILL of a DDP worker in mid-epoch", tried=2, survived=2, kills=2)
    record_faults("training", "a node lost, a spare one there", tried=1, survived=1)


LONG = 32
"""Epochs, of a second each: Ray learns of a new node within twenty seconds."""


def workers_of(folder: Path) -> list[int]:
    """With how many workers each epoch was trained, as far as the training has come."""
    newest = CheckpointFolder(folder / "checkpoints").newest()
    return [report["workers"] for report in newest.state["reports"]] if newest else []


def trained_by(workers: int, folder: Path) -> None:
    """Wait until so many workers have trained an epoch."""
    deadline = time.monotonic() + 150
    while workers_of(folder)[-1:] != [workers]:
        assert time.monotonic() < deadline, workers_of(folder)
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_elastic_training_shrinks_with_its_nodes_and_grows_again_and_its_loss_curve_goes_on(
    nodes: Nodes,
    toy_data: Path,
    tmp_path: Path,
    victims: Victims,
    monkeypatch: pytest.MonkeyPatch,
    record_faults: Record,
) -> None:
    """Two workers, one, two again, and one to the end, against one worker that nothing happened to."""
    job = training(toy_data, tmp_path, "elastic", minimum=1)
    job["model"] |= {"dropout": 0.0}  # whose masks are drawn by rank
    job["training"] |= {"epochs": LONG, "patience": LONG, "learning_rate": 1e-3}
    train(TrainSettings.model_validate(job | {"name": "alone", "workers": {}}))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")  # a report is taken at each, so an epoch takes one
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")  # for as many workers as before; else fewer
    nodes.are("a", "b")
    folder = tmp_path / "elastic"
    victim = victims.start(jobs.training_elastically, job, nodes.address, trigger=Trigger(folder=str(folder)))
    trained_by(2, folder)
    nodes.lose("b")
    trained_by(1, folder)
    nodes.add("c")
    trained_by(2, folder)
    nodes.lose("c")
    ended(victim)
    assert [count for count, _ in groupby(workers_of(folder))] == [2, 1, 2, 1]
    ours, theirs = recorded(tmp_path, "elastic"), recorded(tmp_path, "alone")
    assert ours.keys() == theirs.keys()
    for name in ("train_loss", "validation_loss"):  # the loss curve goes on as if nothing had happened
        assert [step for step, _ in ours[name]] == list(range(1, LONG + 1))
        for (_, one), (_, other) in zip(ours[name], theirs[name], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    record_faults("training", "a node lost, no spare, elastic", tried=2, survived=2)
    record_faults("training", "a node that comes later, elastic", tried=1, survived=1)
