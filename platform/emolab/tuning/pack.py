"""The process in which trials run one after another: imports and data are paid for once, a trial only for itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emolab.checkpoint import Checkpoints
from emolab.names import UserError
from emolab.training.data import load_training_data
from emolab.training.loop import run_to_end
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process, training_device
from emolab.tuning.pausing import paused_trial
from emolab.tuning.space import configured

ANSWER_SECONDS = 5.0
"""A process answers when a decision is due, and at the latest after the epoch that ends this much later."""
_LATENCY_RUNS = 9
_DEVICE_TROUBLE = ("CUDA error", "CUDA driver error", "HIP error", "_STATUS_")
"""In the messages of errors that come from a GPU or its libraries and have no type of their own."""


class SpoiledProcessError(Exception):
    """The GPU has failed in this process, in which it may fail from then on, whatever is trained."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one trial since the last answer."""

    reports: list[EpochReport] = field(default_factory=list)
    failure: str = ""
    crowded: bool = False
    """The memory was too small for the trials that trained in one step: with fewer of them, or alone, it may go on."""
    excess: dict[str, float] = field(default_factory=dict)
    """Limit -> by how much the model exceeds it; with the first answer of a trial only."""
    robustness: float | None = None
    """Of the weights the trial keeps, when it has finished and this is an objective."""


