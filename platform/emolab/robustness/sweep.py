"""A sweep at scale: units of work on Ray actors that hold the models and the sessions, each unit done once.

A unit is one model, some sessions and some cells. Its result is a file that appears whole, so a sweep that is run
again computes only the units whose file is missing. Units are planned from the data and the suite alone: the same
files, whatever the number of actors and however often the sweep was interrupted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from emolab.checkpoint import MANIFEST
from emolab.cluster import require, worker_environment
from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.robustness.cells import Cell
from emolab.robustness.corruptions.observed import Surroundings, choose_donor
from emolab.robustness.engine import best_engine
from emolab.robustness.metrics import weight_quality_correlation
from emolab.robustness.records import read_tally, write_tally
from emolab.robustness.tally import Tally, evaluate_sessions, joined
from emolab.sessions.loading import SessionStore, load_split
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.training.train import load_model

SESSIONS_PER_UNIT = 64
CELLS_PER_UNIT = 256
SESSIONS_PER_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work."""

    model: int
    """Position among the models."""
    sessions: range
    cells: range
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


def plan_sweep(models: Sequence[Path], data: Path, split: Split, cells: Sequence[Cell]) -> SweepPlan:
    """Cut a sweep into units.

    Raises:
        UserError: the split is empty, or a model was made for other features or classes than the data have.
    """
    manifest = read_manifest(data)
    sessions = manifest.splits[split].sessions if split in manifest.splits else 0
    if not sessions:
        raise UserError(f"{data} has no sessions in its {split} split")
    for folder in models:
        _check_fit(folder, manifest, data)
    units = []
    for number, folder in enumerate(models):
        for first in range(0, sessions, SESSIONS_PER_UNIT):
            for start in range(0, len(cells), CELLS_PER_UNIT):
                some = range(start, min(start + CELLS_PER_UNIT, len(cells)))
                content = [_digest(folder), manifest.digest, split, str(first), *(cells[i].id for i in some)]
                name = hashlib.sha256("\n".join(content).encode()).hexdigest()[:24]
                span = range(first, min(first + SESSIONS_PER_UNIT, sessions))
                units.append(Unit(model=number, sessions=span, cells=some, file=f"{name}.parquet"))
    return SweepPlan(models=tuple(models), data=data, split=split, cells=tuple(cells), units=tuple(units))


