"""A sweep that is killed again and again ends with the tables of one that was left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims, processes, silence
from tests.faults.undisturbed import Sweep
from tests.robustness.test_sweep import contents, no_report, opened, same

from emolab.robustness.sweep import read_sweep, run_sweep

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]


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
