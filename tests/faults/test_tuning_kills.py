"""A search that is killed again and again keeps what was finished and runs again what was not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims, processes, silence
from tests.tuning.test_search import HARMLESS, study_of, tracker_of, tune_settings

from emolab.tracking.tracker import NoTracker
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]
TRIALS, EPOCHS = 8, 8
MANY = 24
"""Trials; more than five interrupted searches finish."""


def job(data: Path, folder: Path, **tuning: Any) -> TuneSettings:
    folder.mkdir(exist_ok=True)
    settings = tune_settings(data, folder, **({"trials": TRIALS, "scheduler": "none", "sampler": "random"} | tuning))
    (folder / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    training = settings.training.model_copy(update={"epochs": EPOCHS, "patience": EPOCHS, "decay_epochs": ()})
    return settings.model_copy(update={"training": training})


def test_a_search_survives_kills_of_its_driver(
    ray_cluster: None, toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL a drawn time after drawn trials: each trial ends in one state with a reason, finished ones stay."""
    settings = job(toy_data, tmp_path, trials=MANY)
    database = tmp_path / "runs" / "search" / "study.db"
    generator = np.random.default_rng(20260731)
    address, kills, survived = ray.get_runtime_context().gcs_address, 5, 0
    finished: dict[int, Any] = {}
    for number in range(kills):
        victim = victims.start(
            jobs.searching, settings.model_dump(mode="json"), address, trigger=Trigger(folder=str(tmp_path))
        )
        # One line says that the search goes on; then one for every trial that ended.
        assert victim.heard(1 + (number > 0) if finished or number == 0 else 2), victim.said
        time.sleep(float(generator.random()) * 0.2)
        ended = victim.kill()
        assert ended.killed, ended
        trials = {trial.number: trial for trial in study_of(database)}
        told = [int(line.split()[1]) for line in ended.said if line.startswith("trial ")]
        kept = all(trials[n].values == known.values for n, known in finished.items())
        survived += kept and all(trials[n].state.name == "COMPLETE" for n in told)
        finished |= {n: trial for n, trial in trials.items() if trial.state.name == "COMPLETE"}
        silence("ray::TrialPack")
    tracker = tracker_of(settings)
    result = search(settings, tracker)
    assert len(result.records) == MANY
    trials = study_of(database)
    states = Counter((trial.state.name, trial.user_attrs.get("reason", "")) for trial in trials)
    assert set(states) <= {("COMPLETE", ""), ("FAIL", "interrupted")}
    assert states["COMPLETE", ""] == MANY
    for trial in trials:  # what was interrupted is run again with the same parameters
        if trial.state.name == "FAIL" and trial.params:
            assert any(later.params == trial.params for later in trials[trial.number + 1 :])
        if trial.number in finished:
            known = finished[trial.number]
            assert (trial.params, trial.values, trial.intermediate_values) == (
                known.params,
                known.values,
                known.intermediate_values,
            )
    runs = [tracker.client.get_run(run_id) for run_id in tracker.children(result.run_id)]
    complete = [run for run in runs if run.data.tags["emolab.trial_state"] == "complete"]
    assert len({run.data.tags["emolab.trial"] for run in complete}) == len(complete) == MANY
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    for run in complete:
        history = tracker.client.get_metric_history(run.info.run_id, "kept_macro_f1")
        assert sorted(metric.step for metric in history) == list(range(1, EPOCHS + 1))
    record_faults("tuning", "SIGKILL of the driver", tried=kills, survived=survived, kills=kills)
    assert survived == kills


def test_a_search_survives_kills_of_its_processes(
    ray_cluster: None, toy_data: Path, tmp_path: Path, record_faults: Callable[..., None]
) -> None:
    """SIGKILL of the process that trains, while drawn trials are at it: the table is that of a search left alone."""

    def table(settings: TuneSettings, report: Callable[[str], None] = lambda _: None) -> list[Any]:
        records = search(settings, NoTracker(), report=report).records
        return [(r.number, r.state, r.parameters, r.value, r.epochs, r.curve, r.reason) for r in records]

    expected = table(job(toy_data, tmp_path / "clean"))
    generator = np.random.default_rng(20260732)
    marks = set(generator.choice(np.arange(1, TRIALS), size=3, replace=False).tolist())
    lines, killed = [], []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) in marks:
            [process] = processes("ray::TrialPack")
            killed.append(process)
            threading.Timer(float(generator.random()) * 0.1, os.kill, (process, signal.SIGKILL)).start()

    assert table(job(toy_data, tmp_path / "killed"), report) == expected
    assert len(set(killed)) == 3
    record_faults("tuning", "SIGKILL of the process of a trial", tried=3, survived=3, kills=3)
