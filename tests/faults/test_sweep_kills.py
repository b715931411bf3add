"""A sweep that is killed again and again ends with the tables of one that was left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims, processes, silence
from tests.robustness.test_sweep import SUITE, contents, no_report, opened, same
from tests.training.test_loop import settings_for

from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.sweep import SweepPlan, plan_sweep, read_sweep, run_sweep
from emolab.training.train import train

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]


@dataclass(frozen=True)
class Sweep:
    """What is to be swept, and the folder of a sweep that nothing happened to."""

    plan: SweepPlan
    unbroken: Path


@pytest.fixture(scope="module")
def planned(ray_cluster: None, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = tmp_path_factory.mktemp("sweep")
    models = []
    for name in ("edu_emotionnet", "late_fusion"):
        options = settings_for(toy_data, folder, model={"name": name}, epochs=2)
        options = options.model_copy(update={"tracking": options.tracking.model_copy(update={"enabled": False})})
        models.append(train(options).folder / "model")
    cells = expand(parse_suite(SUITE), ("audio", "visual", "text"))
    plan = plan_sweep(models, toy_data, "test", cells, sessions_per_unit=4, cells_per_unit=8)
    assert run_sweep(plan, folder / "units", report=no_report, actors=1, opening=opened) == len(plan.units)
    return Sweep(plan, folder / "units")


def test_a_sweep_survives_kills_at_any_file_operation(
    planned: Sweep, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL before the n-th operation on a file of a unit, a model or the data."""
    counted = victims.run(jobs.evaluating, planned.plan, str(tmp_path / "count"), trigger=Trigger(folder=str(tmp_path)))
    assert not counted.error and len(counted.said) == len(planned.plan.units)
    assert contents(tmp_path / "count") == contents(planned.unbroken)
    generator = np.random.default_rng(20260721)
    kills, survived, folder, acknowledged = 8, 0, tmp_path / "units", set[str]()
    for _ in range(kills):
        at = int(generator.integers(1, counted.operations // 4))
        ended = victims.run(jobs.evaluating, planned.plan, str(folder), trigger=Trigger(folder=str(folder), at=at))
        assert ended.killed, ended
        acknowledged |= set(ended.said)
        left = contents(folder) if folder.exists() else {}
        survived += acknowledged <= set(left) and left.items() <= contents(planned.unbroken).items()
    run_sweep(planned.plan, folder, report=no_report, actors=2, opening=opened)
    assert contents(folder) == contents(planned.unbroken)
    record_faults("sweeps", "SIGKILL before a drawn file operation", tried=kills, survived=survived, kills=kills)
    assert survived == kills


def test_a_sweep_survives_kills_of_its_processes_and_of_its_driver(
    planned: Sweep, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL of an actor after drawn units, of the driver after others; in the end every table is the same."""
    units = len(planned.plan.units)
    address, folder = ray.get_runtime_context().gcs_address, tmp_path / "units"
    generator = np.random.default_rng(20260722)
    driver = victims.start(jobs.sweeping, planned.plan, str(folder), address, trigger=Trigger(folder=str(folder)))
    heard = int(generator.integers(1, units // 3))
    assert driver.heard(heard)
    assert driver.kill().killed
    silence("ray::Evaluator")
    survived = int(heard <= len(contents(folder)) < units)
    marks = set(generator.choice(np.arange(1, units // 2), size=3, replace=False).tolist())
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) in marks and (actors := processes("ray::Evaluator")):
            os.kill(actors[int(generator.integers(len(actors)))], signal.SIGKILL)
            marks.remove(len(lines))

    done = len(contents(folder))
    assert run_sweep(planned.plan, folder, report=report, actors=2, opening=opened) == units - done
    survived += 3 - len(marks)
    assert contents(folder) == contents(planned.unbroken)
    same(read_sweep(planned.plan, folder), read_sweep(planned.plan, planned.unbroken))
    record_faults("sweeps", "SIGKILL of the driver or of an actor", tried=4, survived=survived, kills=4)
    assert survived == 4
