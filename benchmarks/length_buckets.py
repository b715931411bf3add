"""True steps a second in training: length buckets against padding, on sessions of very different lengths.

    python benchmarks/length_buckets.py            # about four minutes
    python benchmarks/length_buckets.py --quick    # half a minute: fewer and smaller batches

Variants: `longest`, every batch padded to the longest session of the data set, the textbook way for tensors of one
shape; `random`, shuffled batches padded to their own longest session, which is what training does without buckets;
`buckets`, training.length_buckets. The same sessions, model, optimizer and batch size; a step is forward, loss,
backward and update. True steps are those of the sessions, not of the padding. CPU time of one thread, interleaved
A B C C B A. An epoch would take minutes, so each plan is timed on some of its batches: those at evenly spaced places
of its batches sorted by true steps.

Before anything is timed, the loss of every timed session must be the same however it is padded. Lengths are drawn
with a fixed seed between 30 and 300 steps: `uniform`, and `log_normal` with median 60 and sigma 0.75. The ratio over
`longest` cannot exceed the longest length over the mean; both are recorded. Writes JSON with versions and hardware,
by default benchmarks/results/length_buckets.json.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from measurement import arguments, environment, interleaved, ratio, write_record
from numpy.typing import NDArray
from torch import nn

from edu_emotionnet import zoo
from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL, FeatureStatistics
from edu_emotionnet.losses import combined_loss
from emolab.sessions.loading import Block, SessionStore, epoch_batches

WIDTHS = {"audio": 40, "visual": 64, "text": 48}
CLASSES = 4
TARGETS = {"uniform": 1.7, "log_normal": 3.0}
"""Ratios over ``longest`` that are claimed (performance targets of the project)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One distribution of lengths."""

    lengths: str
    sessions: int
    batch_size: int = 8
    timed_batches: int = 16
    bucket_batches: int = 50
    d_model: int = 32
    layers: int = 1
    rounds: int = 3
    """Each times every variant twice, so that there are 2 x rounds epochs of each."""


CASES = (
    Case(lengths="uniform", sessions=1000),
    Case(lengths="log_normal", sessions=1000),
)
QUICK = tuple(replace(case, batch_size=4, timed_batches=8, rounds=1) for case in CASES)

Plan = list[NDArray[np.int64]]


def draw_lengths(case: Case) -> NDArray[np.int64]:
    generator = np.random.default_rng(0)
    if case.lengths == "uniform":
        return generator.integers(30, 301, case.sessions)
    return np.clip(generator.lognormal(np.log(60), 0.75, case.sessions), 30, 300).astype(np.int64)


def make_store(lengths: NDArray[np.int64]) -> SessionStore:
    generator = np.random.default_rng(1)
    steps = int(lengths.sum())
    return SessionStore(
        [
            Block(
                session_ids=[f"s{index:05d}" for index in range(len(lengths))],
                speaker_ids=["p"] * len(lengths),
                starts=np.concatenate([[0], np.cumsum(lengths)]),
                features={name: generator.standard_normal((steps, w), np.float32) for name, w in WIDTHS.items()},
                present={name: generator.random(steps) > 0.1 for name in WIDTHS},
                quality={},
                labels=generator.integers(0, CLASSES, steps),
            )
        ]
    )


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    entry = zoo.entry("edu_emotionnet")
    options = replace(entry.config, d_model=case.d_model, layers=case.layers, heads=4)  # pyright: ignore[reportCallIssue]
    statistics_ = FeatureStatistics.identity(WIDTHS)
    return zoo.build("edu_emotionnet", options, dimensions=WIDTHS, classes=CLASSES, statistics=statistics_)


def padded_to(batch: SessionBatch, steps: int) -> SessionBatch:
    """The batch with further empty steps."""
    more = steps - batch.labels.shape[1]
    return SessionBatch(
        features={name: F.pad(values, (0, 0, 0, more)) for name, values in batch.features.items()},
        present={name: F.pad(mask, (0, more)) for name, mask in batch.present.items()},
        lengths=batch.lengths,
        labels=F.pad(batch.labels, (0, more), value=IGNORED_LABEL),
    )


@torch.no_grad()
def session_losses(model: nn.Module, store: SessionStore, plan: Plan, longest: int | None) -> dict[int, float]:
    """Session -> its cross-entropy without dropout."""
    model.eval()
    losses: dict[int, float] = {}
    for indices in plan:
        batch = store.batch(indices)
        batch = padded_to(batch, longest) if longest else batch
        scores = model(batch).log_probabilities.transpose(1, 2)
        found = F.nll_loss(scores, batch.labels, ignore_index=IGNORED_LABEL, reduction="none").sum(1)
        losses |= dict(zip(indices.tolist(), found.tolist(), strict=True))
    return losses


def some_of(plan: Plan, lengths: NDArray[np.int64], count: int) -> Plan:
    """Batches of a plan at evenly spaced places in the order of their true steps."""
    ordered = sorted(plan, key=lambda batch: int(lengths[batch].sum()))
    places = ((np.arange(count) + 0.5) * len(ordered) / count).astype(int)
    return [ordered[place] for place in places]


def train_on(model: nn.Module, store: SessionStore, plan: Plan, longest: int | None) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for indices in plan:
        batch = store.batch(indices)
        batch = padded_to(batch, longest) if longest else batch
        losses = combined_loss(model(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        (losses.total(0.1) / losses.steps).backward()
        optimizer.step()


def measure(case: Case) -> dict[str, Any]:
    lengths = draw_lengths(case)
    store, model, longest = make_store(lengths), make_model(case), int(lengths.max())
    shuffled, bucketed = (
        some_of(
            epoch_batches(lengths, case.batch_size, seed=0, epoch=0, bucket_batches=buckets),
            lengths,
            case.timed_batches,
        )
        for buckets in (0, case.bucket_batches)
    )
    variants = {"longest": (shuffled, longest), "random": (shuffled, None), "buckets": (bucketed, None)}
    difference = 0.0
    for plan in (shuffled, bucketed):
        padded, plain = (session_losses(model, store, plan, pad) for pad in (longest, None))
        difference = max(difference, *(abs(padded[index] / plain[index] - 1) for index in plain))
    assert difference < 1e-5, f"the loss of a session depends on its padding: {difference:.2e}"
    seconds = interleaved(
        {name: partial(train_on, model, store, plan, pad) for name, (plan, pad) in variants.items()}, case.rounds
    )
    steps = {name: int(sum(lengths[batch].sum() for batch in plan)) for name, (plan, _) in variants.items()}
    return report(case, lengths, seconds, steps, difference)


def report(
    case: Case,
    lengths: NDArray[np.int64],
    seconds: dict[str, list[float]],
    steps: dict[str, int],
    difference: float,
) -> dict[str, Any]:
    target = TARGETS[case.lengths]
    per_step = {name: [value / steps[name] for value in values] for name, values in seconds.items()}
    ratios = {name: ratio(per_step, name, "buckets") for name in ("longest", "random")}
    return {
        **asdict(case),
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "largest_relative_difference_of_losses": difference,
        "true_steps_timed": steps,
        "true_steps_per_cpu_second": {name: 1 / statistics.median(values) for name, values in per_step.items()},
        "cpu_seconds": seconds,
        "buckets_faster_than": ratios,
        "target_over_longest": target,
        "met": ratios["longest"]["median"] >= target,
    }


def main(given: list[str] | None = None) -> None:
    options = arguments(
        "Time training epochs with and without length buckets.",
        "length_buckets",
        "fewer and smaller batches, one round",
        given,
    )
    torch.set_num_threads(1)
    results = []
    for case in QUICK if options.quick else CASES:
        result = measure(case)
        results.append(result)
        over = result["buckets_faster_than"]
        print(
            f"{case.lengths}: mean {result['mean_length']:.0f}, longest {result['longest']} steps; buckets "
            f"{over['longest']['median']:.2f}x over padding to the longest of the data set (target "
            f"{result['target_over_longest']}x), {over['random']['median']:.2f}x over random batches",
            flush=True,
        )
    write_record(options.output, {"quick": options.quick, "environment": environment(), "cases": results})


if __name__ == "__main__":
    main()
