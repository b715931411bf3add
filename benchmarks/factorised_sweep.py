"""A robustness sweep of Edu-EmotionNet at full size: the factorised engine against running the model per cell.

    python benchmarks/factorised_sweep.py            # about eight minutes
    python benchmarks/factorised_sweep.py --case G3  # the cases so named; the others stay in the record
    python benchmarks/factorised_sweep.py --quick    # about a minute: fewer cells and repetitions

One thread, CPU time of this process, variants interleaved A B C C B A, minimum and median. Before anything is
timed, all variants must agree on every cell. Writes JSON with the versions and the hardware, by default
benchmarks/results/factorised_sweep.json. Every ratio is measured on all cells, none is extrapolated.

Variants: `factorised`, the engine; `per_cell`, the textbook way, one forward pass per cell; `stacked`, the fast
way without sharing, several cells on the batch axis so that every pass has enough rows for full matrix products.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from measurement import environment, interleaved, minimum_and_median, parser_for, ratio, write_record
from torch import Tensor

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.network import EduEmotionNet, EduEmotionNetConfig
from edu_emotionnet.zoo import build
from emolab.robustness.assembly import build_variants, clean_batch
from emolab.robustness.cells import Cell, distinct_variants
from emolab.robustness.corruptions.observed import Surroundings, Variant
from emolab.robustness.engine import evaluate_cells
from emolab.robustness.factorised import ModalityInput
from emolab.robustness.suites import expand, parse_suite
from emolab.sessions.schema import Session

DIMENSIONS = {"audio": 40, "visual": 512, "text": 768}
STEPS, CLASSES = 100, 4
STACKED_SEQUENCES = 4
TOLERANCE = 1e-6

Inputs = Mapping[Variant, ModalityInput]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A suite on some sessions of 100 steps."""

    name: str
    suite: dict[str, Any]
    sessions: int
    rounds: int
    """Each times every variant twice."""
    target: float | None = None
    """The ratio claimed over both baselines, if any is."""


def grid(levels: int) -> dict[str, Any]:
    """Every modality at its own missing rate: levels ** 3 cells, the clean one included."""
    rates = [round(index * 0.9 / (levels - 1), 3) for index in range(1, levels)]
    return {"name": "grid", "grids": [{"instances": [{"corruption": "frame_missing", "levels": rates}]}]}


ONE_MODALITY = {"name": "P4", "sweeps": [{"corruption": "frame_missing", "modalities": "each"}]}
ONE_NOISY = {"name": "noise", "seeds": [0, 1], "sweeps": [{"corruption": "gaussian", "modalities": "each"}]}
CASES = (
    Case(name="G3: one modality missing (P4)", suite=ONE_MODALITY, sessions=8, rounds=3, target=2.9),
    Case(name="one modality with Gaussian noise", suite=ONE_NOISY, sessions=4, rounds=3),
    Case(name="G4: joint grid of 125 cells", suite=grid(5), sessions=2, rounds=3, target=15.0),
    Case(name="G4: joint grid of 1,000 cells", suite=grid(10), sessions=1, rounds=1, target=28.0),
)
QUICK_CASES = (
    Case(name="G3: one modality missing (P4)", suite=ONE_MODALITY, sessions=4, rounds=1, target=2.9),
    Case(name="G4: joint grid of 125 cells", suite=grid(5), sessions=1, rounds=1, target=15.0),
)


def problem(case: Case) -> tuple[EduEmotionNet, SessionBatch, list[Cell], Inputs]:
    """The paper's model (d=256, 4 layers), random sessions, and the case's cells with their variants."""
    torch.manual_seed(0)
    model = build("edu_emotionnet", EduEmotionNetConfig(), dimensions=DIMENSIONS, classes=CLASSES).eval()
    assert isinstance(model, EduEmotionNet)
    sessions = [random_session(number) for number in range(case.sessions)]
    batch = clean_batch(sessions)
    cells = expand(parse_suite(case.suite), tuple(DIMENSIONS))
    surroundings = Surroundings(std={name: np.ones(size) for name, size in DIMENSIONS.items()})
    return model, batch, cells, build_variants(sessions, batch, distinct_variants(cells), surroundings)


def random_session(number: int) -> Session:
    generator = np.random.default_rng(number)
    return Session(
        session_id=f"session-{number}",
        speaker_id="speaker",
        corpus="random",
        step_seconds=1.0,
        features={
            name: generator.standard_normal((STEPS, size)).astype(np.float32) for name, size in DIMENSIONS.items()
        },
        present={name: np.ones(STEPS, dtype=np.bool_) for name in DIMENSIONS},
        labels=generator.integers(0, CLASSES, STEPS),
    )


