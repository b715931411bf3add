"""Training step (forward and backward) of the Temporal Feedback Loop: how fast, against which loops.

    python benchmarks/feedback_loop.py            # about three minutes
    python benchmarks/feedback_loop.py --quick    # some seconds: smaller, fewer repetitions, says nothing certain

One thread, CPU time of this process, variants interleaved A B B A, minimum and median of at least five rounds.
Before anything is timed, all variants must agree in output and gradients. Writes JSON with the versions and
the hardware, by default benchmarks/results/feedback_loop.json.

Variants: `adjoint`, what TemporalFeedbackLoop.forward does on a CPU; `unrolled`, the plain loop over unbind;
`sliced`, the textbook loop that indexes z[:, t] in every step; `linear`, the hoisted matrix product alone with
its backward pass, which no variant can undercut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measurement import (
    arguments,
    environment,
    interleaved,
    largest_difference,
    minimum_and_median,
    ratio,
    write_record,
)
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


def measure(case: Case) -> dict[str, Any]:
    """A case's times, the ratio of the minima and of the medians (both must reach the target), and its limit."""
    differences = parity(case)
    loop, z, upstream = problem(case.sessions, case.steps)
    wide = torch.randn_like(z)

    def timed(name: str) -> Callable[[], object]:
        return lambda: training_step(VARIANTS[name], loop, z, wide if name == "linear" else upstream)

    seconds = interleaved({name: timed(name) for name in (case.faster, case.slower, "linear")}, case.rounds)
    ratios = ratio(seconds, case.slower, case.faster)
    return {
        **asdict(case),
        "seconds": minimum_and_median(seconds),
        "ratio": ratios,
        "limit": ratio(seconds, case.slower, "linear"),
        "met": None if case.target is None else min(ratios.values()) >= case.target,
        "relative_difference": differences,
    }


def _said(result: dict[str, Any]) -> str:
    found, limit = result["ratio"], result["limit"]
    return f"{found['min']:.2f}x (median {found['median']:.2f}x, limit {limit['min']:.2f}x)"


def main(given: list[str] | None = None) -> None:
    description = "Time the temporal feedback loop's training step on one CPU thread."
    options = arguments(description, "feedback_loop", "smaller cases, fewer repetitions", given)
    torch.set_num_threads(1)
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        result = measure(case)
        results.append(result)
        verdict = "" if case.target is None else f", target {case.target}x {'met' if result['met'] else 'NOT met'}"
        print(f"B={case.sessions} T={case.steps}: {case.faster} against {case.slower} {_said(result)}{verdict}")
    write_record(options.output, {"quick": options.quick, "environment": environment(), "cases": results})


if __name__ == "__main__":
    main()
