"""Training step (forward and backward) of the Temporal Feedback Loop: how fast, against which loops.

    python benchmarks/feedback_loop.py            # about four minutes
    python benchmarks/feedback_loop.py --quick    # some seconds: smaller, fewer repetitions, says nothing certain

One thread, CPU time of this process, variants interleaved A B B A, minimum and median of at least five rounds.
Before anything is timed, all variants must agree in output and gradients. Writes JSON with the versions and
the hardware, by default benchmarks/results/feedback_loop.json.

Variants: `adjoint`, what TemporalFeedbackLoop.forward does on a CPU; `unrolled`, the plain loop over unbind;
`sliced`, the textbook loop that indexes z[:, t] in every step; `linear`, the hoisted matrix product alone with
its backward pass, which no variant can undercut.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edu_emotionnet.feedback import SequentialAdjoint, TemporalFeedbackLoop

WIDTH, CLASSES = 256, 4
TOLERANCE = 2e-6
"""Largest difference allowed before timing, relative to the largest entry of the tensor compared."""

Forward = Callable[[TemporalFeedbackLoop, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`faster` against `slower` at B sessions of T steps."""

    sessions: int
    steps: int
    slower: str
    rounds: int
    target: float | None = None
    """The ratio claimed, if any is."""
    faster: str = "adjoint"


CASES = (
    Case(sessions=8, steps=100, slower="unrolled", target=2.0, rounds=20),
    Case(sessions=128, steps=100, slower="unrolled", target=1.4, rounds=10),
    Case(sessions=128, steps=300, slower="sliced", target=30.0, rounds=5),
)
QUICK_CASES = (
    Case(sessions=8, steps=100, slower="unrolled", target=2.0, rounds=5),
    Case(sessions=32, steps=100, slower="sliced", rounds=5),
)


def adjoint(loop: TemporalFeedbackLoop, z: Tensor) -> Tensor:
    return loop(z)


def unrolled(loop: TemporalFeedbackLoop, z: Tensor) -> Tensor:
    return loop.unrolled(z)


def sliced(loop: TemporalFeedbackLoop, z: Tensor) -> Tensor:
    """Equations 8 and 9 written down step by step: concatenate, one linear layer, index into z."""
    assert loop.previous is not None
    weight = torch.cat([loop.fused.weight, loop.previous.weight], dim=1)
    belief = z.new_full((len(z), loop.classifier.out_features), 1.0 / loop.classifier.out_features)
    steps = []
    for t in range(z.shape[1]):
        hidden = F.linear(torch.cat([z[:, t], belief], dim=-1), weight, loop.fused.bias)
        steps.append(F.log_softmax(loop.classifier(F.relu(hidden)), dim=-1))
        belief = steps[-1].exp()
    return torch.stack(steps, dim=1)


def linear(loop: TemporalFeedbackLoop, z: Tensor) -> Tensor:
    return loop.fused(z)


VARIANTS: dict[str, Forward] = {"adjoint": adjoint, "unrolled": unrolled, "sliced": sliced, "linear": linear}


def training_step(forward: Forward, loop: TemporalFeedbackLoop, z: Tensor, upstream: Tensor) -> list[Tensor]:
    """The log-probabilities, then the gradients of z and of every parameter of the loop."""
    loop.zero_grad()
    z.grad = None
    output = forward(loop, z)
    output.backward(upstream)
    return [output.detach(), *(x.grad for x in (z, *loop.parameters()) if x.grad is not None)]


def problem(
    sessions: int, steps: int, dtype: torch.dtype = torch.float32
) -> tuple[TemporalFeedbackLoop, Tensor, Tensor]:
    """A loop, z, and the gradient of the log-probabilities; equal numbers in every precision."""
    torch.manual_seed(0)
    loop = TemporalFeedbackLoop(WIDTH, CLASSES).to(dtype)
    z = torch.randn(sessions, steps, WIDTH).to(dtype).requires_grad_()
    return loop, z, torch.randn(sessions, steps, CLASSES).to(dtype)


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Over the tensors of two training steps, relative to each tensor's largest entry."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(first, second, strict=True)
    )


def parity(case: Case) -> dict[str, float]:
    """Differences between the variants of a case, and from a loop in double precision.

    Raises:
        AssertionError: the two variants compute something different, or the fast path was not taken.
    """
    loop, z, upstream = problem(case.sessions, case.steps)
    assert type(loop(z).grad_fn).__name__ == SequentialAdjoint.__name__ + "Backward"
    fast = [x.clone() for x in training_step(VARIANTS[case.faster], loop, z, upstream)]
    slow = [x.clone() for x in training_step(VARIANTS[case.slower], loop, z, upstream)]
    exact = training_step(unrolled, *problem(case.sessions, case.steps, torch.float64))
    found = {
        f"{case.faster} - {case.slower}": largest_difference(fast, slow),
        f"{case.faster} - float64": largest_difference(fast, exact),
        f"{case.slower} - float64": largest_difference(slow, exact),
    }
    assert max(found.values()) <= TOLERANCE, found
    return found


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant: forwards through the list, then backwards, `rounds` times (A B B A)."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in (*variants, *reversed(variants)):
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def measure(case: Case) -> dict[str, Any]:
    """A case's times, the ratio of the minima and of the medians (both must reach the target), and its limit."""
    differences = parity(case)
    loop, z, upstream = problem(case.sessions, case.steps)
    wide = torch.randn_like(z)

    def timed(name: str) -> Callable[[], object]:
        return lambda: training_step(VARIANTS[name], loop, z, wide if name == "linear" else upstream)

    seconds = interleaved({name: timed(name) for name in (case.faster, case.slower, "linear")}, case.rounds)
    smallest = {name: min(values) for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        which: values[case.slower] / values[case.faster] for which, values in (("min", smallest), ("median", middle))
    }
    return {
        **asdict(case),
        "milliseconds": {name: {"min": 1e3 * smallest[name], "median": 1e3 * middle[name]} for name in seconds},
        "ratio": ratios,
        "limit": smallest[case.slower] / smallest["linear"],
        "met": None if case.target is None else min(ratios.values()) >= case.target,
        "relative_difference": differences,
    }


def _said(result: dict[str, Any]) -> str:
    ratio = result["ratio"]
    return f"{ratio['min']:.2f}x (median {ratio['median']:.2f}x, limit {result['limit']:.2f}x)"


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
    parser = argparse.ArgumentParser(description="Time the temporal feedback loop's training step on one CPU thread.")
    parser.add_argument("--quick", action="store_true", help="smaller cases, fewer repetitions")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "feedback_loop.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        result = measure(case)
        results.append(result)
        verdict = "" if case.target is None else f", target {case.target}x {'met' if result['met'] else 'NOT met'}"
        print(f"B={case.sessions} T={case.steps}: {case.faster} against {case.slower} {_said(result)}{verdict}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"quick": options.quick, "environment": environment(), "cases": results}
    options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
