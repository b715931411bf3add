"""How long a search will take: a few real steps in a process like its own, and the epochs that it will train."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from emolab.cluster import free, start_seconds, user_error
from emolab.names import UserError
from emolab.tuning.calibration import sample_configurations
from emolab.tuning.expectation import Begun, Expected, expected_epochs, known
from emolab.tuning.halving import halving_epochs
from emolab.tuning.pack import PackSettings
from emolab.tuning.plan import SearchPlan
from emolab.tuning.processes import load_seconds, start_process
from emolab.tuning.settings import TuneSettings

_CALIBRATION_STEPS = 3
_CALIBRATION_DRAWS = 4
_START_SECONDS = 120.0


def calibrate(settings: TuneSettings, plan: SearchPlan, begun: Begun) -> str:
    """Time a few real steps in a process like those of the search; the expectation for people.

    Args:
        begun: how far the search is.

    Raises:
        UserError: the data are of no use.
    """
    started = time.perf_counter()
    pack = PackSettings(base=settings.base().model_dump(mode="json"), robustness=False, limits={})
    actor = start_process(pack, plan.resources)
    try:
        _wait_for_start(actor, plan.resources)
        ray.get(actor.load.remote(), timeout=load_seconds(settings.tuning.timeout_s))
        start_up = time.perf_counter() - started
        draws = sample_configurations(plan.space, _CALIBRATION_DRAWS)
        epoch = ray.get(actor.measure.remote(draws, _CALIBRATION_STEPS))
    except GetTimeoutError:
        seconds = load_seconds(settings.tuning.timeout_s)
        raise UserError(
            f"the process that times the trials did not read {settings.data} within {seconds:g} s"
        ) from None
    except RayTaskError as error:
        raise user_error(error) from None
    except RayError as error:
        raise UserError(f"the process that times the trials was lost ({type(error).__name__})") from None
    finally:
        ray.kill(actor)
    return _expectation(settings, plan, begun, start_up=start_up, epoch_seconds=epoch)


def _wait_for_start(actor: Any, resources: Mapping[str, float]) -> None:
    seconds = start_seconds(_START_SECONDS)
    if not ray.wait([actor.__ray_ready__.remote()], timeout=seconds)[0]:
        raise UserError(
            f"the process that times the trials did not start within {seconds:g} s: {free(resources)}; wait for the "
            "jobs that hold the rest"
        )


def _expectation(
    settings: TuneSettings, plan: SearchPlan, begun: Begun, *, start_up: float, epoch_seconds: list[float]
) -> str:
    tuning, most = settings.tuning, settings.training.epochs
    search = _search_epochs(settings, plan, begun)
    trainings = tuning.final.top * tuning.final.seeds if tuning.final.wanted else 0
    trainings = max(0, trainings - begun.finals)
    final = trainings * most
    mean = sum(epoch_seconds) / len(epoch_seconds)
    searching = search.mean / plan.concurrency * mean
    share = ""
    if tuning.time_budget_s is not None and searching > tuning.time_budget_s:
        share = f"; this call comes to about {tuning.time_budget_s / searching:.0%} of the search"
        searching = tuning.time_budget_s + most * mean  # with what has just begun then
    finals = final / plan.at_once(trainings) * mean if trainings else 0.0
    seconds = start_up + searching + finals + most * mean / plan.final_workers
    spread = "" if len(epoch_seconds) == 1 else f" ({min(epoch_seconds):.2g} to {max(epoch_seconds):.2g})"
    there = f"{begun.trials} trials have ended; " if begun.trials else ""
    learns = f"; more where {tuning.sampler} learns" if tuning.sampler in ("tpe", "gp", "cmaes") else ""
    played = (
        f" ({search.simulations} simulations with random scores: {search.least:.0f} to {search.most:.0f}{learns})"
        if search.simulations
        else ""
    )
    shared = ", less where a step of several takes less than theirs alone" if plan.in_one_step > 1 else ""
    return (
        f"{there}expected: {search.mean:.0f} of at most {max(0, plan.trials - begun.trials) * most} epochs in the "
        f"search{played}{f', {final} in the final' if final else ''}, {most} for the best; "
        f"{mean:.2g} s an epoch{spread} from {_CALIBRATION_STEPS} steps of {len(epoch_seconds)} configuration(s), "
        f"{start_up:.0f} s to start a process: about {_duration(seconds)}{shared}, besides the start of Ray and of the "
        f"last training{share}"
    )


def _search_epochs(settings: TuneSettings, plan: SearchPlan, begun: Begun) -> Expected:
    """Epochs that the search has still to train."""
    tuning, most = settings.tuning, settings.training.epochs
    if tuning.stopping == "halving":
        whole = halving_epochs(plan.trials, plan.rungs, factor=tuning.reduction_factor, epochs=most)
        search = known(max(0, whole - begun.epochs))
    else:
        search = expected_epochs(
            tuning.stopping,
            grace=tuning.grace_epochs,
            factor=tuning.reduction_factor,
            epochs=most,
            rungs=plan.rungs,
            trials=plan.trials,
            ended=begun.trials,
            at_once=plan.concurrency * plan.in_one_step,
        )
    if tuning.epoch_budget is None:
        return search
    left = max(0, tuning.epoch_budget - begun.epochs)
    return replace(search, mean=min(search.mean, left), least=min(search.least, left), most=min(search.most, left))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
