"""A robustness sweep of 1,000 cells against one Ray Tune trial per cell, on the same model and sessions.

    python benchmarks/cold_trials.py            # some minutes
    python benchmarks/cold_trials.py --quick    # about a minute: a smaller grid, fewer sessions and trials

Variants: `sweep`, plan_sweep, run_sweep and read_sweep with one evaluator whose start is part of the time;
`cold`, the textbook way, a Tune trial per cell, each in a fresh process that imports torch, loads data and model
and evaluates its cell; `warm`, the fast way Tune offers, trials that reuse one process with its data and model:
the time of a further trial, without the start of the process.

The sweep evaluates every cell. Cold and warm trials are timed on a few cells; their totals over all cells are
**extrapolated** from the mean per cell, and marked so in the output. Wall time, one CPU and one thread for every
variant, interleaved A B C C B A. Before anything is timed, the sweep and a trial's own evaluation must give
identical confusion counts on those cells, and every trial is held to the same counts. Makes its own data set
(EduSim) and model in a temporary folder, and a local Ray of its own. Writes JSON with versions and hardware, by
default benchmarks/results/cold_trials.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables

import numpy as np
import ray
import torch
from measurement import arguments, environment, write_record
from numpy.typing import NDArray
from ray import tune

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.edusim import EduSim
from emolab.robustness.cells import Cell
from emolab.robustness.evaluator import surroundings_of
from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.sweep import read_sweep, run_sweep
from emolab.robustness.sweep_plan import plan_sweep
from emolab.robustness.tally import Tally, evaluate_sessions
from emolab.sessions.loading import load_split
from emolab.sessions.manifest import read_manifest
from emolab.sessions.preparation import prepare
from emolab.training.recipe import TrainSettings
from emolab.training.train import load_model, train

TARGET = 100.0
"""Ratio claimed over cold trials at 1,000 cells."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the experiment."""

    rates: int
    """Missing rates per modality, 0 included: rates ** 3 cells."""
    sessions: int
    """Of the data set; a tenth of its speakers are for validation, which is what is evaluated."""
    cold_trials: int
    warm_trials: int
    rounds: int
    """Each times every variant twice."""


FULL = Case(rates=10, sessions=400, cold_trials=3, warm_trials=11, rounds=1)
QUICK = Case(rates=4, sessions=60, cold_trials=1, warm_trials=3, rounds=1)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Where the model and the data lie, and the cells."""

    model: Path
    data: Path
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a process needs to evaluate cells one at a time."""

    problem: Problem
    model: torch.nn.Module
    sessions: Sequence[Any]
    surroundings: Any

    def counts(self, cell: int) -> list[Any]:
        """Confusion counts of one cell, (N, K, K), by one forward pass of the model."""
        cells = [self.problem.cells[cell]]
        tally = evaluate_sessions(self.model, [self.sessions], cells, surroundings=self.surroundings, engine="plain")
        return tally.confusion[0].tolist()


def load(problem: Problem) -> Loaded:
    torch.set_num_threads(1)
    manifest = read_manifest(problem.data)
    store = load_split(problem.data, manifest, "validation")
    return Loaded(
        problem=problem,
        model=load_model(problem.model)[0],
        sessions=[store.session(index, manifest) for index in range(len(store))],
        surroundings=surroundings_of(store, manifest),
    )


