"""How the features of one session are standardised by themselves, wherever that is done: where data are prepared, where
recordings are predicted, and in a registered model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def standardised(values: NDArray[np.float32], present: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Features to mean 0 and standard deviation 1 over a session's observed steps, per feature.

    A feature that is constant within the session becomes 0, and so does every step that was not observed.

    Args:
        values: (T, D).
        present: (T,).

    Returns:
        (T, D).
    """
    scaled = np.zeros_like(values)
    if present.any():
        observed = values[present].astype(np.float64)
        deviation = observed.std(axis=0)
        scaled[present] = (observed - observed.mean(axis=0)) / np.where(deviation > 1e-6, deviation, np.inf)
    return scaled
