"""A sweep at scale: units of work on Ray actors that hold the models and the sessions, each unit done once.

A unit is one model, some sessions and some cells. Its result is a file that appears whole, so a sweep that is run
again computes only the units whose file is missing. Units are planned from the data and the suite alone: the same
files, whatever the number of actors and however often the sweep was interrupted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from torch import nn

from emolab.checkpoint import MANIFEST
from emolab.cluster import require, user_error, worker_environment
from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.robustness.cells import Cell
from emolab.robustness.corruptions.observed import Surroundings, choose_donor
from emolab.robustness.engine import best_engine
from emolab.robustness.metrics import weight_quality_correlation
from emolab.robustness.records import read_agreement, read_tally, write_agreement, write_tally
from emolab.robustness.tally import Tally, evaluate_sessions, joined
from emolab.sessions.loading import SessionStore, load_split
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.training.train import load_model

SplitLoader = Callable[[Path, Manifest, Split], SessionStore]
"""How an evaluating process reads the sessions of a sweep."""

SESSIONS_PER_UNIT = 64
CELLS_PER_UNIT = 256
SESSIONS_PER_BATCH = 16
_RECONNECT_SECONDS = 0.5
"""Pause before an evaluator that could not be reached is tried again."""
STALL_SECONDS = 3600.0
"""A sweep in which nothing is finished for so long is ended; what it has done stays."""


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
        UserError: the split is empty or has no labels, or a model was made for other features or classes.
    """
    manifest = read_manifest(data)
    summary = manifest.splits.get(split)
    if summary is None or not summary.sessions or not sum(summary.label_counts):
        raise UserError(f"{data} has no labelled sessions in its {split} split")
    units = []
    for number, folder in enumerate(models):
        _check_fit(folder, manifest, data)
        evaluated = [version("edu-emotionnet-lab"), _digest(folder), manifest.digest, split]
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


def load_selection_split(folder: Path, manifest: Manifest, split: Split) -> SessionStore:
    """Sessions of a split that models may be chosen by.

    Raises:
        UserError: the split is the test split, which only a robustness study opens, and records it.
    """
    if split == "test":
        raise UserError("the test split is opened by a robustness study alone, which records it")
    return load_split(folder, manifest, split)


