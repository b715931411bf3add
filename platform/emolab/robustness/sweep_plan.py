"""A sweep cut into units of work, each of which leaves one file.

Units are planned from the data, the suite and the code that evaluates: the same files, whatever the number of actors
and however often the sweep was interrupted, and others once that code has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import edu_emotionnet
import emolab
from emolab.checkpoint import MANIFEST
from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.robustness.cells import Cell
from emolab.sessions.manifest import read_manifest
from emolab.training.made_for import check_made_for
from emolab.training.train import load_model

SESSIONS_PER_UNIT = 64
CELLS_PER_UNIT = 256
_SOURCES = ("robustness", "sessions", "scores.py", "studies/robustness.py", "studies/robustness_results.py")
"""What makes the cells' figures out of models and sessions, beside the models' own package; the last two sum them up,
so that a sweep's metrics, table and page are of one code."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work."""

    model: int
    """Position among the models."""
    sessions: range
    cells: range
    """Empty for the one unit of a model that measures how its confidence agrees with the true quality."""
    file: str


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Everything that decides a sweep's results."""

    models: tuple[Path, ...]
    """Folders of kept models."""
    data: Path
    split: Split
    cells: tuple[Cell, ...]
    units: tuple[Unit, ...]
    bfloat16: bool = False
    """Whether encoders that can be factorised compute in bfloat16."""
    gpus: float = 0.0
    """Share of a GPU for each evaluating process; 0: they compute on CPUs."""


def plan_sweep(
    models: Sequence[Path],
    data: Path,
    split: Split,
    cells: Sequence[Cell],
    *,
    sessions_per_unit: int = SESSIONS_PER_UNIT,
    cells_per_unit: int = CELLS_PER_UNIT,
    bfloat16: bool = False,
    gpus: float = 0.0,
) -> SweepPlan:
    """Cut a sweep into units.

    Raises:
        UserError: the split is empty or has no labels, or a model was made for other data.
    """
    manifest = read_manifest(data)
    summary = manifest.splits.get(split)
    if summary is None or not summary.sessions or not sum(summary.label_counts):
        raise UserError(f"{data} has no labelled sessions in its {split} split")
    units = []
    for number, folder in enumerate(models):
        check_made_for(load_model(folder)[1].state["dataset"], manifest, model=str(folder), where=data)
        evaluated = [code_digest(), _digest(folder), manifest.digest, split]
        evaluated += ["bfloat16"] if bfloat16 else []
        evaluated += ["gpu"] if gpus else []  # rounds differently: the parts of a sweep are of one kind
        for first in range(0, summary.sessions, sessions_per_unit):
            for start in range(0, len(cells), cells_per_unit):
                sessions = range(first, min(first + sessions_per_unit, summary.sessions))
                some = range(start, min(start + cells_per_unit, len(cells)))
                content = [*evaluated, repr(sessions), *(repr(cells[i]) for i in some)]
                units.append(Unit(model=number, sessions=sessions, cells=some, file=f"{_name(content)}.parquet"))
        everything = range(summary.sessions)
        units.append(Unit(model=number, sessions=everything, cells=range(0), file=f"{_name(evaluated)}.json"))
    return SweepPlan(
        models=tuple(models),
        data=data,
        split=split,
        cells=tuple(cells),
        units=tuple(units),
        bfloat16=bfloat16,
        gpus=gpus,
    )


@cache
def code_digest() -> str:
    """SHA-256 over the sources that decide what a sweep finds."""
    platform, models = Path(emolab.__file__).parent, Path(edu_emotionnet.__file__).parent
    digest = hashlib.sha256()
    for source in (*(platform / name for name in _SOURCES), models):
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(source.parent)} {content}\n".encode())
    return digest.hexdigest()


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _name(content: Sequence[str]) -> str:
    """A file's name out of all that decides its content."""
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:24]