class Trial(tune.Trainable):
    """One cell per trial; only a reused actor is ever reset."""

    def setup(self, config: dict[str, Any]) -> None:
        self.loaded, self.cell = load(config["problem"]), config["cell"]

    def step(self) -> dict[str, Any]:
        counts = self.loaded.counts(self.cell)
        return {"counts": counts, "cell": self.cell, "ended": time.time(), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cell = new_config["cell"]
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        del checkpoint_dir


def by_trials(problem: Problem, cells: Sequence[int], folder: Path, *, reuse: bool) -> list[dict[str, Any]]:
    """What each trial reported, one Tune trial a cell, one at a time; in the order in which they ended."""
    results = tune.Tuner(
        tune.with_resources(Trial, {"cpu": 1}),
        param_space={"problem": problem, "cell": tune.grid_search(list(cells))},
        tune_config=tune.TuneConfig(reuse_actors=reuse, max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(folder), name=f"trials-{time.monotonic_ns()}", verbose=0),
    ).fit()
    return sorted((result.metrics or {} for result in results), key=lambda metrics: metrics["ended"])


def by_sweep(problem: Problem, folder: Path) -> Tally:
    """All cells, from nothing to the table."""
    plan = plan_sweep([problem.model], problem.data, "validation", problem.cells)
    units = folder / f"sweep-{time.monotonic_ns()}"
    assert run_sweep(plan, units, report=lambda _: None, actors=1) == len(plan.units)
    return read_sweep(plan, units)[0]


def make_problem(case: Case, folder: Path) -> Problem:
    """EduSim, a model of width 64 after two epochs, and a joint grid of missing rates."""
    data = folder / "data"
    prepare(EduSim(sessions=case.sessions, speakers=20), data, seed=0, shard_sessions=64, report=lambda _: None)
    settings = TrainSettings.model_validate(
        {
            "data": str(data),
            "output": str(folder / "runs"),
            "model": {"d_model": 64, "layers": 2, "heads": 4, "dropout": 0.1},
            "training": {"epochs": 2, "batch_size": 32, "learning_rate": 2e-3, "warmup_epochs": 0},
            "tracking": {"enabled": False},
        }
    )
    rates = [round(index * 0.9 / (case.rates - 1), 3) for index in range(1, case.rates)]
    suite = {"name": "grid", "grids": [{"instances": [{"corruption": "frame_missing", "levels": rates}]}]}
    cells = expand(parse_suite(suite), [*read_manifest(data).dimensions])
    return Problem(model=train(settings).folder / "model", data=data, cells=tuple(cells))


def spread(count: int, some: int) -> list[int]:
    """``some`` positions all over ``count``."""
    return [round(place) for place in np.linspace(0, count - 1, some)]


def assert_same(found: dict[int, list[Any]], expected: NDArray[np.int64]) -> None:
    for cell, counts in found.items():
        np.testing.assert_array_equal(np.array(counts), expected[cell], err_msg=f"cell {cell}")


class Experiment:
    """The three variants, each a call that evaluates, checks the counts and returns seconds per cell."""

    def __init__(self, case: Case, problem: Problem, folder: Path) -> None:
        self.case, self.problem, self.folder = case, problem, folder
        count = len(problem.cells)
        self.cold_cells, self.warm_cells = (
            spread(count, 2 * case.rounds * case.cold_trials),
            spread(count, case.warm_trials),
        )
        self.expected = by_sweep(problem, folder).confusion  # also the warm-up
        loaded = load(problem)
        self.sessions = len(loaded.sessions)
        assert_same({cell: loaded.counts(cell) for cell in {*self.cold_cells, *self.warm_cells}}, self.expected)
        self.waiting = list(self.cold_cells)

    def cold(self) -> float:
        cells = [self.waiting.pop() for _ in range(self.case.cold_trials)]
        start = time.perf_counter()
        trials = by_trials(self.problem, cells, self.folder, reuse=False)
        seconds = time.perf_counter() - start
        self._check(trials, cells)
        return seconds / len(cells)

    def warm(self) -> float:
        trials = by_trials(self.problem, self.warm_cells, self.folder, reuse=True)
        self._check(trials, self.warm_cells)
        return (trials[-1]["ended"] - trials[0]["ended"]) / (len(trials) - 1)

    def sweep(self) -> float:
        start = time.perf_counter()
        found = by_sweep(self.problem, self.folder)
        seconds = time.perf_counter() - start
        np.testing.assert_array_equal(found.confusion, self.expected)
        return seconds / len(self.problem.cells)

    def _check(self, trials: Sequence[dict[str, Any]], cells: Sequence[int]) -> None:
        assert sorted(trial["cell"] for trial in trials) == sorted(cells)
        assert_same({trial["cell"]: trial["counts"] for trial in trials}, self.expected)


def measure(case: Case, problem: Problem, folder: Path) -> dict[str, Any]:
    experiment = Experiment(case, problem, folder)
    variants: dict[str, Callable[[], float]] = {
        "cold": experiment.cold,
        "warm": experiment.warm,
        "sweep": experiment.sweep,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(case.rounds):
        for name in (*variants, *reversed(variants)):
            seconds[name].append(variants[name]())
    return report(case, len(problem.cells), experiment.sessions, seconds)


def report(case: Case, cells: int, sessions: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    evaluated = {"cold": case.cold_trials, "warm": case.warm_trials - 1, "sweep": cells}
    return {
        **asdict(case),
        "cells": cells,
        "evaluated_sessions": sessions,
        "variants": {
            name: {
                "cells_timed": evaluated[name] * len(values),
                "seconds_per_cell_mean": means[name],
                "seconds_per_cell_min": min(values),
                "seconds_for_all_cells": means[name] * cells,
                "all_cells": "measured" if name == "sweep" else "extrapolated from the mean per cell",
            }
            for name, values in seconds.items()
        },
        "ratio_per_cell": {name: means[name] / means["sweep"] for name in ("cold", "warm")},
        "ratio_per_cell_of_best": {name: min(seconds[name]) / min(seconds["sweep"]) for name in ("cold", "warm")},
        "target": TARGET,
        "met": cells >= 1000 and means["cold"] / means["sweep"] >= TARGET,
    }


def main(given: list[str] | None = None) -> None:
    description = "Time a robustness sweep against one Ray Tune trial per cell."
    options = arguments(description, "cold_trials", "a smaller grid, fewer sessions and trials", given)
    with tempfile.TemporaryDirectory(prefix="cold-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            folder = Path(name)
            case = QUICK if options.quick else FULL
            result = measure(case, make_problem(case, folder), folder)
    for variant, found in result["variants"].items():
        total, how = found["seconds_for_all_cells"], found["all_cells"]
        print(f"{variant}: {found['seconds_per_cell_mean']:.4f} s a cell, {total:.0f} s for all ({how})", flush=True)
    ratios = ", ".join(f"{ratio:.0f}x over {name} trials" for name, ratio in result["ratio_per_cell"].items())
    print(
        f"{result['cells']} cells, {result['evaluated_sessions']} sessions: {ratios} (target {TARGET:.0f}x over cold)"
    )
    where = environment(ray=ray.__version__, cpus_used=1)
    write_record(options.output, {"quick": options.quick, "environment": where, "result": result})


if __name__ == "__main__":
    main()
