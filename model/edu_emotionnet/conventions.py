"""What data and models agree on. Free of PyTorch, whose import would cost every process that only prepares data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MODALITIES = ("audio", "visual", "text")
"""Order of the modality axis everywhere (A, V, T of the paper); a corpus may use a subset, in this order."""

IGNORED_LABEL = -100
"""Label of a step without annotation, and of padding; PyTorch's default ``ignore_index``."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean and standard deviation of every feature over the observed steps of the training split."""

    mean: Mapping[str, Sequence[float]]
    std: Mapping[str, Sequence[float]]

    @classmethod
    def identity(cls, dimensions: Mapping[str, int]) -> FeatureStatistics:
        """Statistics that change nothing, for data that is already standardised."""
        return cls(
            mean={name: [0.0] * size for name, size in dimensions.items()},
            std={name: [1.0] * size for name, size in dimensions.items()},
        )
