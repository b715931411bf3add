"""How many actors a corpus's stages get: always all stages at once, and never more than the cluster has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emolab.cluster import total
from emolab.corpora.corpus import Stage


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Actors of one stage."""

    size: int
    cpus: float
    """Per actor."""
    gpus: float
    """Per actor; 0 where the stage uses none or the cluster has none."""


def cluster_size() -> tuple[float, float]:
    """CPUs and GPUs of the connected cluster, with those that it may get."""
    resources = total()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def plan_pools(stages: Sequence[Stage], *, cpus: float, gpus: float) -> list[Pool]:
    """Fixed pools, in the order of the stages.

    Ray Data runs all stages at the same time; a pool that does not fit beside the others would wait for ever. So
    every stage gets at least one actor, with a part of a CPU where there are fewer CPUs than stages, and what is left
    goes to the stages round by round. Stages on a GPU share the GPUs evenly and get no more actors than GPUs.
    """
    share = _down(min(1.0, cpus / len(stages)))
    on_gpu = [stage.uses_gpu and gpus > 0 for stage in stages]
    gpu_stages = max(1, sum(on_gpu))
    gpu_share = _down(min(1.0, gpus / gpu_stages))
    most = [max(1, int(gpus // gpu_stages)) if gpu else math.inf for gpu in on_gpu]
    sizes = [1] * len(stages)
    left = int(cpus / share + 1e-9) - len(stages) if share >= 1.0 else 0
    while left > 0 and any(size < limit for size, limit in zip(sizes, most, strict=True)):
        for index, limit in enumerate(most):
            if left > 0 and sizes[index] < limit:
                sizes[index] += 1
                left -= 1
    return [
        Pool(size=size, cpus=share, gpus=gpu_share if gpu else 0.0) for size, gpu in zip(sizes, on_gpu, strict=True)
    ]


def _down(share: float) -> float:
    """Ray counts hundredths and finer, but sums of rounded-up shares would exceed the whole."""
    return max(0.01, math.floor(share * 100) / 100)
