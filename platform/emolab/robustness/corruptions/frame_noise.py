"""Noise on RGB frames, severities 1 to 5 (tables of ImageNet-C, Hendrycks and Dietterich 2019).

Noise differs from frame to frame; an occlusion stays where it is. Frames are worked on a few at a time, so that
a long clip needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torchvision.io import decode_jpeg, encode_jpeg

from emolab.robustness.corruptions.catalog import register
from emolab.robustness.corruptions.recording import Recording
from emolab.robustness.corruptions.runs import last_before, many_runs
from emolab.robustness.corruptions.streams import Stream

GAUSSIAN_SIGMA = (0.08, 0.12, 0.18, 0.26, 0.38)
SHOT_PHOTONS = (60, 25, 12, 5, 3)
IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)
BLUR_SIGMA = (1, 2, 3, 4, 6)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
JPEG_QUALITY = (25, 18, 15, 10, 7)
OCCLUDED_AREA = (0.1, 0.2, 0.3, 0.4, 0.5)
FROZEN_SHARE = (0.1, 0.2, 0.3, 0.4, 0.5)
FRAMES_AT_A_TIME = 32

Frames = NDArray[np.uint8]
Unit = NDArray[np.float32]


def _frames(recording: Recording) -> Frames:
    assert recording.frames is not None  # corrupt_recording has looked
    return recording.frames


def _on_unit_scale(recording: Recording, change: Callable[[Unit], NDArray[np.floating]]) -> Recording:
    """Apply a function of (n, H, W, 3) in [0, 1] to all frames, in order, and round back to bytes."""
    frames = _frames(recording)
    changed = np.empty_like(frames)
    for first in range(0, len(frames), FRAMES_AT_A_TIME):
        some = slice(first, first + FRAMES_AT_A_TIME)
        unit = change(frames[some].astype(np.float32) / np.float32(255))
        changed[some] = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return replace(recording, frames=changed)


@register("frame_gaussian_noise", stage="frames", source="ImageNet-C")
def frame_gaussian_noise(recording: Recording, severity: int, stream: Stream) -> Recording:
    generator, sigma = stream.generator("noise"), np.float32(GAUSSIAN_SIGMA[severity - 1])
    return _on_unit_scale(recording, lambda x: x + sigma * generator.standard_normal(x.shape, dtype=np.float32))


@register("frame_shot_noise", stage="frames", source="ImageNet-C")
def frame_shot_noise(recording: Recording, severity: int, stream: Stream) -> Recording:
    generator, photons = stream.generator("noise"), SHOT_PHOTONS[severity - 1]
    return _on_unit_scale(recording, lambda x: generator.poisson(x * photons) / photons)


@register("frame_impulse_noise", stage="frames", source="ImageNet-C")
def frame_impulse_noise(recording: Recording, severity: int, stream: Stream) -> Recording:
    """A share of the values becomes 0 or 1, evenly."""
    generator, share = stream.generator("noise"), IMPULSE_SHARE[severity - 1]

    def strike(x: Unit) -> Unit:
        draws = generator.random(x.shape, dtype=np.float32)
        return np.where(draws < share, (draws < share / 2).astype(np.float32), x)

    return _on_unit_scale(recording, strike)


@register("frame_gaussian_blur", stage="frames", random=False, source="ImageNet-C")
def frame_gaussian_blur(recording: Recording, severity: int, stream: Stream) -> Recording:
    sigma = BLUR_SIGMA[severity - 1]
    return _on_unit_scale(recording, lambda x: gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest"))


@register("frame_contrast", stage="frames", random=False, source="ImageNet-C")
def frame_contrast(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Towards the mean colour of each frame."""

    def flatten(x: Unit) -> Unit:
        mean = x.mean(axis=(1, 2), keepdims=True)
        return (x - mean) * np.float32(CONTRAST[severity - 1]) + mean

    return _on_unit_scale(recording, flatten)


@register("frame_brightness", stage="frames", random=False, source="ImageNet-C")
def frame_brightness(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Adds to the value of the HSV colour, its largest channel, and keeps hue and saturation."""

    def brighten(x: Unit) -> Unit:
        value = x.max(axis=-1, keepdims=True)
        brighter = np.minimum(value + np.float32(BRIGHTNESS[severity - 1]), 1)
        # Black has neither hue nor saturation: it becomes grey.
        return np.where(value > 0, x * (brighter / np.maximum(value, np.float32(1e-6))), brighter)

    return _on_unit_scale(recording, brighten)


@register("frame_jpeg", stage="frames", random=False, source="ImageNet-C")
def frame_jpeg(recording: Recording, severity: int, stream: Stream) -> Recording:
    images = torch.from_numpy(np.ascontiguousarray(_frames(recording))).permute(0, 3, 1, 2)
    decoded = [_through_jpeg(image.contiguous(), JPEG_QUALITY[severity - 1]) for image in images]
    return replace(recording, frames=torch.stack(decoded).permute(0, 2, 3, 1).contiguous().numpy())


def _through_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    encoded = encode_jpeg(image, quality)
    assert isinstance(encoded, torch.Tensor)  # a list only for a list of images
    decoded = decode_jpeg(encoded)
    assert isinstance(decoded, torch.Tensor)
    return decoded


@register("frame_occlusion", stage="frames", source="a black rectangle over 10 to 50 % of the picture")
def frame_occlusion(recording: Recording, severity: int, stream: Stream) -> Recording:
    """The rectangle has the proportions of the picture and keeps its place throughout the clip."""
    frames = _frames(recording).copy()
    height, width = frames.shape[1:3]
    side = OCCLUDED_AREA[severity - 1] ** 0.5
    rows, columns = round(side * height), round(side * width)
    down, across = stream.uniform("place", 2)
    top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
    frames[:, top : top + rows, left : left + columns] = 0
    return replace(recording, frames=frames)


@register("frame_freeze", stage="frames", fill="last value", source="10 to 50 % of the frames repeat the last one")
def frame_freeze(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Freezes last about a second; the first frame is never frozen."""
    frames = _frames(recording)
    frozen = many_runs(len(frames), FROZEN_SHARE[severity - 1], round(recording.frame_rate), stream)
    return replace(recording, frames=frames[hold(frozen)])


def hold(frozen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T,) index of the frame shown at each time: the last one that was not frozen, at first the very first."""
    return np.maximum(last_before(~frozen), 0)
