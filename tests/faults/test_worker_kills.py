"""DDP workers that are killed in mid-epoch: the run ends with the weights and the metrics of its clean twin."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.faults.killing import processes
from tests.faults.test_training_kills import recorded
from tests.training.test_loop import settings_for

from emolab.sessions.shards import sha256
from emolab.tracking.runs import open_tracker
from emolab.training.recipe import TrainSettings, WorkerSettings
from emolab.training.train import train

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]
EPOCHS = 6


def job(data: Path, output: Path, name: str) -> TrainSettings:
    settings = settings_for(data, output, epochs=EPOCHS, patience=EPOCHS)
    return settings.model_copy(update={"name": name, "workers": WorkerSettings(count=2, max_failures=2)})


def test_killed_workers_cost_no_metric_and_change_no_bit(
    ray_cluster: None, toy_data: Path, tmp_path: Path, record_faults: Callable[..., None]
) -> None:
    clean = job(toy_data, tmp_path, "clean")
    tracker = open_tracker(**clean.tracking.model_dump(), output=tmp_path)
    train(clean, tracker=tracker)
    generator = np.random.default_rng(20260741)
    killed: list[int] = []

    def kill_in_mid_epoch() -> None:
        """A drawn worker, a drawn time after each of two drawn epochs was saved."""
        for epoch in sorted(generator.choice(np.arange(1, EPOCHS), size=2, replace=False).tolist()):
            saved = tmp_path / "killed" / "checkpoints" / f"epoch-{epoch:05d}" / "manifest.json"
            deadline = time.monotonic() + 120
            while not saved.exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(float(generator.random()) * 0.2)
            workers = processes("ray::RayTrainWorker")
            if len(workers) == 2:
                killed.append(workers[int(generator.integers(2))])
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_in_mid_epoch)
    killer.start()
    train(job(toy_data, tmp_path, "killed"), tracker=tracker)
    killer.join()
    assert len(killed) == 2
    assert recorded(tmp_path, "killed") == recorded(tmp_path, "clean")
    weights = [sha256(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "clean")]
    assert weights[0] == weights[1]
    record_faults("training", "SIGKILL of a DDP worker in mid-epoch", tried=2, survived=2, kills=2)
