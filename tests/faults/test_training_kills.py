"""Training that is killed again and again ends as the training that was left alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from tests.faults import victims as jobs
from tests.faults.killing import Ended, Trigger, Victims
from tests.training.test_loop import settings_for

from emolab.checkpoint import CheckpointFolder
from emolab.sessions.shards import sha256

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]
EPOCHS = 5
STORIES, KILLS = 5, 4


def job(data: Path, output: Path, name: str) -> dict[str, Any]:
    settings = settings_for(data, output, epochs=EPOCHS, patience=EPOCHS, modality_dropout=0.5)
    return settings.model_copy(update={"name": name}).model_dump(mode="json")


def recorded(output: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Everything the tracker holds of the one run with this name."""
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    known = json.loads((output / name / "run.json").read_text())["run_id"]
    assert (run.info.run_id, run.info.status) == (known, "FINISHED")
    return {
        metric: sorted((point.step, point.value) for point in client.get_metric_history(known, metric))
        for metric in run.data.metrics
        if metric != "sessions_per_second"
    }


def test_training_survives_kills_at_any_file_operation(
    toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL before the n-th operation on a file of the run: while saving, logging, claiming or finishing."""
    output = tmp_path / "runs"
    clean = victims.run(jobs.training, job(toy_data, output, "clean"), trigger=Trigger(folder=str(output)))
    assert not clean.error and clean.said == ["began", *range(1, EPOCHS + 1)]
    expected, weights = recorded(output, "clean"), sha256(output / "clean" / "model" / "model.safetensors")
    generator = np.random.default_rng(20260701)
    killed = survived = 0
    for story in range(STORIES):
        name, kills = f"story-{story}", 0
        while True:
            # What is left of a run that was killed before takes fewer operations than a whole one.
            at = int(generator.integers(1, clean.operations // (1 + kills))) if kills < KILLS else None
            ended = victims.run(jobs.training, job(toy_data, output, name), trigger=Trigger(folder=str(output), at=at))
            assert not ended.error, (name, at, ended)
            if not ended.killed:
                break
            kills += 1
            assert survives(ended, output / name), (at, ended, sorted((output / name).rglob("*")))
            survived += 1
        killed += kills
        assert recorded(output, name) == expected, name
        assert sha256(output / name / "model" / "model.safetensors") == weights
    record_faults("training", "SIGKILL before a drawn file operation", tried=killed, survived=survived, kills=killed)
    assert survived == killed
    assert killed >= STORIES * 2


def survives(ended: Ended, folder: Path) -> bool:
    """Whether everything the victim was told is there is there."""
    epochs = [said for said in ended.said if said != "began"]
    newest = CheckpointFolder(folder / "checkpoints").newest()
    return not epochs or (newest is not None and newest.state["epoch"] >= epochs[-1])


def test_training_survives_kills_at_any_time(
    toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL from outside, a drawn time after a drawn epoch: in a batch, in the tracker's transaction, in a write."""
    output = tmp_path / "runs"
    counting = Trigger(folder=str(output))
    assert not victims.run(jobs.training, job(toy_data, output, "clean"), trigger=counting).error
    expected, weights = recorded(output, "clean"), sha256(output / "clean" / "model" / "model.safetensors")
    generator = np.random.default_rng(20260702)
    killed = survived = 0
    for name in (f"timed-{number}" for number in range(4)):
        for _ in range(2):
            victim = victims.start(jobs.training, job(toy_data, output, name), trigger=counting)
            victim.heard(int(generator.integers(1, 4)))
            time.sleep(float(generator.random()) * 0.2)
            ended = victim.kill()
            assert not ended.error
            killed += ended.killed
            survived += ended.killed and survives(ended, output / name)
        last = victims.run(jobs.training, job(toy_data, output, name), trigger=counting)
        assert not last.error and not last.killed
        assert recorded(output, name) == expected
        assert sha256(output / name / "model" / "model.safetensors") == weights
    record_faults("training", "SIGKILL at a drawn time", tried=killed, survived=survived, kills=killed)
    assert survived == killed
    assert killed >= 4
