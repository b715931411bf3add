"""Media files, decoded by PyAV piece by piece and guarded.

Whatever a file claims, memory stays bounded: a few seconds of sound or one picture at a time. Whatever it holds, time
stays bounded: what is longer, larger or faster than the limits is refused, where possible before decoding it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
from av.audio import AudioStream
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video import VideoStream
from av.video.frame import VideoFrame

from emolab.names import UserError

_SAMPLE_RATES = (4_000, 384_000)
_MOST_PIXELS = 7680 * 4320
_MOST_FRAMES_PER_SECOND = 300
_BACKWARDS = 1.0
_ROUNDING = 1e-6
"""Seconds: containers store rounded times."""
_UNKNOWN_LENGTH = 2**32 - 1 - 8
"""What a WAV file that was written to a pipe promises."""
_FORMATS = "mov,matroska,webm,avi,wav,w64,aiff,caf,flac,ogg,mp3,aac,mpeg,mpegts,flv,asf"
_EXACT_LENGTHS = {"mov", "matroska", "avi", "flac", "wav"}
"""Containers that know how long they are; others (MP3) guess, and a wrong guess is no damage."""

Kind = Literal["audio", "video"]


class UnusableMediaError(UserError):
    """A media file, or a transcript, that cannot be used, and why."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A media file and the second of the session's clock at which it begins."""

    path: Path
    offset: float = 0.0
    seconds: float = math.inf
    """How much of the file belongs to the session."""

    @property
    def end(self) -> float:
        """The second of the session's clock at which it ends at the latest."""
        return self.offset + self.seconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a session may ask of a machine."""

    seconds: float = 4 * 3600.0


def frames(clip: Clip, kind: Kind, limits: Limits) -> Iterator[tuple[AudioFrame | VideoFrame, float, float]]:
    """Decoded frames of the first stream of that kind that begin within the clip, with their start and end on the
    session's clock.

    A file without such a stream yields nothing.
    """
    path = clip.path
    with _opened(path) as container:
        stream = next((s for s in container.streams if s.type == kind and not _is_cover(s)), None)
        if not isinstance(stream, AudioStream | VideoStream):
            return
        declared = _declared_seconds(container, stream)
        _refuse_absurd(path, stream, declared, limits)
        stream.codec_context.thread_count = 1  # sessions run side by side already
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        zero = (container.start_time or 0) / av.time_base
        end, latest, count = 0.0, 0.0, 0
        for frame in container.decode(stream):
            assert isinstance(frame, AudioFrame | VideoFrame)
            count += 1
            start = end if frame.time is None else frame.time - zero
            if start >= clip.seconds - _ROUNDING:
                return
            if start < latest - _BACKWARDS:
                raise UnusableMediaError(f"{path.name}: its times run backwards, from {latest:.2f} to {start:.2f} s")
            end = start + _length(frame, stream)
            latest = max(latest, end)
            if clip.offset + latest > limits.seconds or count > limits.seconds * _MOST_FRAMES_PER_SECOND:
                raise _too_long(path, limits)
            yield frame, clip.offset + start, min(clip.offset + end, clip.end)
        if count == 0:
            raise UnusableMediaError(f"{path.name}: its {kind} stream is empty")
        if declared is not None and latest < 0.98 * declared - 0.5:
            raise UnusableMediaError(f"{path.name} is cut off: it ends at {latest:.1f} of {declared:.1f} s")


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """A media file, with FFmpeg's complaints as one line each. No file can make FFmpeg open another one."""
    _refuse_missing_bytes(path)
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    with one_line(path), av.open(str(path), options=options, metadata_errors="replace") as container:
        yield container


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """FFmpeg's complaints about a file as ``UnusableMediaError``."""
    try:
        yield
    except FFmpegError as error:
        raise UnusableMediaError(f"{path.name} cannot be decoded: {error.strerror}") from None


def _refuse_missing_bytes(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(12)
    except OSError as error:
        raise UnusableMediaError(f"{path} cannot be read: {error.strerror}") from None
    if size == 0:
        raise UnusableMediaError(f"{path.name} is empty")
    if header[:4] == b"RIFF" and header[8:] == b"WAVE":
        # FFmpeg reads what is there of a WAV file and calls it whole.
        promised = int.from_bytes(header[4:8], "little") + 8
        if size < promised < _UNKNOWN_LENGTH:
            raise UnusableMediaError(f"{path.name} is cut off: it has {size} of {promised} bytes")


def _refuse_absurd(path: Path, stream: AudioStream | VideoStream, declared: float | None, limits: Limits) -> None:
    if stream.codec_context is None:  # where FFmpeg has no codec for it
        raise UnusableMediaError(f"{path.name}: its {stream.type} stream is in no known format")
    if declared is not None and declared > limits.seconds:
        raise _too_long(path, limits)
    if isinstance(stream, AudioStream):
        low, high = _SAMPLE_RATES
        if not low <= stream.codec_context.sample_rate <= high:
            raise UnusableMediaError(
                f"{path.name}: a sample rate of {stream.codec_context.sample_rate} Hz (expected {low} to {high})"
            )
    elif not 0 < stream.codec_context.width * stream.codec_context.height <= _MOST_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        raise UnusableMediaError(f"{path.name}: pictures of {size} pixels (at most {_MOST_PIXELS} in all)")


def _too_long(path: Path, limits: Limits) -> UnusableMediaError:
    return UnusableMediaError(f"{path.name} goes on after the {limits.seconds / 3600:g} hours of max_hours")


def _declared_seconds(container: InputContainer, stream: AudioStream | VideoStream) -> float | None:
    """How long the file says the stream is, where it knows."""
    if not _EXACT_LENGTHS & set(container.format.name.split(",")):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    hours, *rest = stream.metadata.get("DURATION", "").split(":")  # Matroska, 00:00:05.280000000
    try:
        return 3600 * float(hours) + 60 * float(rest[0]) + float(rest[1])
    except (ValueError, IndexError):
        return None


def _length(frame: AudioFrame | VideoFrame, stream: AudioStream | VideoStream) -> float:
    """Seconds that a frame lasts."""
    if isinstance(frame, AudioFrame):
        return frame.samples / frame.sample_rate
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    rate = stream.average_rate if isinstance(stream, VideoStream) else None
    return 1 / float(rate) if rate else 0.0


def _is_cover(stream: Stream) -> bool:
    """Whether a video stream is only the picture on a record's sleeve."""
    return bool(stream.disposition & Disposition.attached_pic)
