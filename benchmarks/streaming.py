"""One step of live inference at the paper's size, with 300 steps of history, on one core.

    python benchmarks/streaming.py            # about a minute
    python benchmarks/streaming.py --quick    # fewer repetitions

Variants: `stream`, the streaming form; `recompute`, the textbook way, the forward pass over the prefix; `read`, one
pass over as many bytes as a step has to read, the weights and the keys and values of the history, in one piece of
memory: the bound of any form in float32. Before anything is timed all steps' answers must agree to 1e-6. CPU time of
this process, interleaved A B C C B A; the median step also in wall time. Writes benchmarks/results/streaming.json.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy reads it

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from measurement import arguments, environment, interleaved, minimum_and_median, ratio, write_record

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL
from edu_emotionnet.network import EduEmotionNetConfig
from edu_emotionnet.streaming import SessionStream, StepFeatures, streaming
from edu_emotionnet.zoo import build

DIMENSIONS = {"audio": 40, "visual": 512, "text": 768}
HISTORY, STEPS, TOLERANCE = 300, 20, 1e-6


def main(given: list[str] | None = None) -> None:
    options = arguments("Time one step of live inference.", "streaming", "fewer repetitions", given)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = EduEmotionNetConfig()
    model = build("edu_emotionnet", config, dimensions=DIMENSIONS, classes=4).eval()
    inputs = {name: torch.randn(HISTORY + STEPS, size) for name, size in DIMENSIONS.items()}
    live = streaming("edu_emotionnet", model, dimensions=DIMENSIONS)

    def prefix(steps: int) -> SessionBatch:
        return SessionBatch(
            features={name: value[None, :steps] for name, value in inputs.items()},
            present={name: torch.ones(1, steps, dtype=torch.bool) for name in inputs},
            lengths=torch.tensor([steps]),
            labels=torch.full((1, steps), IGNORED_LABEL),
        )

    def features(step: int) -> StepFeatures:
        return {name: value[step] for name, value in inputs.items()}

    def warm() -> SessionStream:
        session = live.open()
        for step in range(HISTORY):
            session.step(features(step))
        return session

    @torch.inference_mode()
    def recompute() -> torch.Tensor:
        return model(prefix(HISTORY)).log_probabilities.exp()

    difference, session = 0.0, live.open()
    with torch.inference_mode():
        whole = model(prefix(HISTORY + STEPS)).log_probabilities.exp()[0]
    for step in range(HISTORY + STEPS):
        difference = max(difference, float((session.step(features(step)).probabilities - whole[step]).abs().max()))
    assert difference <= TOLERANCE, difference

    weights = sum(value.nbytes for value in model.parameters())
    history = (config.layers + 1) * len(DIMENSIONS) * HISTORY * 2 * config.d_model * 4
    memory = np.ones((weights + history) // 4, np.float32)  # numpy's, as in the streaming form: see its `pieces`
    measured: dict[str, list[float]] = {"stream": [], "recompute": [], "read": []}
    walls: list[float] = []
    for _ in range(2 if options.quick else 5):
        fresh = warm()
        seconds = interleaved(
            {"stream": steps_of(fresh, features), "recompute": recompute, "read": lambda: np.dot(memory, memory)},
            1,
            warm_up=False,
        )
        seconds["stream"] = [value / (STEPS // 2) for value in seconds["stream"]]
        for name, values in seconds.items():
            measured[name] += values
        walls += wall_times(warm(), features)
    record = {
        "quick": options.quick,
        "history": HISTORY,
        "environment": environment(),
        "largest_difference": difference,
        "seconds": minimum_and_median(measured),
        "wall_seconds_of_a_step": {"min": min(walls), "median": statistics.median(walls)},
        "recompute_over_stream": ratio(measured, "recompute", "stream"),
        "stream_over_read": ratio(measured, "stream", "read"),
        "weights_bytes": weights,
        "history_bytes": history,
        "targets": {"median_step_seconds": 0.002, "recompute_over_stream": 50.0},
    }
    write_record(options.output, record)
    print(f"{record['seconds']} {record['wall_seconds_of_a_step']} {record['recompute_over_stream']}")


def steps_of(session: SessionStream, features: Callable[[int], StepFeatures]) -> Callable[[], None]:
    """Each call takes half of STEPS, from HISTORY on: both halves of A B B A together are STEPS."""

    def run() -> None:
        first = session.steps
        for step in range(first, first + STEPS // 2):
            session.step(features(step))

    return run


def wall_times(session: SessionStream, features: Callable[[int], StepFeatures]) -> list[float]:
    seconds = []
    for step in range(HISTORY, HISTORY + STEPS):
        values = features(step)
        start = time.perf_counter()
        session.step(values)
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
