"""A tracker's file is there with all its tables or not at all, whoever makes it and however the maker ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emolab.names import UserError
from emolab.tracking import sqlite_store
from emolab.tracking.runs import MLflowTracker, open_tracker


@pytest.fixture(autouse=True)
def in_truth(quick_stores: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests are spared is what is tested here."""
    monkeypatch.setattr(sqlite_store, "_make", quick_stores)


SCRIPT = """
import sys
from pathlib import Path
from emolab.tracking.runs import open_tracker
tracker = open_tracker(enabled=True, uri=None, experiment=sys.argv[2], output=Path(sys.argv[1]))
print(tracker.start("one").run_id)
"""


def opener(output: Path, experiment: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", SCRIPT, str(output), experiment]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_make_a_tracker_at_once(tmp_path: Path) -> None:
    openers = [opener(tmp_path / "runs", "same") for _ in range(2)]
    results = [process.communicate(timeout=240) for process in openers]
    assert [process.returncode for process in openers] == [0, 0], results
    tracker = open_tracker(enabled=True, uri=None, experiment="same", output=tmp_path / "runs")
    assert len({tracker.resume(output.strip()).run_id for output, _ in results}) == 2


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.4])
def test_a_process_that_is_killed_while_it_makes_a_tracker_leaves_nothing_in_the_way(
    tmp_path: Path, after: float
) -> None:
    output = tmp_path / "runs"
    with opener(output, "first") as process:
        deadline = time.monotonic() + 120
        while not any(file.stat().st_size for file in files(output)) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(after)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert files(output)
    tracker = open_tracker(enabled=True, uri=None, experiment="second", output=output)
    assert tracker.start("after").run_id
    assert {file.name for file in files(output)} == {"mlflow.db"}


@pytest.mark.parametrize("uri", ["sqlite:tracker.db", "sqlite:/tracker.db"])
def test_an_address_that_is_none_is_one_line(uri: str, one_line: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        MLflowTracker(uri, "first")
    one_line(error, f"the tracker {uri} cannot be used")


def files(output: Path) -> list[Path]:
    """The database, whatever it is called while it is made."""
    return [file for file in output.glob("*mlflow.db*") if not file.name.endswith(".lock")]
