"""What a promotion found: one result per gate, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

Outcome = Literal["passed", "failed", "missing evidence", "not applicable"]
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Evidence that is not there."""

    reason: str
    """What is missing, and what would bring it."""


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate and what decided it."""

    name: str
    outcome: Outcome
    value: float | None
    """What was found; None where nothing was, or where it is no number."""
    threshold: float | None
    sentence: str
    """The same for people, in one sentence."""
    runs: tuple[str, ...] = ()
    """Ids of the runs that hold the evidence."""

    @property
    def stands_in_the_way(self) -> bool:
        return self.outcome in ("failed", "missing evidence")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All gates of one challenger."""

    model: str
    """Registered name."""
    version: str
    champion: str | None
    """Version that it was held against; None for a first model."""
    dataset: str
    """Digest."""
    gates: tuple[GateResult, ...]
    run_id: str
    """Of the promotion; `untracked` for a dry run."""
    judged: str
    """UTC."""
    machine: Mapping[str, Any]
    """Where latency was measured."""
    openings: Mapping[str, int]
    """How often this test split has been looked at, by anyone: `models` and `sweeps`."""

    @property
    def passed(self) -> bool:
        """Nothing stands in the way, and something was asked for."""
        asked = any(gate.outcome == "passed" for gate in self.gates)
        return asked and not any(gate.stands_in_the_way for gate in self.gates)

    @property
    def obstacles(self) -> Sequence[GateResult]:
        return [gate for gate in self.gates if gate.stands_in_the_way]

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        against = f"champion version {self.champion}" if self.champion else "no champion"
        if self.passed:
            return f"{self.model} version {self.version} passes every gate ({against})"
        names = ", ".join(gate.name for gate in self.obstacles)
        return f"{self.model} version {self.version} is refused ({against}): {names}"

    def record(self) -> dict[str, Any]:
        """JSON values of the whole verdict."""
        return asdict(self) | {"passed": self.passed, "summary": self.summary}


def bounded(
    name: str,
    evidence: Found | Missing,
    read: Callable[[Found], tuple[float, str]],
    *,
    least: float | None = None,
    most: float | None = None,
    runs: tuple[str, ...],
    unit: str = "",
) -> GateResult:
    """A value that must reach, or not exceed, its limit; a value that is not a number does neither."""
    limit = least if least is not None else most
    if limit is None:
        return not_asked(name)
    if isinstance(evidence, Missing):
        return missing(name, evidence, runs, limit=limit)
    value, told = read(evidence)
    passed = value >= limit if least is not None else value <= limit
    shown = f"{limit:g} {unit}".strip()
    return GateResult(
        name=name,
        outcome="passed" if passed else "failed",
        value=value if np.isfinite(value) else None,
        threshold=limit,
        sentence=f"{told}; {'at least' if least is not None else 'at most'} {shown} is asked for.",
        runs=runs,
    )


def decided(name: str, passed: bool, sentence: str, runs: tuple[str, ...]) -> GateResult:
    return GateResult(
        name=name, outcome="passed" if passed else "failed", value=None, threshold=None, sentence=sentence, runs=runs
    )


def missing(name: str, absent: Missing, runs: Sequence[str], *, limit: float | None = None) -> GateResult:
    names_version = absent.reason.startswith("models:/")  # an address, which keeps its letters as they are
    sentence = absent.reason if names_version else absent.reason[0].upper() + absent.reason[1:]
    return GateResult(
        name=name, outcome="missing evidence", value=None, threshold=limit, sentence=f"{sentence}.", runs=tuple(runs)
    )


def not_applicable(name: str, sentence: str) -> GateResult:
    return GateResult(name=name, outcome="not applicable", value=None, threshold=None, sentence=sentence)


def not_asked(name: str) -> GateResult:
    return not_applicable(name, "The gates file does not ask for this.")


def times(count: int) -> str:
    """A count in words."""
    return "once" if count == 1 else f"{count} times"


def moment(iso: str) -> str:
    """A UTC time as people read it, to the minute; whatever is no time stays as it is."""
    date, separator, clock = iso.partition("T")
    return f"{date} {clock[:5]} UTC" if separator else iso
