"""Population-based training (Jaderberg et al., 2017) by Ray Tune: weak trials go on from the weights of strong ones,
with their parameters shifted.

A trial of it is no fixed configuration but a schedule of them. Members are compared by the weights that they have now:
those are what a weak one takes over. The value of a trial is the score of one of its own epochs, the best or, as the
recipe has it, the last, never one that it has inherited, and what is reported are the parameters of that epoch. Where
they changed is an attribute of the trial; Optuna's own parameters of it are those that it began with.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.tune
import torch
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from emolab.checkpoint import CheckpointFolder
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process
from emolab.tuning.pack import reason_of
from emolab.tuning.recorder import TRACKED, TrialRecorder
from emolab.tuning.space import CategoricalParameter, IntParameter, Parameter, SearchSpace, configured
from emolab.tuning.study import Study
from emolab.tuning.trials import METRIC
from emolab.tuning.workers import BASE, FAILURE, FINISHED, Unsaved

NUMBER = "number"
"""Key of a trial's configuration that holds its number in the study."""
DRAWN, ORIGIN = "drawn", "origin"
"""Keys of a result: the parameters that it was trained with, and the member whose line of weights it goes on."""
SCORE = "validation_macro_f1"
"""Key of a result: the score of the weights after this epoch. The kept ones may be those of an ancestor."""
_LISTED = 100
"""Values of a parameter of which a member may take a neighbour; of more it takes a multiple."""


class PopulationTrial(ray.tune.Trainable):
    """A trial that can hand over its weights and take those of another, by way of the loop's own checkpoints."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._folder = tempfile.TemporaryDirectory(prefix="population-")
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        shutil.rmtree(self._root, ignore_errors=True)
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            report: EpochReport = next(self._epochs)
        except Exception as error:  # whatever it is, it is the end of this trial and of no other
            return {SCORE: -1.0, "epoch": 0, FAILURE: reason_of(error), "done": True}
        described = {DRAWN: self._drawn, ORIGIN: self.config[NUMBER]}
        return {**report.metrics(), **described, FINISHED: report.finished, "done": report.finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        shutil.copytree(self._root, checkpoint_dir, dirs_exist_ok=True)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        assert isinstance(checkpoint, str)
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(checkpoint, self._root)
        self._begin(self.config)

    def cleanup(self) -> None:
        self._folder.cleanup()

    @property
    def _root(self) -> Path:
        return Path(self._folder.name) / "checkpoints"

    def _begin(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self._drawn = {key: value for key, value in config.items() if key not in (BASE, NUMBER)}
        settings = configured(TrainSettings.model_validate(config[BASE]), self._drawn)
        self._epochs = epochs_in_process(settings, checkpoints=CheckpointFolder(self._root))


class SynchronousPopulation(PopulationBasedTraining):
    """All members are compared at the same epoch, by the weights that they have then. Otherwise a weak member whose
    model waits for a CPU is set back to it after every epoch, until that one has got its turn.

    Partners and shifts are drawn anew from the seed at each comparison of a member. Tune draws them from the global
    generators, of which its own loop takes numbers as often as it happens to look for results.
    """

    def __init__(self, *, seed: int, **options: Any) -> None:
        super().__init__(time_attr="epoch", metric=SCORE, mode="max", synch=True, **options)
        self._seeds = np.random.default_rng(seed)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take up a member. Tune adds it again when its process was lost; where it stood among the others stays."""
        if trial not in self._trial_state:
            super().on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Let a member go that has failed for good. Tune counts it among those that live, for which all others wait."""
        super().on_trial_error(tune_controller, trial)
        tune_controller.get_live_trials().discard(trial)

    def _checkpoint_or_exploit(
        self, trial: Trial, tune_controller: Any, upper_quantile: list[Trial], lower_quantile: list[Trial]
    ) -> None:
        seed = int(self._seeds.integers(2**32))
        random.seed(seed)
        np.random.seed(seed)
        super()._checkpoint_or_exploit(trial, tune_controller, upper_quantile, lower_quantile)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next member to train. Where the one that all others wait for has ended, by itself or by a failure, Tune
        would wait for ever: it compares when a member arrives. Then the others go on to the next comparison."""
        chosen = super().choose_trial_to_run(tune_controller)
        live = tune_controller.get_live_trials()
        if chosen is None and live and all(trial.status == Trial.PAUSED for trial in live):
            self._next_perturbation_sync += self._perturbation_interval
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen


