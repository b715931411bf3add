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
from emolab.tuning.pack import ANSWER_SECONDS, Answer, Answers, Group, reason_of
from emolab.tuning.space import configured


class FusedTrials(Group):
    """Configurations that share their shapes. They are at the same epoch always; one that ends leaves the group."""

    def __init__(self, draws: Sequence[tuple[int, Mapping[str, Any]]], base: TrainSettings) -> None:
        self._early: Answers = {}
        members: dict[int, TrainSettings] = {}
        for number, parameters in draws:
            try:
                members[number] = configured(base, parameters)
            except UserError as error:
                self._early[number] = Answer(failure=str(error))
        self.numbers = {number for number, _ in draws}
        device = torch.device("cuda" if base.workers.gpus and torch.cuda.is_available() else "cpu")
        self._training = FusedTraining(members, load_training_data(Path(base.data)), device) if members else None

    def keep(self, numbers: Sequence[int]) -> None:
        self.numbers &= set(numbers)
        if self._training is not None:
            self._training.keep(list(self.numbers))

    def advance(self, until: int) -> Answers:
        answers, self._early = self._early, {}
        started = time.perf_counter()
        reports: dict[int, list[EpochReport]] = {}
        while self._training is not None and self._training.numbers:
            try:
                found = self._training.epoch()
            except Exception as error:  # of the step that all share
                failed = {
                    number: Answer(reports=reports.get(number, []), failure=reason_of(error))
                    for number in self._training.numbers
                }
                return answers | failed
            for number, report in found.items():
                if isinstance(report, UserError):
                    answers[number] = Answer(reports=reports.pop(number, []), failure=str(report))
                else:
                    reports.setdefault(number, []).append(report)
            if self._decide(reports, until) or time.perf_counter() - started > ANSWER_SECONDS:
                break
        return answers | {number: Answer(reports=mine) for number, mine in reports.items()}

    @staticmethod
    def _decide(reports: Mapping[int, Sequence[EpochReport]], until: int) -> bool:
        """Whether a member has reached a decision or its end."""
        return any(mine[-1].finished or mine[-1].epoch >= until for mine in reports.values())
