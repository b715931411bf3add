"""Metrics from confusion counts: integers add up exactly, so a score does not depend on who counted what."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from emolab.scores import accuracy, class_f1, macro_f1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one model on one split."""

    confusion: NDArray[np.int64]
    """(K, K) counts of steps, rows true, columns predicted."""
    loss: float
    cross_entropy: float

    @property
    def accuracy(self) -> float:
        return float(accuracy(self.confusion))

    @property
    def class_f1(self) -> NDArray[np.float64]:
        """(K,) F1 of every class."""
        return class_f1(self.confusion)

    @property
    def macro_f1(self) -> float:
        return float(macro_f1(self.confusion))

    def scores(self, prefix: str) -> dict[str, float]:
        """Flat names for a tracker."""
        return {
            f"{prefix}_accuracy": self.accuracy,
            f"{prefix}_macro_f1": self.macro_f1,
            f"{prefix}_loss": self.loss,
            f"{prefix}_cross_entropy": self.cross_entropy,
        }


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What is known after an epoch."""

    epoch: int
    """Number of finished epochs."""
    train_loss: float
    train_cross_entropy: float
    train_smoothness: float
    validation_loss: float | None
    validation_cross_entropy: float | None
    validation_accuracy: float | None
    validation_macro_f1: float | None
    best_macro_f1: float | None
    best_epoch: int
    kept_macro_f1: float | None
    """Validation macro-F1 of the weights that would be kept if training ended here."""
    learning_rate: float
    sessions_per_second: float
    finished: bool
    """Whether the run ends here: all epochs done, or early stopping."""
    workers: int = 1
    """That trained this epoch; with elastic training it may change from one to the next."""

    def metrics(self) -> dict[str, float]:
        """The numbers that exist, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "finished"}
        return {name: float(value) for name, value in values.items() if value is not None}