def factorised(model: EduEmotionNet, batch: SessionBatch, cells: Sequence[Cell], inputs: Inputs) -> Tensor:
    return evaluate_cells(model, batch, cells, inputs, engine="factorised").log_probabilities


def per_cell(model: EduEmotionNet, batch: SessionBatch, cells: Sequence[Cell], inputs: Inputs) -> Tensor:
    return evaluate_cells(model, batch, cells, inputs, engine="plain").log_probabilities


@torch.inference_mode()
def stacked(model: EduEmotionNet, batch: SessionBatch, cells: Sequence[Cell], inputs: Inputs) -> Tensor:
    """Several cells per pass, so that a pass has at least STACKED_SEQUENCES sequences."""
    sessions = len(batch.lengths)
    together = max(1, STACKED_SEQUENCES // sessions)
    if together == 1:  # the sessions alone are enough
        return per_cell(model, batch, cells, inputs)
    outputs = []
    for first in range(0, len(cells), together):
        some = [{v.modality: inputs[v] for v in cell.variants} for cell in cells[first : first + together]]
        merged = SessionBatch(
            features={name: torch.cat([cell[name].features for cell in some]) for name in DIMENSIONS},
            present={name: torch.cat([cell[name].present for cell in some]) for name in DIMENSIONS},
            lengths=batch.lengths.repeat(len(some)),
            labels=batch.labels.repeat(len(some), 1),
        )
        outputs.append(model(merged).log_probabilities.unflatten(0, (len(some), sessions)))
    return torch.cat(outputs)


VARIANTS = {"factorised": factorised, "per_cell": per_cell, "stacked": stacked}


def measure(case: Case) -> dict[str, Any]:
    given = problem(case)
    differences = parity(*given)  # runs every variant once: the warm-up
    runs = {name: partial(run, *given) for name, run in VARIANTS.items()}
    seconds = interleaved(runs, case.rounds, warm_up=False)
    ratios = {name: ratio(seconds, name, "factorised") for name in VARIANTS if name != "factorised"}
    return {
        **asdict(case),
        "cells": len(given[2]),
        "variants": len(given[3]),
        "repetitions": 2 * case.rounds,
        "seconds": minimum_and_median(seconds),
        "ratio": ratios,
        "met": case.target and min(min(found.values()) for found in ratios.values()) >= case.target,
        "largest_difference": differences,
        "environment": environment(),
    }


def parity(model: EduEmotionNet, batch: SessionBatch, cells: Sequence[Cell], inputs: Inputs) -> dict[str, float]:
    """Largest differences in log-probability between the engine and each baseline, over all cells.

    Raises:
        AssertionError: a difference is above the tolerance, or a decision differs that is not a tie.
    """
    ours = factorised(model, batch, cells, inputs)
    found = {}
    for name in ("per_cell", "stacked"):
        theirs = VARIANTS[name](model, batch, cells, inputs)
        best, second = theirs.topk(2, dim=-1).values.unbind(-1)
        differing = ours.argmax(-1) != theirs.argmax(-1)
        assert not (differing & (best - second > TOLERANCE)).any(), name
        found[name] = float((ours - theirs).abs().max())
        assert found[name] <= TOLERANCE, (name, found[name])
    return found


def main(given: list[str] | None = None) -> None:
    description = "Time a robustness sweep on one CPU thread, factorised and plain."
    parser = parser_for(description, "factorised_sweep", "fewer cells, fewer repetitions")
    parser.add_argument("--case", default="", help="part of a case's name")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    offered = QUICK_CASES if options.quick else CASES
    cases = [case for case in offered if options.case in case.name]
    if not cases:
        parser.error(f"no case is named like {options.case!r} (cases: {'; '.join(case.name for case in offered)})")
    results = []
    for case in cases:
        result = measure(case)
        results.append(result)
        verdict = "" if case.target is None else f", target {case.target}x {'met' if result['met'] else 'NOT met'}"
        ratios = ", ".join(
            f"{found['min']:.2f}x (median {found['median']:.2f}x) over {name}"
            for name, found in result["ratio"].items()
        )
        print(f"{case.name} ({result['cells']} cells): {ratios}{verdict}", flush=True)
    if options.case and options.output.exists():
        measured = {result["name"] for result in results}
        results += [case for case in json.loads(options.output.read_text())["cases"] if case["name"] not in measured]
    write_record(options.output, {"quick": options.quick, "cases": results})


if __name__ == "__main__":
    main()
