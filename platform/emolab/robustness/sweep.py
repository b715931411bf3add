"""A sweep at scale: its units on Ray actors, each done once.

The result of a unit is a file that appears whole, so a sweep that is run again computes only the units whose file is
missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from emolab.cluster import room, user_error, worker_environment
from emolab.names import UserError
from emolab.robustness.evaluator import Evaluator
from emolab.robustness.records import read_agreement, read_tally
from emolab.robustness.sweep_plan import SweepPlan, Unit
from emolab.robustness.tally import Tally, joined
from emolab.sessions.selection import SplitLoader, load_selection_split
from emolab.sessions.visibility import check_visible

_RECONNECT_SECONDS = 0.5
"""Pause before an evaluator that could not be reached is tried again."""
STALL_SECONDS = 3600.0
"""A sweep in which nothing is finished for so long is ended; what it has done stays."""

EvaluatorActor = ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2)(Evaluator)
"""A lost process starts anew and does its unit again."""


def run_sweep(
    plan: SweepPlan,
    folder: Path,
    *,
    report: Callable[[str], None],
    actors: int | None = None,
    opening: Callable[[], SplitLoader] = lambda: load_selection_split,
    stall_seconds: float = STALL_SECONDS,
    missing: Sequence[Unit] | None = None,
) -> int:
    """Compute the units whose result is not in the folder yet, or is damaged; Ray must be connected.

    Args:
        actors: processes at a time; as many as there are CPUs, or shares of GPUs, where None, and never more.
        opening: called once, where there is something to compute, before any session is read.
        stall_seconds: longest time in which nothing at all is finished.
        missing: what ``missing_units`` has found; None: it is asked.

    Returns:
        The number of units computed now.

    Raises:
        UserError: no CPU or GPU to run on, a process that was lost again and again, nothing finished for too long, or
            what the evaluation refuses.
    """
    if missing is None:
        missing = missing_units(plan, folder, report=report)
    done = len(plan.units) - len(missing)
    if done:
        report(f"{done} of {len(plan.units)} units are done already")
    if not missing:
        return 0
    needs = {"CPU": 1.0} | ({"GPU": plan.gpus} if plan.gpus else {})
    fits = room(needs, purpose="a robustness sweep")
    check_visible(plan.data)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}}
    start = EvaluatorActor.options(num_gpus=plan.gpus, runtime_env=environment).remote
    device, load = "cuda" if plan.gpus else "cpu", opening()
    evaluators: list[Any] = [
        start(plan.data, plan.split, folder.resolve(), load, device)
        for _ in range(min(actors or fits, fits, len(missing)))
    ]
    started = time.monotonic()
    try:
        for finished, _ in enumerate(_completed(evaluators, missing, plan, stall_seconds), start=1):
            left = (time.monotonic() - started) / finished * (len(missing) - finished)
            report(f"unit {done + finished} of {len(plan.units)}, about {left:.0f} s left")
    except RayError as error:
        raise _explained(error) from None
    finally:
        for evaluator in evaluators:
            ray.kill(evaluator)
    return len(missing)


def missing_units(plan: SweepPlan, folder: Path, *, report: Callable[[str], None]) -> list[Unit]:
    """The units whose result is not in the folder, or is damaged there, which is reported."""
    return [unit for unit in plan.units if not _usable(unit, plan, folder, report)]


def _usable(unit: Unit, plan: SweepPlan, folder: Path, report: Callable[[str], None]) -> bool:
    if not (folder / unit.file).exists():
        return False
    try:
        if unit.cells:
            _read(unit, plan, folder)
        else:
            read_agreement(folder / unit.file)
    except UserError as error:
        report(f"{error}; it is computed again")
        return False
    return True


def _read(unit: Unit, plan: SweepPlan, folder: Path) -> Tally:
    return read_tally(folder / unit.file, [plan.cells[i] for i in unit.cells], sessions=len(unit.sessions))


def _completed(
    evaluators: Sequence[Any], units: Sequence[Unit], plan: SweepPlan, stall_seconds: float
) -> Iterator[None]:
    """Yield whenever a unit is done. An evaluator gets work only once its process stands: one that still waits for
    a CPU of a busy cluster holds up nothing. One for which no unit is left is ended, so that an evaluator whose node
    was lost finds a CPU to do its unit again. One that cannot be reached gives its unit back: its node may be gone,
    and Ray starts it anew once it knows."""
    waiting = list(units)[::-1]
    running: dict[Any, tuple[Any, Unit | None]] = {each.__ray_ready__.remote(): (each, None) for each in evaluators}
    answered = time.monotonic()
    while waiting or any(unit for _, unit in running.values()):
        patience = max(0.0, answered + stall_seconds - time.monotonic())
        done, _ = ray.wait(list(running), num_returns=1, timeout=patience)
        if not done:
            raise UserError(f"no unit was finished for {stall_seconds:g} s: run the same command again to continue")
        [ready] = done
        evaluator, finished = running.pop(ready)
        try:
            ray.get(ready)
        except ActorUnavailableError:
            waiting += [finished] if finished else []
            time.sleep(_RECONNECT_SECONDS)
            running[evaluator.__ray_ready__.remote()] = (evaluator, None)
            continue
        answered = time.monotonic()
        if waiting:
            unit = waiting.pop()
            some = [plan.cells[i] for i in unit.cells]
            work = evaluator.work.remote(unit, plan.models[unit.model], some, bfloat16=plan.bfloat16)
            running[work] = (evaluator, unit)
        else:
            ray.kill(evaluator)
        if finished:
            yield


def _explained(error: RayError) -> BaseException:
    cause = user_error(error)
    if isinstance(cause, UserError) or isinstance(error, RayTaskError):
        return cause
    what = " ".join(str(error).split())[:160]
    return UserError(f"an evaluating process was lost ({what}): run it again, with fewer actors if memory is short")


def read_sweep(plan: SweepPlan, folder: Path) -> list[Tally]:
    """One tally per model, over all sessions and cells.

    Raises:
        UserError: a unit is missing or damaged.
    """
    tallies = []
    for number in range(len(plan.models)):
        parts: dict[range, list[Tally]] = {}
        for unit in plan.units:
            if unit.model == number and unit.cells:
                parts.setdefault(unit.cells, []).append(_read(unit, plan, folder))
        tallies.append(_stacked([joined(tallies_of_cells) for tallies_of_cells in parts.values()]))
    return tallies


def read_agreements(plan: SweepPlan, folder: Path) -> list[dict[str, float]]:
    """What ``agreement`` measured, per model.

    Raises:
        UserError: a unit is missing or damaged.
    """
    return [read_agreement(folder / unit.file) for unit in plan.units if not unit.cells]


def _stacked(parts: Sequence[Tally]) -> Tally:
    """Tallies of different cells on the same sessions, as one."""
    weights = [part.weight for part in parts if part.weight is not None]
    return replace(
        parts[0],
        cells=tuple(cell for part in parts for cell in part.cells),
        confusion=np.concatenate([part.confusion for part in parts]),
        calibration=np.concatenate([part.calibration for part in parts]),
        squared_error=np.concatenate([part.squared_error for part in parts]),
        weight=np.concatenate(weights) if len(weights) == len(parts) else None,
    )
