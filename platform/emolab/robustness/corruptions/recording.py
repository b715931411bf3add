"""Corruption of raw signals, for use when sessions are prepared: before any feature is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emolab.names import UserError
from emolab.robustness.corruptions.catalog import corruption
from emolab.robustness.corruptions.streams import Stream


class Word(NamedTuple):
    """A spoken word and its interval in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The raw signals of one session; None where the session lacks one. Functions return new arrays."""

    session_id: str
    step_seconds: float = 1.0
    waveform: NDArray[np.float32] | None = None
    """(n,) mono."""
    sample_rate: int = 16_000
    """Samples per second."""
    frames: NDArray[np.uint8] | None = None
    """(T, H, W, 3) RGB."""
    frame_rate: float = 30.0
    """Frames per second."""
    words: tuple[Word, ...] | None = None
    """In order of their start."""

    @property
    def seconds(self) -> float:
        """Length of the longest signal."""
        audio = len(self.waveform) / self.sample_rate if self.waveform is not None else 0.0
        video = len(self.frames) / self.frame_rate if self.frames is not None else 0.0
        return max(audio, video, max((word.end for word in self.words or ()), default=0.0))

    @property
    def num_steps(self) -> int:
        return max(1, int(np.ceil(self.seconds / self.step_seconds - 1e-9)))


_SIGNAL = {"audio": "waveform", "frames": "frames", "transcript": "words"}


def corrupt_recording(recording: Recording, name: str, severity: int, *, seed: int = 0) -> Recording:
    """A recording under a corruption of raw signals; a function of its arguments alone. Severity 0 changes nothing.

    A signal that the recording lacks stays absent.

    Raises:
        UserError: unknown corruption or severity, or a corruption of features.
    """
    chosen = corruption(name)
    if chosen.stage == "features":
        raise UserError(f"corruption {name!r} works on prepared features, not on raw signals")
    chosen.check_level(severity)
    needed = _SIGNAL.get(chosen.stage)
    if severity == 0 or (needed and getattr(recording, needed) is None):
        return recording
    stream = Stream(session_id=recording.session_id, modality=chosen.stage, corruption=name, seed=seed)
    return chosen.apply(recording, int(severity), stream)
