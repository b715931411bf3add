"""A robustness sweep on a GPU at the paper's size: the factorised engine against running the model per cell.

    python benchmarks/gpu_sweep.py            # about two minutes
    python benchmarks/gpu_sweep.py --quick    # fewer sessions, steps and repetitions, says nothing certain

Wall time until the GPU is done, variants interleaved A B C D D C B A, minimum and median. Before anything is timed, the
engine must agree with running the model per cell on every cell; and scores of a trained model on ten cells in bfloat16
must lie within 0.1 point of those in float32. Writes JSON with the versions and the hardware, by default
benchmarks/results/gpu_sweep.json.

Variants: `bfloat16` and `factorised`, the engine in both precisions; `per_cell`, one forward pass of the float32 model
per cell (float32 proper, not TF32); `per_cell_bfloat16`, the same under autocast, the honest fast baseline.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from bfloat16_sweep import BATCH, POINTS, autocast, trained_model
from bfloat16_sweep import Case as Precision
from bfloat16_sweep import parity as precision_parity
from factorised_sweep import ONE_MODALITY, grid, problem
from factorised_sweep import Case as Suite
from measurement import (
    arguments,
    environment,
    gpu_clock,
    interleaved,
    minimum_and_median,
    ratio,
    require_gpu,
    write_record,
)

from emolab.corpora.edusim import EduSim
from emolab.robustness.engine import evaluate_cells

TOLERANCE = 1e-5
"""Largest difference in log-probability: the GPU's matrix products round differently at different sizes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A suite on some sessions of 100 steps."""

    suite: Suite
    target: dict[str, float]
    """Variant -> ratio claimed over per_cell."""


def suite(name: str, cells: dict[str, Any], sessions: int, rounds: int = 2) -> Suite:
    return Suite(name=name, suite=cells, sessions=sessions, rounds=rounds)


CASES = (
    Case(suite=suite("G3: one modality missing (P4)", ONE_MODALITY, 64), target={"factorised": 2.9, "bfloat16": 12.0}),
    Case(suite=suite("G4: joint grid of 125 cells", grid(5), 64), target={"factorised": 15.0}),
    Case(suite=suite("G4: joint grid of 1,000 cells", grid(10), 16, rounds=1), target={"factorised": 28.0}),
)
QUICK_CASES = (Case(suite=suite("G3: one modality missing (P4)", ONE_MODALITY, 4, rounds=1), target={}),)
PRECISION = Precision(training_steps=60, compared_sessions=480, timed_sessions=0, rounds=0)
QUICK_PRECISION = replace(PRECISION, training_steps=40, width=64, layers=2)


def precision(case: Precision) -> dict[str, float]:
    """What bfloat16 changes in the scores of a trained model.

    Raises:
        AssertionError: more than is allowed.
    """
    corpus = EduSim(sessions=case.compared_sessions + BATCH * case.training_steps, speakers=20)
    sessions = [corpus.load(reference) for reference in corpus.references()]
    compared, learned = sessions[: case.compared_sessions], sessions[case.compared_sessions :]
    return precision_parity(trained_model(case, corpus, learned, "cuda"), compared, "cuda")


def measure(case: Case) -> dict[str, Any]:
    model, batch, cells, built = problem(case.suite)
    model.cuda()
    inputs = {
        variant: replace(value, features=value.features.cuda(), present=value.present.cuda())
        for variant, value in built.items()
    }
    given = (model, batch.to("cuda"), cells, inputs)
    runs = {
        "bfloat16": partial(evaluate_cells, *given, engine="factorised-bfloat16"),
        "factorised": partial(evaluate_cells, *given, engine="factorised"),
        "per_cell": partial(evaluate_cells, *given, engine="plain"),
        "per_cell_bfloat16": partial(autocast, *given),
    }
    ours, theirs = runs["factorised"]().log_probabilities, runs["per_cell"]().log_probabilities
    difference = float((ours - theirs).abs().max())
    assert difference <= TOLERANCE, difference
    del ours, theirs
    seconds = interleaved(runs, case.suite.rounds, clock=gpu_clock)
    ratios = {
        engine: {name: ratio(seconds, name, engine) for name in runs if name.startswith("per_cell")}
        for engine in ("bfloat16", "factorised")
    }
    return {
        **asdict(case),
        "cells": len(cells),
        "seconds": minimum_and_median(seconds),
        "ratio": ratios,
        "met": {name: min(ratios[name]["per_cell"].values()) >= target for name, target in case.target.items()},
        "largest_difference": difference,
    }


def main(given: list[str] | None = None) -> None:
    options = arguments("Time a robustness sweep on a GPU.", "gpu_sweep", "smaller, fewer repetitions", given)
    require_gpu()
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        result = measure(case)
        results.append(result)
        print(f"{case.suite.name} ({result['cells']} cells):", flush=True)
        for engine, found in result["ratio"].items():
            said = ", ".join(f"{r['min']:.1f}x (median {r['median']:.1f}x) over {name}" for name, r in found.items())
            met = {True: ", met", False: ", NOT met", None: ""}[result["met"].get(engine)]
            print(f"  {engine} {said}{met}", flush=True)
    scores = precision(QUICK_PRECISION if options.quick else PRECISION)
    print(f"bfloat16 changes scores by at most {POINTS} point: {scores}", flush=True)
    record = {"quick": options.quick, "environment": environment(), "cases": results, "precision": scores}
    write_record(options.output, record)


if __name__ == "__main__":
    main()
