"""A bad network: picture, sound and words suffer in the same steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from emolab.robustness.corruptions.audio_noise import drop_packets
from emolab.robustness.corruptions.catalog import register
from emolab.robustness.corruptions.frame_noise import hold
from emolab.robustness.corruptions.recording import Recording
from emolab.robustness.corruptions.runs import many_runs
from emolab.robustness.corruptions.streams import Stream
from emolab.robustness.corruptions.transcript_noise import misheard

STEPS_HIT = (0.1, 0.2, 0.3, 0.4, 0.5)
RUN_STEPS = 3
BLOCK_PIXELS = (4, 8, 12, 16, 24)
LOSS_INSIDE = 0.5
"""Share of audio packets and of words hit inside a bad step."""


@register("bad_network", stage="recording", joint=True, source="frozen, pixelated video, packet loss, word errors")
def bad_network(recording: Recording, severity: int, stream: Stream) -> Recording:
    """In 10 to 50 % of the steps, which come in runs, half of the audio packets are silent, half of the words carry
    an error, and the last picture before the run stands still in coarse blocks."""
    bad = many_runs(recording.num_steps, STEPS_HIT[severity - 1], RUN_STEPS, stream)
    if recording.waveform is not None:
        recording = replace(recording, waveform=drop_packets(recording, stream, LOSS_INSIDE, bad))
    if recording.frames is not None:
        frozen = bad[_steps_of(np.arange(len(recording.frames)) / recording.frame_rate, recording)]
        frames = recording.frames[hold(frozen)]
        frames[frozen] = pixelated(frames[frozen], BLOCK_PIXELS[severity - 1])
        recording = replace(recording, frames=frames)
    if recording.words:
        inside = bad[_steps_of(np.array([word.start for word in recording.words]), recording)]
        hit = inside & (stream.uniform("words", len(recording.words)) < LOSS_INSIDE)
        recording = replace(recording, words=misheard(recording, stream, hit))
    return recording


def _steps_of(seconds: NDArray[np.floating], recording: Recording) -> NDArray[np.int64]:
    step = (seconds / recording.step_seconds).astype(np.int64)
    return np.clip(step, 0, recording.num_steps - 1)


def pixelated(frames: NDArray[np.uint8], block: int) -> NDArray[np.uint8]:
    """(T, H, W, 3) with every block of pixels in its mean colour; blocks at the edge may be smaller."""
    if not frames.size:
        return frames
    rows, columns = np.arange(0, frames.shape[1], block), np.arange(0, frames.shape[2], block)
    sums = np.add.reduceat(np.add.reduceat(frames.astype(np.float32), rows, axis=1), columns, axis=2)
    high = np.bincount(np.arange(frames.shape[1]) // block)
    wide = np.bincount(np.arange(frames.shape[2]) // block)
    means = np.rint(sums / (high[:, None, None] * wide[:, None])).astype(np.uint8)
    return np.repeat(np.repeat(means, high, axis=1), wide, axis=2)