def run_sweep(plan: SweepPlan, folder: Path, *, report: Callable[[str], None], actors: int | None = None) -> int:
    """Compute the units whose result is not in the folder yet; Ray must be connected.

    Returns:
        The number of units computed now.

    Raises:
        UserError: no CPU to run on, or what the evaluation refuses.
    """
    missing = [unit for unit in plan.units if not (folder / unit.file).exists()]
    done = len(plan.units) - len(missing)
    if done:
        report(f"{done} of {len(plan.units)} units are done already")
    if not missing:
        return 0
    require({"CPU": 1.0}, purpose="a robustness sweep")
    folder.mkdir(parents=True, exist_ok=True)
    count = min(actors or int(ray.cluster_resources()["CPU"]), len(missing))
    environment = {"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}}
    evaluators = [Evaluator.options(runtime_env=environment).remote(plan, folder.resolve()) for _ in range(count)]
    started, queue = time.monotonic(), list(missing)
    running = {evaluator.evaluate.remote(queue.pop(0)): evaluator for evaluator in evaluators}
    finished = 0
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        evaluator = running.pop(ready)
        ray.get(ready)
        finished += 1
        if queue:
            running[evaluator.evaluate.remote(queue.pop(0))] = evaluator
        left = (time.monotonic() - started) / finished * (len(missing) - finished)
        report(f"unit {done + finished} of {len(plan.units)}, about {left:.0f} s left")
    return finished


def read_sweep(plan: SweepPlan, folder: Path) -> list[Tally]:
    """One tally per model, over all sessions and cells.

    Raises:
        UserError: a unit is missing or damaged.
    """
    tallies = []
    for number in range(len(plan.models)):
        units = [unit for unit in plan.units if unit.model == number]
        groups = dict.fromkeys((unit.cells.start, unit.cells.stop) for unit in units)
        parts = []
        for start, stop in groups:
            mine = [unit for unit in units if unit.cells.start == start]
            parts.append(joined([read_tally(folder / unit.file, plan.cells[start:stop]) for unit in mine]))
        tallies.append(_stacked(parts))
    return tallies


@ray.remote(num_cpus=1)
class Evaluator:
    """Holds the sessions and the models it has met; both are read once."""

    def __init__(self, plan: SweepPlan, folder: Path) -> None:
        torch.set_num_threads(1)
        self.plan, self.folder = plan, folder
        self.manifest = read_manifest(plan.data)
        self.store = load_split(plan.data, self.manifest, plan.split)
        self.surroundings = surroundings_of(self.store, self.manifest)
        self.models: dict[int, nn.Module] = {}

    def evaluate(self, unit: Unit) -> None:
        """Compute a unit and write its file."""
        if unit.model not in self.models:
            self.models[unit.model] = load_model(self.plan.models[unit.model])[0]
        tally = evaluate_sessions(
            self.models[unit.model],
            [
                [self.store.session(i, self.manifest) for i in unit.sessions[first : first + SESSIONS_PER_BATCH]]
                for first in range(0, len(unit.sessions), SESSIONS_PER_BATCH)
            ],
            self.plan.cells[unit.cells.start : unit.cells.stop],
            surroundings=self.surroundings,
        )
        write_tally(self.folder / unit.file, tally)


def surroundings_of(store: SessionStore, manifest: Manifest) -> Surroundings:
    """Training statistics, and donors out of the sessions that are evaluated."""
    ids = sorted(store.session_ids)
    position = {name: index for index, name in enumerate(store.session_ids)}
    return Surroundings(
        std={name: np.asarray(values) for name, values in manifest.statistics.std.items()},
        donor=lambda session_id, seed: store.session(position[choose_donor(session_id, seed, ids)], manifest),
    )


@ray.remote(num_cpus=1)
def confidence_agreement(folder: Path, data: Path, split: Split) -> dict[str, float]:
    """Modality -> Spearman correlation of its weight with its true quality, over the clean steps at which it was
    observed; empty where the model has no weights or the corpus does not know the quality."""
    torch.set_num_threads(1)
    model, _ = load_model(folder)
    manifest = read_manifest(data)
    store = load_split(data, manifest, split)
    weights: dict[str, list[Any]] = {name: [] for name in manifest.dimensions}
    qualities: dict[str, list[Any]] = {name: [] for name in manifest.dimensions}
    for index in range(len(store)):
        session = store.session(index, manifest)
        with torch.no_grad():
            confidence = model(store.batch([index])).confidence
        if confidence is None or not session.quality:
            return {}
        for column, name in enumerate(session.features):
            seen = session.present[name]
            weights[name].append(confidence[0, :, column].numpy()[seen])
            qualities[name].append(session.quality[name][seen])
    return {
        name: weight_quality_correlation(np.concatenate(weights[name]), np.concatenate(qualities[name]))
        for name in weights
    }


def engine_of(folder: Path) -> str:
    """Which engine evaluates a model."""
    return best_engine(load_model(folder)[0])


def _check_fit(folder: Path, manifest: Manifest, data: Path) -> None:
    _, saved = load_model(folder)
    made_for = saved.state["dataset"]
    if made_for["dimensions"] != manifest.dimensions or made_for["classes"] != manifest.classes:
        raise UserError(
            f"{folder} takes {made_for['dimensions']} and tells {', '.join(made_for['classes'])}; "
            f"{data} has {manifest.dimensions} and {', '.join(manifest.classes)}"
        )


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _stacked(parts: Sequence[Tally]) -> Tally:
    """Tallies of different cells on the same sessions, as one."""
    weights = [part.weight for part in parts if part.weight is not None]
    return Tally(
        cells=tuple(cell for part in parts for cell in part.cells),
        session_ids=parts[0].session_ids,
        speaker_ids=parts[0].speaker_ids,
        confusion=np.concatenate([part.confusion for part in parts]),
        calibration=np.concatenate([part.calibration for part in parts]),
        squared_error=np.concatenate([part.squared_error for part in parts]),
        weight=np.concatenate(weights) if len(weights) == len(parts) else None,
        engine=parts[0].engine,
    )