Answers = dict[int, Answer]


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What all trials of a process share; plain values, since it travels to another process."""

    base: dict[str, Any]
    """``TrainSettings`` of every trial."""
    robustness: bool
    limits: dict[str, float]
    study: str | None = None
    """Folder of the study, where trials pause at the rungs."""
    rungs: tuple[int, ...] = ()


class TrialPack:
    """Runs trials. Its methods are called from the driver, one at a time (it is a Ray actor there)."""

    def __init__(self, settings: PackSettings) -> None:
        self._settings = settings
        self._base = TrainSettings.model_validate(settings.base)
        self._group: Group | None = None
        torch.set_num_threads(max(1, int(self._base.workers.cpus)))

    def load(self) -> int:
        """Read the data; returns how many sessions there are to train on.

        Raises:
            UserError: they are missing or damaged.
        """
        return len(load_training_data(Path(self._base.data)).train)

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        """Train these trials, (number, parameters), until an epoch, their end, or ``ANSWER_SECONDS`` have passed.

        Trials that this process is at go on, and those of them that are not named any more are forgotten; others
        begin, or go on from where they paused.

        Args:
            told: the last epoch that the driver knows of.

        Raises:
            SpoiledProcessError: the trials can go on in another process only.
        """
        numbers = [number for number, _ in draws]
        if self._group is None or not set(numbers) <= self._group.numbers:
            self._group = None  # its memory is free before the next model is built
            self._group = begin(draws, self._base, self._settings, told)
        self._group.keep(numbers)
        answers = self._group.advance(until)
        if any(answer.crowded for answer in answers.values()):
            self._group = None
        return answers

    def measure(self, draws: Sequence[dict[str, Any]], steps: int) -> list[float]:
        """Seconds an epoch of each of these configurations takes here, from a few steps of each."""
        from emolab.tuning.calibration import epoch_seconds

        return [epoch_seconds(configured(self._base, parameters), steps=steps) for parameters in draws]


class Group:
    """Trials that a process trains together."""

    numbers: set[int]

    def keep(self, numbers: Sequence[int]) -> None:
        """Forget the others."""
        raise NotImplementedError

    def advance(self, until: int) -> Answers:
        """As ``TrialPack.advance``."""
        raise NotImplementedError


def begin(
    draws: Sequence[tuple[int, Mapping[str, Any]]], base: TrainSettings, settings: PackSettings, told: int
) -> Group:
    """The trials at their first epoch, or where they paused; one in the ordinary loop, several in a fused one."""
    if len(draws) == 1:
        return Alone(*draws[0], base, settings, told)
    from emolab.tuning.fused_group import FusedTrials

    return FusedTrials(draws, base)


class Alone(Group):
    """One trial in the loop that all training uses."""

    def __init__(
        self, number: int, parameters: Mapping[str, Any], base: TrainSettings, settings: PackSettings, told: int
    ) -> None:
        self.numbers = {number}
        self._told = told
        self._untold: deque[EpochReport] = deque()
        self._number, self._parameters, self._base, self._settings = number, parameters, base, settings
        self._epochs: Any = None

    def keep(self, numbers: Sequence[int]) -> None:
        """There is nobody else."""

    def advance(self, until: int) -> Answers:
        reports: list[EpochReport] = []
        excess: dict[str, float] = {}
        started = time.perf_counter()
        try:
            if self._epochs is None:
                chosen = configured(self._base, self._parameters)
                excess = excess_over(chosen, self._settings.limits)
                if any(value > 0 for value in excess.values()):
                    return {self._number: Answer(excess=excess)}
                self._epochs = self._begin(chosen)
            while not reports or not (reports[-1].finished or reports[-1].epoch >= until or _due(started)):
                reports.append(self._untold.popleft() if self._untold else next(self._epochs))
            robustness = self._robustness() if reports[-1].finished and self._settings.robustness else None
        except Exception as error:  # whatever else it is, it is the end of this trial and of no other
            check_unspoiled(error)
            return {self._number: Answer(reports=reports, excess=excess, failure=reason_of(error))}
        return {self._number: Answer(reports=reports, excess=excess, robustness=robustness)}

    def _begin(self, chosen: TrainSettings) -> Any:
        checkpoints = self._paused()
        newest = checkpoints.newest() if checkpoints is not None else None
        if newest is not None:  # it may be ahead of a driver that was killed and began anew
            past = (EpochReport(**report) for report in newest.state["reports"])
            self._untold = deque(report for report in past if report.epoch > self._told)
        return epochs_in_process(chosen, checkpoints=checkpoints)

    def _paused(self) -> Checkpoints | None:
        where, rungs = self._settings.study, self._settings.rungs
        if where is None or not rungs:
            return None
        return paused_trial(Path(where), self._number, self._parameters, self._base, rungs)

    def _robustness(self) -> float:
        outcome = run_to_end(self._epochs, lambda _: None)  # it has no epoch left
        return robustness_of(configured(self._base, self._parameters), outcome.weights)


def robustness_of(settings: TrainSettings, weights: Mapping[str, torch.Tensor]) -> float:
    """Area under the missing-rate curve of some weights, on validation."""
    from emolab.robustness.objective import missing_rate_area

    data = load_training_data(Path(settings.data))
    model = settings.model.build(data.manifest)
    model.load_state_dict(dict(weights))
    return missing_rate_area(model.eval(), data.validation, data.manifest)


def excess_over(settings: TrainSettings, limits: Mapping[str, float]) -> dict[str, float]:
    """By how much a configuration's model exceeds each limit; negative where it stays below."""
    if not limits:
        return {}
    data = load_training_data(Path(settings.data))
    device = training_device(settings)
    model = settings.model.build(data.manifest).to(device).eval()
    measures = {
        "parameters": lambda: float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
        "latency_ms": lambda: 1000.0 * _latency(model, data.validation.batch([0]).to(device), device),
    }
    return {name: measures[name]() - limit for name, limit in limits.items()}


@torch.inference_mode()
def _latency(model: torch.nn.Module, batch: Any, device: torch.device) -> float:
    """Median seconds of a forward pass over one session that lies on the device."""
    seconds = []
    for _ in range(_LATENCY_RUNS):
        _wait_for(device)
        started = time.perf_counter()
        model(batch)
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[_LATENCY_RUNS // 2]


def _wait_for(device: torch.device) -> None:
    """A GPU goes on after its caller was answered."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_unspoiled(error: Exception) -> None:
    """
    Raises:
        SpoiledProcessError: the error is one of the GPU. That its memory is too small is one of the trial.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return
    if isinstance(error, torch.AcceleratorError) or any(trouble in str(error) for trouble in _DEVICE_TROUBLE):
        raise SpoiledProcessError(f"the GPU failed ({reason_of(error)})") from None


def reason_of(error: Exception) -> str:
    """An error as one line; a user's mistake without its type."""
    line = " ".join(str(error).split())[:300]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def _due(started: float) -> bool:
    return time.perf_counter() - started > ANSWER_SECONDS
