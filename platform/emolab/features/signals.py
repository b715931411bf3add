"""Sound and pictures as streams: any media file as mono sound at one rate and as square pictures of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from emolab.features.decoding import Clip, Limits, frames, one_line

SAMPLE_RATE = 16_000
"""Samples per second of everything heard here."""
PICTURE_SIZE = 224
"""Height and width in pixels of everything seen here."""

_CHUNK_SECONDS = 10
_JITTER = 0.1
"""Seconds by which a stream's own clock may run off before the sound counts as interrupted."""


class SoundChunk(NamedTuple):
    """Sound without a gap."""

    seconds: float
    """When it begins."""
    samples: NDArray[np.float32]
    """(n,) mono at SAMPLE_RATE."""
    continues: bool
    """Whether it follows the chunk before without a gap."""


class Picture(NamedTuple):
    """What is seen at a time."""

    seconds: float
    pixels: NDArray[np.uint8]
    """(PICTURE_SIZE, PICTURE_SIZE, 3) RGB: the shorter side is scaled to the size, the middle is kept."""


class Sound:
    """The sound of consecutive files, a few seconds at a time, mixed to mono at SAMPLE_RATE.

    Files without sound yield nothing.

    Raises, while it is iterated:
        UnusableMediaError: a file is damaged, cut off, too long or absurd.
    """

    def __init__(self, clips: Sequence[Clip], limits: Limits) -> None:
        self.clips, self.limits = clips, limits
        self.seconds = 0.0
        """End of what has been yielded."""

    def __iter__(self) -> Iterator[SoundChunk]:
        for clip in self.clips:
            with one_line(clip.path):  # also of the resampler, which sees what the decoder lets pass
                for whole in _chunks(_sound(clip, self.limits)):
                    chunk = _ending(whole, clip.end)
                    self.seconds = max(self.seconds, chunk.seconds + len(chunk.samples) / SAMPLE_RATE)
                    yield chunk


class Pictures:
    """The pictures of consecutive files: the first one in every interval of 1 / ``frames_per_second``.

    Raises, while it is iterated:
        UnusableMediaError: a file is damaged, cut off, too long or absurd.
    """

    def __init__(self, clips: Sequence[Clip], frames_per_second: float, limits: Limits) -> None:
        self.clips, self.frames_per_second, self.limits = clips, frames_per_second, limits
        self.seconds = 0.0
        """End of what has been decoded."""

    def __iter__(self) -> Iterator[Picture]:
        for clip in self.clips:
            square, following = _Square(), -np.inf
            with one_line(clip.path):
                for frame, start, end in frames(clip, "video", self.limits):
                    self.seconds = max(self.seconds, end)
                    interval = np.floor(start * self.frames_per_second + 1e-6)
                    if isinstance(frame, VideoFrame) and interval >= following:
                        following = interval + 1
                        yield Picture(start, square(frame))


class _Square:
    """Scales and crops pictures of any size to the one of Picture; keeps the scaler between them."""

    def __init__(self) -> None:
        self.scaler = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        scale = PICTURE_SIZE / min(frame.width, frame.height)
        width, height = (max(PICTURE_SIZE, round(scale * side)) for side in (frame.width, frame.height))
        scaled = self.scaler.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
        top, left = (height - PICTURE_SIZE) // 2, (width - PICTURE_SIZE) // 2
        middle = scaled.to_ndarray()[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE]
        # A telephone held upright stores its picture lying down and says so.
        return np.ascontiguousarray(np.rot90(middle, round(frame.rotation / 90)), dtype=np.uint8)


def _ending(chunk: SoundChunk, end: float) -> SoundChunk:
    """The chunk as far as a second: what is decoded last may go on a little after the end of its clip."""
    most = (end - chunk.seconds) * SAMPLE_RATE
    return chunk if len(chunk.samples) <= most else chunk._replace(samples=chunk.samples[: max(0, round(most))])


def _chunks(pieces: Iterable[tuple[float, NDArray[np.float32]]]) -> Iterator[SoundChunk]:
    """Pieces of a few milliseconds, each with the start of its uninterrupted run, as chunks of _CHUNK_SECONDS."""
    run, done = -np.inf, 0
    waiting: list[NDArray[np.float32]] = []
    held = 0
    for start, samples in pieces:
        if waiting and (held >= _CHUNK_SECONDS * SAMPLE_RATE or start != run):
            yield SoundChunk(run + done / SAMPLE_RATE, np.concatenate(waiting), continues=done > 0)
            waiting, held, done = [], 0, done + held
        if start != run:
            run, done = start, 0
        waiting.append(samples)
        held += len(samples)
    if waiting:
        yield SoundChunk(run + done / SAMPLE_RATE, np.concatenate(waiting), continues=done > 0)


def _sound(clip: Clip, limits: Limits) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Resampled pieces in order, each with the start of the uninterrupted run that it belongs to."""
    resampler, source = None, None
    run = heard = 0.0
    for frame, start, end in frames(clip, "audio", limits):
        assert isinstance(frame, AudioFrame)
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or kind != source or abs(start - heard) > _JITTER:
            yield from ((run, piece) for piece in _resampled(resampler, None))
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            source, run, heard = kind, start, start
        heard += end - start
        frame.pts = None  # times are kept here; the resampler would pad and squeeze by its own
        yield from ((run, piece) for piece in _resampled(resampler, frame))
    yield from ((run, piece) for piece in _resampled(resampler, None))


def _resampled(resampler: av.AudioResampler | None, frame: AudioFrame | None) -> list[NDArray[np.float32]]:
    if resampler is None:
        return []
    return [np.array(piece.to_ndarray()[0], dtype=np.float32) for piece in resampler.resample(frame)]
