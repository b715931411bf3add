"""Computational sequences of the CMU Multimodal SDK: HDF5 files ``/<root>/data/<video>/{features,intervals}``.

HDF5 can point into other files and can claim any size, so links and storage outside the file are refused, and so is a
sequence larger than any recording gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from emolab.corpora.corpus import RefusedSessionError
from emolab.names import UserError

MAXIMUM_VALUES = 2**27
"""Of one video: 713 features at 30 frames per second for an hour and a half are half of it."""
MAXIMUM_VIDEOS = 1_000_000
MAXIMUM_SECONDS = 24 * 3600

_DAMAGE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError)
"""What h5py raises for damaged files, depending on where the damage is."""


class VideoSequence(NamedTuple):
    """One video's part of a computational sequence."""

    features: NDArray[np.float64]
    """(n, D)."""
    intervals: NDArray[np.float64]
    """(n, 2) start and end in seconds, in the order of the file."""


def video_names(path: Path) -> list[str]:
    """The videos of a file, sorted.

    Raises:
        UserError: the file is missing, damaged or not a computational sequence.
    """
    with _data(path) as data:
        if len(data) > MAXIMUM_VIDEOS:
            raise UserError(f"{path} names {len(data)} videos, expected at most {MAXIMUM_VIDEOS}")
        return sorted(data)


def feature_width(path: Path) -> int:
    """Number of features, from the first video that has any."""
    with _data(path) as data:
        for video in sorted(data):
            shape = _dataset(_member(data, video, h5py.Group), "features").shape
            if len(shape) == 2 and shape[1] > 0:
                return int(shape[1])
    raise UserError(f"{path} holds no features")


def read_video(path: Path, video: str) -> VideoSequence | None:
    """One video, None where the file does not have it.

    Raises:
        RefusedSessionError: what the file holds for this video is damaged or makes no sense.
        UserError: the file as a whole is.
    """
    with _data(path) as data:
        return _sequence(path, data, video) if video in data else None


def read_videos(path: Path) -> dict[str, VideoSequence | str]:
    """Every video by name; in place of one that cannot be used, the reason.

    Raises:
        UserError: the file as a whole is damaged.
    """
    found: dict[str, VideoSequence | str] = {}
    with _data(path) as data:
        for video in sorted(data):
            try:
                found[video] = _sequence(path, data, video)
            except RefusedSessionError as error:
                found[video] = str(error)
    return found


@contextmanager
def _data(path: Path) -> Iterator[Any]:
    """The group with the videos. Whatever HDF5 finds wrong inside becomes one line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with h5py.File(path, "r", locking=False) as file:
            own = [str(name) for name in file if file.get(name, getclass=True, getlink=True) is h5py.HardLink]
            roots = [group for name in own if isinstance(group := file[name], h5py.Group) and "data" in group]
            if len(roots) != 1:
                raise UserError(f"{path}: expected one group with data, found {len(roots)}: not a .csd file")
            yield _member(roots[0], "data", h5py.Group)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or not a .csd file ({' '.join(str(error).split())[:120]})") from None


def _sequence(path: Path, data: Any, video: str) -> VideoSequence:
    try:
        group = _member(data, video, h5py.Group)
        features, intervals = (_array(_dataset(group, name)) for name in ("features", "intervals"))
    except _DAMAGE as error:
        raise RefusedSessionError(
            f"{path}: video {video!r} is damaged ({' '.join(str(error).split())[:120]})"
        ) from None
    if features.ndim != 2 or intervals.shape != (len(features), 2):
        raise RefusedSessionError(
            f"{path}: video {video!r} has features {features.shape} and intervals {intervals.shape}, "
            "expected (n, D) and (n, 2)"
        )
    if not (intervals[:, 0] <= intervals[:, 1]).all() or not (abs(intervals) <= MAXIMUM_SECONDS).all():
        raise RefusedSessionError(
            f"{path}: video {video!r} has an interval that ends before it begins or beyond {MAXIMUM_SECONDS} s"
        )
    return VideoSequence(features, intervals)


def _member(group: Any, name: str, kind: type) -> Any:
    if group.get(name, getclass=True, getlink=True) is not h5py.HardLink:
        raise ValueError(f"{name!r} is missing or a link")
    member = group[name]
    if not isinstance(member, kind):
        raise ValueError(f"{name!r} is not what it should be")
    return member


def _dataset(group: Any, name: str) -> Any:
    member = _member(group, name, h5py.Dataset)
    if member.is_virtual or member.external:
        raise ValueError(f"{name!r} lies in another file")
    if member.dtype.kind not in "fiu" or member.shape is None:
        raise ValueError(f"{name!r} does not hold numbers")
    return member


def _array(dataset: Any) -> NDArray[np.float64]:
    if dataset.size > MAXIMUM_VALUES:
        raise ValueError(f"{dataset.size} values, expected at most {MAXIMUM_VALUES}")
    return np.asarray(dataset[()], dtype=np.float64)
