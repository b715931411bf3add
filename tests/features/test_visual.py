"""ResNet features against torchvision called directly on the same frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.features.media_files import real_media, resnet, save_resnet

from emolab.features.decoding import Clip, Limits
from emolab.features.signals import Picture, Pictures
from emolab.features.visual import VisualSettings


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> VisualSettings:
    """Settings as a user gives them: a state file on disk."""
    return VisualSettings(weights=str(save_resnet(tmp_path_factory.mktemp("models") / "resnet18.safetensors")))


def torchvision_features(pictures: Sequence[Picture]) -> np.ndarray:
    """(n, 512): torchvision's own preprocessing and every layer but the last."""
    from torchvision.transforms.functional import normalize, to_tensor

    images = torch.stack(
        [normalize(to_tensor(p.pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for p in pictures]
    )
    body = torch.nn.Sequential(*list(resnet().children())[:-1])
    with torch.no_grad():
        return body(images).flatten(1).numpy()


def test_features_of_a_real_face_are_torchvisions(chosen: VisualSettings) -> None:
    clip = Clip(path=real_media() / "video" / "carphone_pristine.mp4")
    pictures = list(Pictures([clip], chosen.frames_per_second, Limits()))
    features, present = chosen.build()(pictures, 1.0)
    assert present.tolist() == [True] * 4
    expected = torchvision_features(pictures)
    steps = np.floor([picture.seconds + 1e-6 for picture in pictures]).astype(int)
    for step in range(4):
        np.testing.assert_allclose(features[step], expected[steps == step].mean(axis=0), atol=1e-5, rtol=1e-5)
    assert np.abs(features[0] - features[3]).max() > 1e-3, "the face moves"


def test_a_step_without_a_picture_is_absent(chosen: VisualSettings) -> None:
    pixels = np.zeros((224, 224, 3), np.uint8)
    features, present = chosen.build()([Picture(0.2, pixels), Picture(3.1, pixels)], 1.0)
    assert present.tolist() == [True, False, False, True]
    assert not features[1:3].any()
    nothing, none = chosen.build()([], 1.0)
    assert nothing.shape == (0, 512)
    assert none.shape == (0,)


def test_a_pth_file_of_the_same_weights_gives_the_same_features(chosen: VisualSettings, tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "resnet18.pth")
    other = VisualSettings(weights=str(tmp_path / "resnet18.pth"))
    picture = [Picture(0.0, np.random.default_rng(0).integers(0, 255, (224, 224, 3)).astype(np.uint8))]
    np.testing.assert_array_equal(other.build()(picture, 1.0)[0], chosen.build()(picture, 1.0)[0])
    assert other.identity() != chosen.identity(), "other bytes, another digest"


def test_it_says_what_it_was_made_with(chosen: VisualSettings) -> None:
    said = chosen.provenance()
    assert (said["depth"], said["frames_per_second"], said["model"]) == (18, 5.0, "resnet18.safetensors")
    assert len(said["sha256"]["resnet18.safetensors"]) == 64
    assert set(said["libraries"]) == {"av", "torch", "torchvision"}
