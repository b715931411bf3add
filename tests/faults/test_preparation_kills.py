"""A preparation that is killed again and again ends with the bytes of one that was left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims
from tests.faults.undisturbed import SESSIONS, Recordings, finished

from emolab.sessions.work import WorkFolder

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]


def test_preparation_survives_kills_at_any_file_operation(
    recordings: Recordings, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL before the n-th operation on a file of the work folder."""
    output = tmp_path / "data"
    arguments = (str(recordings.media), str(output))
    everything = victims.run(
        jobs.reading, str(recordings.media), str(tmp_path / "count"), trigger=Trigger(folder=str(tmp_path))
    )
    assert not everything.error and len(everything.said) == 1 + SESSIONS
    generator = np.random.default_rng(20260711)
    work, survived, kills = WorkFolder(output), 0, 8
    for _ in range(kills):
        at = int(generator.integers(1, everything.operations // 4))
        ended = victims.run(jobs.reading, *arguments, trigger=Trigger(folder=str(output), at=at))
        assert ended.killed, ended
        there = work.finished(recordings.corpus, recordings.corpus.references())
        survived += {name for said in ended.said for name in ([said] if isinstance(said, str) else said)} <= set(there)
    assert finished(recordings, output) == recordings.expected
    record_faults("preparation", "SIGKILL before a drawn file operation", tried=kills, survived=survived, kills=kills)
    assert survived == kills


def test_preparation_survives_kills_of_its_driver(
    recordings: Recordings, tmp_path: Path, victims: Victims, record_faults: Callable[..., None]
) -> None:
    """SIGKILL of the job's own process after a drawn number of sessions, and once while the shards are written."""
    output = tmp_path / "data"
    records = output / ".unfinished" / "records"
    address = ray.get_runtime_context().gcs_address
    generator = np.random.default_rng(20260712)
    survived, marks = 0, [int(mark) for mark in generator.integers(3, SESSIONS // 2, 2)]
    for mark in np.cumsum(marks).tolist():
        victim = victims.start(
            jobs.preparing,
            str(recordings.media),
            str(output),
            address,
            0.1,
            3600.0,
            trigger=Trigger(folder=str(output)),
        )
        deadline = time.monotonic() + 90
        while len(list(records.glob("s*"))) < mark:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert victim.kill().killed
        survived += len(WorkFolder(output).finished(recordings.corpus, recordings.corpus.references())) >= mark
        assert not (output / "dataset.json").exists()
    victim = victims.start(
        jobs.preparing, str(recordings.media), str(output), address, 0.1, 3600.0, trigger=Trigger(folder=str(output))
    )
    while not any("writing" in str(said) for said in victim.said):
        assert victim.heard(len(victim.said) + 1)
    time.sleep(float(generator.random()) * 0.5)
    survived += victim.kill().killed
    assert finished(recordings, output) == recordings.expected
    record_faults("preparation", "SIGKILL of the driver", tried=3, survived=survived, kills=3)
    assert survived == 3
