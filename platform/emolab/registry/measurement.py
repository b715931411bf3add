"""Loading and timing a registered model in a clean process: the last check before learners depend on it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emolab.registry.verdict import Missing

REPETITIONS = 15
SECONDS = 240.0
"""A model that has not answered by then will not."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """How a registered model answers in a process that has nothing but MLflow."""

    milliseconds: float
    """Median over the repetitions, one whole session at a time, one thread."""
    slowest: float
    steps: int
    """Length of that session."""

    @property
    def per_step(self) -> float:
        """Milliseconds."""
        return self.milliseconds / self.steps


def measure(folder: Path, *, steps: int, repetitions: int = REPETITIONS, seconds: float = SECONDS) -> Served | Missing:
    """Load a registered model without this platform and without pickle, and time its answers.

    Args:
        folder: the MLflow model.
        steps: length of the session that is timed.
        repetitions: timed calls; one more warms up.
        seconds: after which it is given up.
    """
    request = {"folder": str(folder.resolve()), "steps": steps, "repetitions": repetitions}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW_"))}
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            child = subprocess.run(
                [sys.executable, "-I", str(Path(__file__).with_name("clean_process.py"))],
                input=json.dumps(request), capture_output=True, text=True, timeout=seconds, cwd=elsewhere,
                env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Missing(reason=f"it did not answer within {seconds:.0f} s")
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        return Missing(reason=f"it does not load and answer in a clean process ({last[:200]})")
    taken = json.loads(child.stdout.strip().splitlines()[-1])["seconds"]
    return Served(milliseconds=1000 * statistics.median(taken), slowest=1000 * max(taken), steps=steps)


def machine() -> dict[str, Any]:
    """Where the time was taken."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
