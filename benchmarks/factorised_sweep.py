"""A robustness sweep of Edu-EmotionNet at full size: the factorised engine against running the model per cell.

    python benchmarks/factorised_sweep.py            # about eight minutes
    python benchmarks/factorised_sweep.py --quick    # about a minute: fewer cells and repetitions

One thread, CPU time of this process, variants interleaved A B C C B A, minimum and median. Before anything is
timed, all variants must agree on every cell. Writes JSON with the versions and the hardware, by default
benchmarks/results/factorised_sweep.json. Every ratio is measured on all cells, none is extrapolated.

Variants: `factorised`, the engine; `per_cell`, the textbook way, one forward pass per cell; `stacked`, the fast
way without sharing, several cells on the batch axis so that every pass has enough rows for full matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant: forwards through the list, then backwards, `rounds` times."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in (*variants, *reversed(list(variants))):
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def measure(case: Case) -> dict[str, Any]:
    arguments = problem(case)
    differences = parity(*arguments)  # runs every variant once: the warm-up
    seconds = interleaved({name: lambda f=f: f(*arguments) for name, f in VARIANTS.items()}, case.rounds)
    smallest = {name: min(values) for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    baselines = [name for name in VARIANTS if name != "factorised"]
    ratios = {name: smallest[name] / smallest["factorised"] for name in baselines}
    return {
        **asdict(case),
        "cells": len(arguments[2]),
        "variants": len(arguments[3]),
        "repetitions": 2 * case.rounds,
        "seconds": {name: {"min": smallest[name], "median": middle[name]} for name in VARIANTS},
        "ratio_min": ratios,
        "ratio_median": {name: middle[name] / middle["factorised"] for name in baselines},
        "met": case.target and min(ratios.values()) >= case.target,
        "largest_difference": differences,
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


def environment() -> dict[str, object]:
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time a robustness sweep on one CPU thread, factorised and plain.")
    parser.add_argument("--quick", action="store_true", help="fewer cells, fewer repetitions")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "factorised_sweep.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        result = measure(case)
        results.append(result)
        verdict = "" if case.target is None else f", target {case.target}x {'met' if result['met'] else 'NOT met'}"
        ratios = ", ".join(f"{ratio:.2f}x over {name}" for name, ratio in result["ratio_min"].items())
        print(f"{case.name} ({result['cells']} cells): {ratios}{verdict}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"quick": options.quick, "environment": environment(), "cases": results}
    options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
