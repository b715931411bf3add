"""Training step (forward and backward) of the Temporal Feedback Loop on a GPU: the kernel against which loops.

    python benchmarks/feedback_loop_gpu.py            # about a minute
    python benchmarks/feedback_loop_gpu.py --quick    # fewer steps and repetitions, says nothing certain

Wall time until the GPU is done, variants interleaved A B B A, minimum and median. Before anything is timed, every
variant must agree with a loop in double precision, in output and gradients. Writes JSON with the versions and the
hardware, by default benchmarks/results/feedback_loop_gpu.json.

Variants: `kernel`, what TemporalFeedbackLoop.forward does on a GPU; `graph`, the plain loop over unbind and its
gradient captured in a CUDA graph, the honest fast baseline, which launches without Python; `eager`, that loop as it is;
`sliced`, the textbook loop that indexes z[:, t]; `linear`, the hoisted matrix product alone with its backward pass,
which no variant can undercut. Products are in float32 proper, not TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from feedback_loop import TOLERANCE, WIDTH, Forward, linear, problem, sliced, unrolled
from measurement import (
    arguments,
    environment,
    gpu_clock,
    interleaved,
    largest_difference,
    minimum_and_median,
    ratio,
    require_gpu,
    write_record,
)
from torch import Tensor

from edu_emotionnet.feedback import TemporalFeedbackLoop
from edu_emotionnet.feedback_kernel import FeedbackScan

TARGETS = {"eager": 50.0, "graph": 5.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """B sessions of T steps."""

    sessions: int
    steps: int
    rounds: int
    claimed: bool = False
    """Whether the targets are of this case."""


CASES = (
    Case(sessions=128, steps=300, rounds=5, claimed=True),
    Case(sessions=128, steps=100, rounds=5),
    Case(sessions=8, steps=300, rounds=5),
)
QUICK_CASES = (Case(sessions=16, steps=50, rounds=2),)

Step = Callable[[], Sequence[Tensor]]


def kernel(loop: TemporalFeedbackLoop, z: Tensor) -> Tensor:
    return loop(z)


def training_step(forward: Forward, loop: TemporalFeedbackLoop, z: Tensor, upstream: Tensor) -> Step:
    """The log-probabilities, then the gradients of z and of every parameter that takes part."""
    leaves = [z, *(loop.fused.parameters() if forward is linear else loop.parameters())]

    def run() -> list[Tensor]:
        output = forward(loop, z)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

    return run


def captured(step: Step) -> Step:
    """The same work as a CUDA graph: replayed, it answers in the tensors of its capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries allocate what they need before the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return answer

    return replay


def measure(case: Case) -> dict[str, Any]:
    """A case's times, and the ratios of the minima and of the medians over every baseline.

    Raises:
        AssertionError: a variant computes something else, or the kernel was not used.
    """
    loop, z, upstream = _on_gpu(problem(case.sessions, case.steps))
    assert FeedbackScan.__name__ in _functions_behind(loop(z))
    wide = torch.randn_like(z)
    steps: dict[str, Step] = {
        "kernel": training_step(kernel, loop, z, upstream),
        "graph": captured(training_step(unrolled, loop, z, upstream)),
        "eager": training_step(unrolled, loop, z, upstream),
        "sliced": training_step(sliced, loop, z, upstream),
        "linear": training_step(linear, loop, z, wide),
    }
    exact = training_step(unrolled, *_on_gpu(problem(case.sessions, case.steps, torch.float64)))()
    differences = {name: largest_difference(steps[name](), exact) for name in ("kernel", "graph", "eager", "sliced")}
    assert max(differences.values()) <= TOLERANCE, differences
    seconds = interleaved(steps, case.rounds, clock=gpu_clock)
    ratios = {name: ratio(seconds, name, "kernel") for name in steps if name != "kernel"}
    return {
        **asdict(case),
        "width": WIDTH,
        "seconds": minimum_and_median(seconds),
        "ratio": ratios,
        "met": all(min(ratios[name].values()) >= target for name, target in TARGETS.items()) if case.claimed else None,
        "relative_difference_from_float64": differences,
    }


def _on_gpu(given: tuple[TemporalFeedbackLoop, Tensor, Tensor]) -> tuple[TemporalFeedbackLoop, Tensor, Tensor]:
    loop, z, upstream = given
    return loop.cuda(), z.detach().cuda().requires_grad_(), upstream.cuda()


def _functions_behind(output: Tensor) -> str:
    """Names of the functions in the last few levels of an output's graph."""
    names, level = [], [output.grad_fn]
    for _ in range(4):
        names += [type(function).__name__ for function in level]
        level = [function for parent in level if parent for function, _ in parent.next_functions]
    return " ".join(names)


def main(given: list[str] | None = None) -> None:
    options = arguments("Time the feedback loop's training step on a GPU.", "feedback_loop_gpu", "smaller", given)
    require_gpu()
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        result = measure(case)
        results.append(result)
        took = {name: f"{1000 * found['min']:.2f} ms" for name, found in result["seconds"].items()}
        print(f"B={case.sessions} T={case.steps}: {took}", flush=True)
        for name, found in result["ratio"].items():
            target = f", target {TARGETS[name]}x" if case.claimed and name in TARGETS else ""
            print(f"  {found['min']:.1f}x (median {found['median']:.1f}x) over {name}{target}", flush=True)
    write_record(options.output, {"quick": options.quick, "environment": environment(), "cases": results})


if __name__ == "__main__":
    main()
