"""Which trials train in one step, and how many of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emolab.tuning.space import SHAPE_FREE


def shape(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that trials of one step must share."""
    return {key: value for key, value in parameters.items() if key not in SHAPE_FREE or key == "training.seed"}


def in_one_step(most: int, *, trials: int, processes: int) -> int:
    """How many trials one process trains in one step, so that no other is left without any.

    Args:
        most: that a step may have.
        trials: that have not ended, those that are trained now included.
    """
    return max(1, min(most, -(-trials // processes)))
