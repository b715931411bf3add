"""What runs inside a trial: the same loop as any training, one epoch a step."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from emolab.names import UserError
from emolab.robustness.objective import missing_rate_area
from emolab.training.data import load_training_data
from emolab.training.distributed import fit_distributed
from emolab.training.loop import run_to_end
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process
from emolab.tuning.searcher import FAILURE, FINISHED
from emolab.tuning.space import configured
from emolab.tuning.study import METRIC, ROBUSTNESS

BASE = "base"
"""Key of a trial's configuration that holds the settings all trials share."""
OBJECTIVES = "objectives"
"""Key of a trial's configuration that holds the names of the objectives."""


class TrainingTrial(ray.tune.Trainable):
    """A trial with one worker: the loop runs in the trial's own process, and the process is reused for the next
    trial, so that imports and data are paid for once."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            report = next(self._epochs)
        except UserError as error:
            return failed(str(error), self._last)
        self._last = report
        result = {**report.metrics(), FINISHED: report.finished, "done": report.finished}
        return result | ({ROBUSTNESS: self._robustness()} if report.finished and self._wants_robustness else {})

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial that is lost is run again with the same parameters."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing was saved."""

    def _begin(self, config: dict[str, Any]) -> None:
        self._config = config
        self._wants_robustness = "robustness" in config[OBJECTIVES]
        self._epochs = _epochs(config)
        self._last: EpochReport | None = None

    def _robustness(self) -> float:
        """Of the weights that the trial keeps, on validation."""
        outcome = run_to_end(self._epochs, lambda _: None)  # it has no epoch left
        settings = trial_settings(self._config)
        data = load_training_data(Path(settings.data))
        model = settings.model.build(data.manifest)
        model.load_state_dict(outcome.weights)
        return missing_rate_area(model.eval(), data.validation, data.manifest)


def _epochs(config: dict[str, Any]) -> Generator[EpochReport, None, Any]:
    """Lazy to its first line, so that a refused configuration ends the trial in ``step``, with its reason."""
    return (yield from epochs_in_process(trial_settings(config)))


def distributed_trial(config: dict[str, Any]) -> None:
    """A trial with several workers: a Ray Train run of its own, which only such a trial has to pay for."""
    settings = trial_settings(config)
    folder = Path(ray.tune.get_context().get_trial_dir())
    try:
        fit_distributed(settings, folder, callbacks=[TuneReportCallback()])
    except UserError as error:
        ray.tune.report(failed(str(error), None))


def trial_settings(config: dict[str, Any]) -> TrainSettings:
    """The configuration of a trial from the shared settings and the drawn parameters.

    Raises:
        UserError: the drawn combination is not a valid configuration.
    """
    base = TrainSettings.model_validate(config[BASE])
    return configured(base, {key: value for key, value in config.items() if key not in (BASE, OBJECTIVES)})


def failed(reason: str, last: EpochReport | None) -> dict[str, Any]:
    """The last result of a trial that cannot go on."""
    return {
        METRIC: float("nan"),
        ROBUSTNESS: float("nan"),
        "epoch": last.epoch if last else 0,
        FAILURE: reason,
        FINISHED: False,
        "done": True,
    }
