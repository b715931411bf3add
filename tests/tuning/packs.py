"""Packs that count, are slow or fail, in a module of their own: the processes of a search import it, and not MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emolab.tuning.pack import Answers, TrialPack


class MortalPack(TrialPack):
    """Dies in the middle of trial 1 once, and of trial 2 whenever it comes to it."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        flag = Path(self._base.output) / "died"
        number = draws[0][0]
        if number == 2 or (number == 1 and not flag.exists()):
            super().advance(draws, 3, told)
            flag.touch()
            os._exit(1)
        return super().advance(draws, until, told)


class DrowsyPack(TrialPack):
    """Falls asleep in trial 0 for good."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        if draws[0][0] == 0:
            time.sleep(600)
        return super().advance(draws, until, told)


class StuckPack(TrialPack):
    """Never comes to the end of the data."""

    def load(self) -> int:
        time.sleep(600)
        return super().load()


class CountingPack(TrialPack):
    """Writes down every epoch that is trained."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        answers = super().advance(draws, until, told)
        with (Path(self._base.output) / "trained").open("a") as file:
            for number, answer in answers.items():
                file.writelines(f"{number} {report.epoch}\n" for report in answer.reports)
        return answers


class DyingPack(TrialPack):
    """Dies the first time that a trial goes on from a rung."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        flag = Path(self._base.output) / "died"
        if until == 3 and not flag.exists():
            flag.touch()
            os._exit(1)
        return super().advance(draws, until, told)