class PopulationRecorder(Unsaved, ray.tune.Callback):
    """Tells the study what became of each member, and people where the population stands at each comparison."""

    def __init__(
        self,
        study: Study,
        recorder: TrialRecorder,
        keys: list[str],
        report: Callable[[str], None],
        *,
        interval: int,
        selection: Literal["best", "last"],
    ) -> None:
        self._study, self._recorder, self._keys, self._report = study, recorder, keys, report
        self._interval, self._selection, self._told = interval, selection, 0
        self._ended: set[int] = set()
        self._curves: dict[int, list[dict[str, float]]] = {}
        self._schedules: dict[int, list[dict[str, Any]]] = {}
        self._reached: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._started = time.perf_counter()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        # Remembered at the first start: a member that goes on from another one carries that one's configuration.
        self._numbers.setdefault(trial.trial_id, trial.config[NUMBER])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: object
    ) -> None:
        number, epoch = self._numbers[trial.trial_id], int(result["epoch"])
        if FAILURE in result:
            return
        curve, schedule = self._curves.setdefault(number, []), self._schedules.setdefault(number, [])
        if epoch <= len(curve):  # trained again, by a process that stands in for a lost one
            return
        point = {key: float(result[key]) for key in ("epoch", *TRACKED) if key in result}
        best = curve[-1][METRIC] if curve and self._selection == "best" else -math.inf
        if point[SCORE] > best:
            self._reached[number] = epoch
        curve.append(point | {METRIC: max(point[SCORE], best)})  # of its own epochs: the loop's may be another member's
        # From the result: the trial's own configuration is already the next one where the member was just overtaken.
        drawn = {key: result[DRAWN][key] for key in self._keys}
        origin = int(result[ORIGIN])  # whose line of weights this member goes on; its own until it is overtaken
        if not schedule or schedule[-1]["parameters"] != drawn or schedule[-1]["descends_from"] != origin:
            schedule.append({"epoch": epoch, "descends_from": origin, "parameters": drawn})
        self._study.report(number, epoch, curve[-1][METRIC])
        self._recorder.epochs(number, curve[-1:])
        self._tell_standing(epoch, members=len(trials))

    def _tell_standing(self, epoch: int, *, members: int) -> None:
        """One line, once all that train on have come to an epoch at which they are compared."""
        there = {n: curve for n, curve in self._curves.items() if n not in self._ended and len(curve) >= epoch}
        if epoch % self._interval or epoch <= self._told or len(there) + len(self._ended) < members:
            return
        self._told = epoch
        values = {number: curve[epoch - 1][SCORE] for number, curve in there.items()}
        best = max(values, key=lambda number: values[number])
        self._report(
            f"epoch {epoch} of {len(there)} members: validation macro-F1 {min(values.values()):.4f} to "
            f"{values[best]:.4f} (trial {best})"
        )

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        self._end(trial, (trial.last_result or {}).get(FAILURE) or "")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        self._end(trial, "the trial's process failed")

    def _end(self, trial: Trial, failure: str) -> None:
        number = self._numbers[trial.trial_id]
        self._ended.add(number)
        curves = self._curves.get(number, [])
        self._study.tell(
            number,
            "FAIL" if failure else "COMPLETE",
            [] if failure else [curves[-1][METRIC]],
            reason=failure,
            epochs=len(curves),
            seconds=time.perf_counter() - self._started,
            curves=curves,
            schedule=self._schedules.get(number, []),
            reached=self._reached.get(number),
        )
        self._study.flush()
        record = self._study.record(number)
        self._recorder.ended(record)
        state = "failed" if failure else "complete"
        outcome = failure or f"validation macro-F1 {math.nan if record.value is None else record.value:.4f}"
        self._report(f"trial {number} {state} after {record.epochs} epochs: {outcome}")


