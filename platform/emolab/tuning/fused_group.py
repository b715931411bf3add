"""Trials of one process that train in one fused step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emolab.names import UserError
from emolab.training.data import load_training_data
from emolab.training.fused import FusedTraining
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.training.train import training_device
from emolab.tuning.pack import ANSWER_SECONDS, Answer, Answers, Group, check_unspoiled, reason_of
from emolab.tuning.space import configured


class FusedTrials(Group):
    """Configurations that share their shapes. They are at the same epoch always; one that ends leaves the group."""

    def __init__(self, draws: Sequence[tuple[int, Mapping[str, Any]]], base: TrainSettings) -> None:
        self.numbers = {number for number, _ in draws}
        self._draws, self._base = draws, base
        self._training: FusedTraining | None = None

    def keep(self, numbers: Sequence[int]) -> None:
        self.numbers &= set(numbers)
        if self._training is not None:
            self._training.keep(list(self.numbers))

    def advance(self, until: int) -> Answers:
        answers: Answers = {}
        reports: dict[int, list[EpochReport]] = {}
        started = time.perf_counter()
        try:
            training = self._training = self._training or self._begin(answers)
            while training is not None and training.numbers:
                for number, report in training.epoch().items():
                    if isinstance(report, UserError):
                        answers[number] = Answer(reports=reports.pop(number, []), failure=str(report))
                    else:
                        reports.setdefault(number, []).append(report)
                if self._decide(reports, until) or time.perf_counter() - started > ANSWER_SECONDS:
                    break
        except Exception as error:  # of what all share; a group that does not fit is nobody's end
            check_unspoiled(error)
            crowded = isinstance(error, torch.OutOfMemoryError)
            failure = "" if crowded else reason_of(error)
            for number in self.numbers - set(answers):
                answers[number] = Answer(reports=reports.get(number, []), failure=failure, crowded=crowded)
            return answers
        return answers | {number: Answer(reports=mine) for number, mine in reports.items()}

    def _begin(self, answers: Answers) -> FusedTraining | None:
        """The members at their first epoch; the answers get those whose configuration is refused."""
        members: dict[int, TrainSettings] = {}
        for number, parameters in self._draws:
            try:
                members[number] = configured(self._base, parameters)
            except UserError as error:
                answers[number] = Answer(failure=str(error))
        data = load_training_data(Path(self._base.data))
        return FusedTraining(members, data, training_device(self._base)) if members else None

    @staticmethod
    def _decide(reports: Mapping[int, Sequence[EpochReport]], until: int) -> bool:
        """Whether a member has reached a decision or its end."""
        return any(mine[-1].finished or mine[-1].epoch >= until for mine in reports.values())
