"""Every corruption by name. A module of this package that registers one is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import emolab.robustness.corruptions
from emolab.names import UserError, nearest

Stage = Literal["features", "audio", "frames", "transcript", "recording"]
RATES = tuple(round(0.1 * step, 1) for step in range(1, 11))
SEVERITIES = (1.0, 2.0, 3.0, 4.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One row of the catalogue."""

    name: str
    apply: Callable[..., Any]
    """`features`: (FeatureRequest) -> Observed. `audio`, `frames`, `transcript`, `recording`: (Recording, severity,
    Stream) -> Recording."""
    stage: Stage
    """What it is applied to: the features of a prepared session, or one of the raw signals before preparation."""
    unit: Literal["rate", "severity"]
    """A rate is a fraction and may be any number up to the largest level; a severity is one of the levels."""
    levels: tuple[float, ...]
    """Levels of the protocol, without 0, which is always the identity."""
    source: str
    """Where the protocol comes from."""
    label: str
    """What people call it, in figures and tables."""
    fill: Literal["none", "zero", "last value"] = "none"
    """What stands at a corrupted step. `zero`: the modality is marked absent there, so the model does not read the
    zeros. `last value`: the previous value repeats and is marked present, as a frozen device would deliver it."""
    joint: bool = False
    """Whether the modalities of a cell are corrupted together, each one's outcome depending on the others'."""
    leaves_one: bool = False
    """Whether one of the modalities corrupted together is left at every step."""
    random: bool = True
    """Whether the outcome depends on the seed."""
    validation_only: bool = False
    """Kept for choosing a defence; refused in a suite that reports test results (as in ImageNet-C)."""

    def highest(self, modalities: int) -> float:
        """The highest level that there can be with so many modalities corrupted together."""
        return (modalities - 1) / modalities if self.leaves_one else max(self.levels)

    def check_level(self, level: float) -> None:
        """Refuse a level that the corruption does not have.

        Raises:
            UserError: naming the levels.
        """
        if self.unit == "rate" and not 0.0 <= level <= max(self.levels):
            raise UserError(f"corruption {self.name!r} has no rate {level:g}: give 0 to {max(self.levels):g}")
        if self.unit == "severity" and level != 0 and level not in self.levels:
            allowed = ", ".join(f"{known:g}" for known in (0, *self.levels))
            raise UserError(f"corruption {self.name!r} has no severity {level:g}: give one of {allowed}")


_CORRUPTIONS: dict[str, Corruption] = {}


def register(
    name: str,
    *,
    source: str,
    stage: Stage = "features",
    unit: Literal["rate", "severity"] = "severity",
    levels: tuple[float, ...] | None = None,
    label: str | None = None,
    **traits: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Function decorator: offer a corruption under a name. ``traits`` are the other fields of Corruption.

    Args:
        label: None: the name in words.
    """
    if name in _CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is registered twice")
    chosen = levels if levels is not None else RATES[:9] if unit == "rate" else SEVERITIES

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _CORRUPTIONS[name] = Corruption(
            name=name,
            apply=function,
            stage=stage,
            unit=unit,
            levels=chosen,
            source=source,
            label=label or name.replace("_", " "),
            **traits,
        )
        return function

    return add


def corruptions() -> dict[str, Corruption]:
    """Name -> row of every corruption."""
    for module in pkgutil.iter_modules(emolab.robustness.corruptions.__path__):
        importlib.import_module(f"emolab.robustness.corruptions.{module.name}")
    return dict(sorted(_CORRUPTIONS.items()))


def corruption(name: str) -> Corruption:
    """The row of a corruption.

    Raises:
        UserError: no such corruption.
    """
    if name not in _CORRUPTIONS:
        known = corruptions()
        if name not in known:
            raise UserError(f"unknown corruption {name!r}{nearest(name, known)} (corruptions: {', '.join(known)})")
    return _CORRUPTIONS[name]
