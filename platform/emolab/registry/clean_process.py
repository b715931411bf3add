"""Run as a program of its own: load a registered model the way a stranger would, let it answer, take the time.

Reads {folder, steps, repetitions} as JSON from standard input and prints one line of JSON. It imports neither this
platform nor anything that the model does not bring along, and pickle stays off.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"


class WithoutPlatform(importlib.abc.MetaPathFinder):
    """An installed platform must not be what makes the model work."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] in ("emolab", "ray", "optuna"):
            raise ImportError(f"a registered model must load without {fullname}")


def main() -> None:
    request = json.load(sys.stdin)
    sys.meta_path.insert(0, WithoutPlatform())
    import mlflow.pyfunc
    import torch

    torch.set_num_threads(1)
    model = mlflow.pyfunc.load_model(request["folder"])
    if model.input_example is None:
        raise ValueError("the version has no input example")
    if model.metadata.signature is None:
        raise ValueError("the version has no signature")
    example = list(model.input_example)
    check(model.predict(example), example)
    long = stretched(example[0], request["steps"])
    seconds = []
    for repetition in range(request["repetitions"] + 1):
        started = time.perf_counter()
        model.predict([long])
        if repetition:  # the first one warms up
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds}))


def stretched(session: dict[str, Any], steps: int) -> dict[str, Any]:
    """The session repeated until it is as long as asked for."""
    return {
        name: [value[i % len(value)] for i in range(steps)] if isinstance(value, list) else value
        for name, value in session.items()
    }


def check(answers: Sequence[Any], example: Sequence[dict[str, Any]]) -> None:
    """Refuse answers that are no probabilities."""
    if len(answers) != len(example):
        raise ValueError(f"{len(example)} sessions were asked about, {len(answers)} answered")
    for answer in answers:
        found = answer if isinstance(answer, dict) else answer.model_dump()
        for row in found["probabilities"]:
            if len(row) != len(found["classes"]) or not abs(sum(row) - 1.0) < 1e-4:
                raise ValueError("its answers are no probabilities of the classes")


if __name__ == "__main__":
    main()
