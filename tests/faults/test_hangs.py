"""What hangs is ended, tried again, and in the end given up with the reason; nothing waits for it for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.faults.killing import processes
from tests.faults.test_tuning_kills import job
from tests.faults.undisturbed import Sweep
from tests.robustness.test_sweep import contents, opened

from emolab.names import UserError
from emolab.robustness.sweep import run_sweep
from emolab.tracking.tracker import NoTracker
from emolab.training.train import epochs_in_process
from emolab.tuning import processes as trial_processes
from emolab.tuning.pack import Answers, TrialPack
from emolab.tuning.search import search
from emolab.tuning.space import configured


class SleepyPack(TrialPack):
    """Falls asleep in trial 1 whenever it comes to it, and in trial 2 once."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        flag = Path(self._base.output) / "slept"
        number = draws[0][0]
        if number == 1 or (number == 2 and not flag.exists()):
            super().advance(draws, 2, told)
            flag.touch() if number == 2 else None
            time.sleep(600)
        return super().advance(draws, until, told)


pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]


def test_a_sweep_whose_processes_hang_ends_with_an_error_and_goes_on_when_run_again(
    planned: Sweep,
    tmp_path: Path,
    record_faults: Callable[..., None],
) -> None:
    lines, stopped = [], []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            stopped.extend(processes("ray::Evaluator"))
            for process in stopped:
                os.kill(process, signal.SIGSTOP)

    try:
        with pytest.raises(UserError, match="no unit was finished for 20 s: run the same command again"):
            run_sweep(planned.plan, tmp_path, report=report, actors=1, opening=opened, stall_seconds=20.0)
    finally:
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):  # Ray has ended it, as it should
                os.kill(process, signal.SIGKILL)
    assert len(stopped) == 1
    done = len(contents(tmp_path))
    left = run_sweep(planned.plan, tmp_path, report=lambda _: None, actors=1, opening=opened)
    assert left == len(planned.plan.units) - done
    assert contents(tmp_path) == contents(planned.unbroken)
    record_faults("sweeps", "a process that hangs", tried=1, survived=1)


def test_a_sleeping_process_is_replaced_and_a_trial_that_always_sleeps_fails_with_timeout(
    ray_cluster: None,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_faults: Callable[..., None],
) -> None:
    settings = job(toy_data, tmp_path / "asleep", trials=4, timeout_s=8.0)
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"max_failures": 1})})
    monkeypatch.setattr(trial_processes, "TrialPack", SleepyPack)
    found = {r.number: r for r in search(settings, NoTracker()).records}
    assert found[1].state == "FAIL"
    assert found[1].reason == "timeout: no epoch within 8 s, 2 times"
    for number in (0, 2, 3):
        alone = [
            report.kept_macro_f1 for report in epochs_in_process(configured(settings.base(), found[number].parameters))
        ]
        assert (found[number].state, found[number].value) == ("COMPLETE", alone[-1])
        assert list(found[number].curve.values()) == alone
    record_faults("tuning", "a process that hangs", tried=3, survived=3)
