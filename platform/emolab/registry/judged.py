"""What a promotion hands on to those who write it down and those who draw it."""

from __future__ import annotations

from dataclasses import dataclass

from emolab.registry.evidence import Evidence
from emolab.registry.gates import Gates
from emolab.registry.measurement import Served
from emolab.registry.verdict import Missing, Verdict


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A verdict with all that it rests on."""

    verdict: Verdict
    gates: Gates
    challenger: Evidence
    champion: Evidence | None
    served: Served | Missing
