"""A robustness sweep with encoders in bfloat16 against running the model per cell: what a CPU without AMX gives.

    python benchmarks/bfloat16_sweep.py            # about three minutes
    python benchmarks/bfloat16_sweep.py --quick    # fewer sessions and repetitions

The paper's size (d=256, 4 layers) on EduSim, one modality missing per cell at ten rates (31 cells). The model is first
trained for a minute, since only a trained one has decisions that a rounding could change; then accuracy and macro-F1 of
ten cells in bfloat16 must lie within 0.1 point of those in float32. Timed with one thread, CPU time of this process,
interleaved A B C C B A, minimum and median: `bfloat16` and `factorised`, the engine in both precisions; `per_cell`, one
forward pass of the float32 model per cell; `per_cell_bfloat16`, the same under autocast, the honest fast baseline.
Writes JSON with the versions and the hardware, by default benchmarks/results/bfloat16_sweep.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from factorised_sweep import ONE_MODALITY, Inputs
from measurement import arguments, environment, interleaved, minimum_and_median, ratio, write_record

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.losses import combined_loss
from edu_emotionnet.network import EduEmotionNet, EduEmotionNetConfig
from edu_emotionnet.zoo import build
from emolab.corpora.edusim import EduSim
from emolab.robustness.assembly import build_variants, clean_batch
from emolab.robustness.cells import Cell, distinct_variants
from emolab.robustness.engine import Engine, evaluate_cells
from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.tally import evaluate_sessions
from emolab.scores import accuracy, macro_f1
from emolab.sessions.schema import Session

TARGET = 12.0
POINTS = 0.1
"""Largest difference allowed in accuracy or macro-F1 of a cell, in points of a hundred."""
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the experiment."""

    training_steps: int
    compared_sessions: int
    timed_sessions: int
    rounds: int
    width: int = 256
    layers: int = 4


FULL = Case(training_steps=60, compared_sessions=480, timed_sessions=16, rounds=3)
QUICK = Case(training_steps=40, compared_sessions=480, timed_sessions=4, rounds=1, width=64, layers=2)
COMPARED = {
    "name": "compared",
    "sweeps": [{"corruption": "frame_missing", "levels": [0.3, 0.6, 0.9], "modalities": "each"}],
}


def trained_model(
    case: Case, corpus: EduSim, sessions: Sequence[Session], device: torch.device | str = "cpu"
) -> EduEmotionNet:
    """The paper's network after a few steps: enough to be far above chance."""
    torch.manual_seed(0)
    stacked = {
        name: np.concatenate([session.features[name][session.present[name]] for session in sessions])
        for name in corpus.dimensions
    }
    statistics = FeatureStatistics(
        mean={name: values.mean(0).tolist() for name, values in stacked.items()},
        std={name: values.std(0).tolist() for name, values in stacked.items()},
    )
    config = EduEmotionNetConfig(d_model=case.width, layers=case.layers, dropout=0.0)
    model = build(
        "edu_emotionnet", config, dimensions=corpus.dimensions, classes=len(corpus.classes), statistics=statistics
    )
    assert isinstance(model, EduEmotionNet)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(case.training_steps):
        first = step * BATCH % len(sessions)
        batch = clean_batch(sessions[first : first + BATCH]).to(device)
        optimizer.zero_grad()
        losses = combined_loss(model(batch), batch)
        (losses.total(0.1) / losses.steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def parity(model: EduEmotionNet, sessions: Sequence[Session], device: torch.device | str = "cpu") -> dict[str, float]:
    """Accuracy in float32, and the largest difference in points over ten cells.

    Raises:
        AssertionError: a score differs by more than POINTS.
    """
    cells = expand(parse_suite(COMPARED), model.modalities)
    ordered = sorted(sessions, key=lambda session: session.num_steps)
    batches = [ordered[first : first + BATCH] for first in range(0, len(ordered), BATCH)]
    engines: tuple[Engine, Engine] = ("factorised", "factorised-bfloat16")
    exact, half = (
        evaluate_sessions(model, batches, cells, device=device, engine=engine).confusion.sum(1) for engine in engines
    )
    found = {
        name: 100 * float(np.abs(score(exact) - score(half)).max())
        for name, score in (("accuracy", accuracy), ("macro_f1", macro_f1))
    }
    assert max(found.values()) <= POINTS, found
    steps = int(exact[0].sum())
    return {"labelled_steps": steps, "clean_accuracy": float(accuracy(exact[0]))} | {
        f"{name}_points": value for name, value in found.items()
    }


@torch.inference_mode()
def autocast(model: EduEmotionNet, batch: SessionBatch, cells: Sequence[Cell], inputs: Inputs) -> None:
    with torch.autocast(batch.labels.device.type, torch.bfloat16):
        evaluate_cells(model, batch, cells, inputs, engine="plain")


def measure(case: Case) -> dict[str, Any]:
    corpus = EduSim(sessions=case.compared_sessions + BATCH * case.training_steps, speakers=20)
    sessions = [corpus.load(reference) for reference in corpus.references()]
    compared, learned = sessions[: case.compared_sessions], sessions[case.compared_sessions :]
    model = trained_model(case, corpus, learned)
    cells = expand(parse_suite(ONE_MODALITY), tuple(corpus.dimensions))
    differences = parity(model, compared)
    timed = compared[: case.timed_sessions]
    batch = clean_batch(timed)
    given = (model, batch, cells, build_variants(timed, batch, distinct_variants(cells)))
    runs = {
        "bfloat16": partial(evaluate_cells, *given, engine="factorised-bfloat16"),
        "factorised": partial(evaluate_cells, *given, engine="factorised"),
        "per_cell": partial(evaluate_cells, *given, engine="plain"),
        "per_cell_bfloat16": partial(autocast, *given),
    }
    seconds = interleaved(runs, case.rounds)
    ratios = {name: ratio(seconds, name, "bfloat16") for name in runs if name != "bfloat16"}
    return {
        **asdict(case),
        "cells": len(cells),
        "seconds": minimum_and_median(seconds),
        "ratio": ratios,
        "target": TARGET,
        "met": min(ratios["per_cell"].values()) >= TARGET,
        "parity": differences,
    }


def main(given: list[str] | None = None) -> None:
    options = arguments("Time a sweep with encoders in bfloat16.", "bfloat16_sweep", "smaller, fewer", given)
    torch.set_num_threads(1)
    result = measure(QUICK if options.quick else FULL)
    for name, found in result["ratio"].items():
        print(f"{found['min']:.2f}x (median {found['median']:.2f}x) over {name}", flush=True)
    print(f"target {TARGET}x over per_cell {'met' if result['met'] else 'NOT met'}; parity {result['parity']}")
    write_record(options.output, {"quick": options.quick, "environment": environment(), "result": result})


if __name__ == "__main__":
    main()