def run_population(
    base: TrainSettings,
    study: Study,
    space: SearchSpace,
    recorder: TrialRecorder,
    report: Callable[[str], None],
    *,
    folder: Path,
    trials: int,
    resources: Mapping[str, float],
    interval: int,
    retries: int,
    seed: int,
) -> None:
    """Train a population until the study holds ``trials`` trials.

    Args:
        interval: epochs between the comparisons of a trial with the others.
        retries: how often a member goes on, from where it was last compared, after its process was lost.
        seed: of the partners and shifts of its members.
    """
    members = [study.ask() for _ in range(trials - study.finished())]
    drawn = {draw.number: within(space, draw.parameters) for draw in members}
    for number, parameters in drawn.items():
        recorder.began(number, parameters)
    keys = list(space.parameters)
    ray.tune.Tuner(
        ray.tune.with_resources(PopulationTrial, dict(resources)),
        param_space={
            BASE: base.model_dump(mode="json", exclude={"tracking"}),  # Tune writes it down
            NUMBER: ray.tune.grid_search(list(drawn)),
            **{key: ray.tune.sample_from(_initial(drawn, key)) for key in keys},
        },
        tune_config=ray.tune.TuneConfig(
            scheduler=SynchronousPopulation(
                perturbation_interval=interval,
                hyperparam_mutations=mutations(space),
                custom_explore_fn=lambda config: within(space, config),
                seed=seed,
            ),
            reuse_actors=True,  # how many run at a time is left to their resources: members take turns
        ),
        run_config=ray.tune.RunConfig(
            name=f"population-{os.urandom(3).hex()}",  # Tune's own records; what resumes is the study
            storage_path=str(folder.resolve() / "ray"),
            callbacks=[
                PopulationRecorder(study, recorder, keys, report, interval=interval, selection=base.training.selection)
            ],
            failure_config=ray.tune.FailureConfig(max_failures=retries),
            verbose=0,
        ),
    ).fit()


def _initial(drawn: Mapping[int, Mapping[str, Any]], key: str) -> Callable[[Any], Any]:
    return lambda config: drawn[config[NUMBER]][key]


def mutations(space: SearchSpace) -> dict[str, Any]:
    """Parameter -> from what Tune resamples it: a list, of which it may also take a neighbour, or a range, in which it
    multiplies. In a long list the neighbour of a value would be as good as the value."""
    return {key: _mutation(parameter) for key, parameter in space.parameters.items()}


def _mutation(parameter: Parameter) -> Any:
    values = parameter.values()
    if isinstance(parameter, CategoricalParameter) or (values is not None and len(values) <= _LISTED):
        return list(values or ())
    if isinstance(parameter, IntParameter):
        draw = ray.tune.lograndint if parameter.log else ray.tune.randint
        return draw(parameter.low, parameter.high + 1)
    draw = ray.tune.loguniform if parameter.log else ray.tune.uniform
    return draw(parameter.low, parameter.high)


def within(space: SearchSpace, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its numbers as the space has them: Tune multiplies what it shifts, and does not look at the
    ends of the range; Optuna adds steps up, and what is not exactly in a list has no neighbour there."""
    return {**config, **{key: _nearest(parameter, config[key]) for key, parameter in space.parameters.items()}}


def _nearest(parameter: Parameter, value: Any) -> Any:
    if isinstance(parameter, CategoricalParameter):
        return value
    bounded = min(max(value, parameter.low), parameter.high)
    if parameter.step is None:
        return bounded
    values = parameter.values()
    assert values is not None
    return values[min(round((bounded - parameter.low) / parameter.step), len(values) - 1)]
