"""Which steps a corruption that comes in runs takes; every choice grows with the rate (nested)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from emolab.robustness.corruptions.streams import Stream


def one_run(steps: int, taken: int, anchor: float) -> NDArray[np.bool_]:
    """(steps,) mask of one contiguous run of ``taken`` steps around an anchor in [0, 1)."""
    start = int(anchor * (steps - taken))
    mask = np.zeros(steps, dtype=np.bool_)
    mask[start : start + taken] = True
    return mask


def two_runs(steps: int, rate: float, stream: Stream) -> NDArray[np.bool_]:
    """(steps,) mask of round(rate * steps) steps in at most two contiguous runs, one in each half of the session.

    At rates of 0.1 to 0.9 a run covers 5 to 45 % of the session. Its start only moves to the left and its end
    only to the right as the rate grows.
    """
    first_half = steps // 2
    taken = round(rate * steps)
    in_first = taken * first_half // steps
    anchors = stream.uniform("anchors", 2)
    return np.concatenate(
        [
            one_run(first_half, in_first, anchors[0]),
            one_run(steps - first_half, taken - in_first, anchors[1]),
        ]
    )


def many_runs(steps: int, rate: float, span: int, stream: Stream) -> NDArray[np.bool_]:
    """(steps,) mask of round(rate * steps) steps that tend to come in runs of about ``span`` steps, as on a bad link.

    The steps with the lowest values of a smoothed random sequence are taken.
    """
    field = uniform_filter1d(stream.uniform("runs", steps), size=max(1, span), mode="reflect")
    mask = np.zeros(steps, dtype=np.bool_)
    mask[np.argsort(field, kind="stable")[: round(rate * steps)]] = True
    return mask


def last_before(usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T,) index of the last usable step at or before each step, -1 where there is none."""
    return np.maximum.accumulate(np.where(usable, np.arange(len(usable)), -1))
