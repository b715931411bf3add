"""How the scripts of this folder measure: CPU time of one process, or wall time of a GPU's work; interleaved; and a
record of where it was."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line, as those of the jobs."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def arguments(description: str, name: str, quick: str, given: Sequence[str] | None = None) -> argparse.Namespace:
    """``quick`` and ``output`` of a script's command line."""
    return parser_for(description, name, quick).parse_args(given)


def parser_for(description: str, name: str, quick: str) -> argparse.ArgumentParser:
    """``--quick`` and ``--output``; the output is results/NAME.json by default."""
    parser = Parser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    return parser


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each variant: forwards through the list, then backwards, ``rounds`` times (A B B A).

    Args:
        clock: CPU time of this process, or ``gpu_clock``.
    """
    if warm_up:
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in (*variants, *reversed(list(variants))):
            start = clock()
            variants[name]()
            seconds[name].append(clock() - start)
    return seconds


def gpu_clock() -> float:
    """Wall time once the GPU has done all it was given: launching counts, as it does for whoever waits."""
    torch.cuda.synchronize()
    return time.perf_counter()


def require_gpu() -> None:
    """End the script in one line where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that PyTorch can use: `emolab` says what was found")


def minimum_and_median(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Variant -> {min, median}."""
    return {name: {"min": min(values), "median": statistics.median(values)} for name, values in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], slower: str, faster: str) -> dict[str, float]:
    """Ratio of the minima and of the medians."""
    found = minimum_and_median(seconds)
    return {which: found[slower][which] / found[faster][which] for which in ("min", "median")}


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Over pairs of tensors, relative to each pair's largest entry."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(first, second, strict=True)
    )


def environment(**more: object) -> dict[str, object]:
    """Versions, hardware and load, with what a script adds."""
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "load_average": os.getloadavg(),
        **more,
    }


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