def run_sweep(
    plan: SweepPlan,
    folder: Path,
    *,
    report: Callable[[str], None],
    actors: int | None = None,
    opening: Callable[[], SplitLoader] = lambda: load_selection_split,
    stall_seconds: float = STALL_SECONDS,
) -> int:
    """Compute the units whose result is not in the folder yet, or is damaged; Ray must be connected.

    Args:
        actors: processes at a time; as many as there are CPUs, or shares of GPUs, where None, and never more.
        opening: called once, where there is something to compute, before any session is read.
        stall_seconds: longest time in which nothing at all is finished.

    Returns:
        The number of units computed now.

    Raises:
        UserError: no CPU or GPU to run on, a process that was lost again and again, nothing finished for too long, or
            what the evaluation refuses.
    """
    missing = [unit for unit in plan.units if not _usable(unit, plan, folder, report)]
    done = len(plan.units) - len(missing)
    if done:
        report(f"{done} of {len(plan.units)} units are done already")
    if not missing:
        return 0
    needs = {"CPU": 1.0} | ({"GPU": plan.gpus} if plan.gpus else {})
    require(needs, purpose="a robustness sweep")
    folder.mkdir(parents=True, exist_ok=True)
    room = min(int(ray.cluster_resources()[name] / amount) for name, amount in needs.items())
    environment = {"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}}
    start = Evaluator.options(num_gpus=plan.gpus, runtime_env=environment).remote
    device, load = "cuda" if plan.gpus else "cpu", opening()
    evaluators: list[Any] = [
        start(plan.data, plan.split, folder.resolve(), load, device)
        for _ in range(min(actors or room, room, len(missing)))
    ]
    started = time.monotonic()
    try:
        for finished, _ in enumerate(_completed(evaluators, missing, plan, stall_seconds), start=1):
            left = (time.monotonic() - started) / finished * (len(missing) - finished)
            report(f"unit {done + finished} of {len(plan.units)}, about {left:.0f} s left")
    except RayError as error:
        raise _explained(error) from None
    finally:
        for evaluator in evaluators:
            ray.kill(evaluator)
    return len(missing)


def _usable(unit: Unit, plan: SweepPlan, folder: Path, report: Callable[[str], None]) -> bool:
    if not (folder / unit.file).exists():
        return False
    try:
        if unit.cells:
            _read(unit, plan, folder)
        else:
            read_agreement(folder / unit.file)
    except UserError as error:
        report(f"{error}; it is computed again")
        return False
    return True


def _read(unit: Unit, plan: SweepPlan, folder: Path) -> Tally:
    return read_tally(folder / unit.file, [plan.cells[i] for i in unit.cells], sessions=len(unit.sessions))


def _completed(
    evaluators: Sequence[Any], units: Sequence[Unit], plan: SweepPlan, stall_seconds: float
) -> Iterator[None]:
    """Yield whenever a unit is done. An evaluator gets work only once its process stands: one that still waits for
    a CPU of a busy cluster holds up nothing. One for which no unit is left is ended, so that an evaluator whose node
    was lost finds a CPU to do its unit again. One that cannot be reached gives its unit back: its node may be gone,
    and Ray starts it anew once it knows."""
    waiting = list(units)[::-1]
    running: dict[Any, tuple[Any, Unit | None]] = {each.__ray_ready__.remote(): (each, None) for each in evaluators}
    answered = time.monotonic()
    while waiting or any(unit for _, unit in running.values()):
        patience = max(0.0, answered + stall_seconds - time.monotonic())
        done, _ = ray.wait(list(running), num_returns=1, timeout=patience)
        if not done:
            raise UserError(f"no unit was finished for {stall_seconds:g} s: run the same command again to continue")
        [ready] = done
        evaluator, finished = running.pop(ready)
        try:
            ray.get(ready)
        except ActorUnavailableError:
            waiting += [finished] if finished else []
            time.sleep(_RECONNECT_SECONDS)
            running[evaluator.__ray_ready__.remote()] = (evaluator, None)
            continue
        answered = time.monotonic()
        if waiting:
            unit = waiting.pop()
            some = [plan.cells[i] for i in unit.cells]
            work = evaluator.work.remote(unit, plan.models[unit.model], some, bfloat16=plan.bfloat16)
            running[work] = (evaluator, unit)
        else:
            ray.kill(evaluator)
        if finished:
            yield


def _explained(error: RayError) -> BaseException:
    cause = user_error(error)
    if isinstance(cause, UserError) or isinstance(error, RayTaskError):
        return cause
    what = " ".join(str(error).split())[:160]
    return UserError(f"an evaluating process was lost ({what}): run it again, with fewer actors if memory is short")


def read_sweep(plan: SweepPlan, folder: Path) -> list[Tally]:
    """One tally per model, over all sessions and cells.

    Raises:
        UserError: a unit is missing or damaged.
    """
    tallies = []
    for number in range(len(plan.models)):
        parts: dict[range, list[Tally]] = {}
        for unit in plan.units:
            if unit.model == number and unit.cells:
                parts.setdefault(unit.cells, []).append(_read(unit, plan, folder))
        tallies.append(_stacked([joined(tallies_of_cells) for tallies_of_cells in parts.values()]))
    return tallies


def read_agreements(plan: SweepPlan, folder: Path) -> list[dict[str, float]]:
    """What ``agreement`` measured, per model.

    Raises:
        UserError: a unit is missing or damaged.
    """
    return [read_agreement(folder / unit.file) for unit in plan.units if not unit.cells]


@ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2)
class Evaluator:
    """Holds the sessions and the model at hand; a lost process starts anew and does its unit again."""

    def __init__(self, data: Path, split: Split, folder: Path, load: SplitLoader, device: str) -> None:
        torch.set_num_threads(1)
        self.folder, self.device, self.manifest = folder, device, read_manifest(data)
        self.store = load(data, self.manifest, split)
        self.surroundings = surroundings_of(self.store, self.manifest)
        self.model: tuple[Path, nn.Module] | None = None

    def work(self, unit: Unit, model: Path, cells: Sequence[Cell], *, bfloat16: bool) -> None:
        """Compute a unit and write its file."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "the cluster gave a GPU that PyTorch cannot use there: `emolab` says what it finds; or gpus=0"
            )
        if self.model is None or self.model[0] != model:  # units come model by model
            self.model = (model, load_model(model)[0].to(self.device))
        if not cells:
            found = agreement(self.model[1], self.store, self.manifest, device=self.device)
            write_agreement(self.folder / unit.file, found)
            return
        sessions = [self.store.session(index, self.manifest) for index in unit.sessions]
        batches = [
            sessions[first : first + SESSIONS_PER_BATCH] for first in range(0, len(sessions), SESSIONS_PER_BATCH)
        ]
        engine = best_engine(self.model[1])
        if engine == "factorised" and bfloat16:
            engine = "factorised-bfloat16"
        tally = evaluate_sessions(
            self.model[1], batches, cells, surroundings=self.surroundings, device=self.device, engine=engine
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


@torch.no_grad()
def agreement(
    model: nn.Module, store: SessionStore, manifest: Manifest, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Modality -> Spearman correlation of its weight with its true quality, over the clean steps at which it was
    observed; empty where the model has no weights or the corpus does not know the quality."""
    weights: dict[str, list[Any]] = {name: [] for name in manifest.dimensions}
    qualities: dict[str, list[Any]] = {name: [] for name in manifest.dimensions}
    for index in range(len(store)):
        session = store.session(index, manifest)
        confidence = model(store.batch([index]).to(device)).confidence
        if confidence is None or not session.quality:
            return {}
        for column, name in enumerate(session.features):
            seen = session.present[name]
            weights[name].append(confidence[0, :, column].cpu().numpy()[seen])
            qualities[name].append(session.quality[name][seen])
    return {
        name: weight_quality_correlation(np.concatenate(weights[name]), np.concatenate(qualities[name]))
        for name in weights
    }


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


def _name(content: Sequence[str]) -> str:
    """A file's name out of all that decides its content."""
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:24]


def _stacked(parts: Sequence[Tally]) -> Tally:
    """Tallies of different cells on the same sessions, as one."""
    weights = [part.weight for part in parts if part.weight is not None]
    return replace(
        parts[0],
        cells=tuple(cell for part in parts for cell in part.cells),
        confusion=np.concatenate([part.confusion for part in parts]),
        calibration=np.concatenate([part.calibration for part in parts]),
        squared_error=np.concatenate([part.squared_error for part in parts]),
        weight=np.concatenate(weights) if len(weights) == len(parts) else None,
    )
