"""Features of pictures: what a ResNet (He et al. 2016) sees, before it decides on one of ImageNet's classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from emolab.configuration import Settings
from emolab.features.grid import StepMeans
from emolab.features.signals import PICTURE_SIZE, Picture
from emolab.features.weights import ModelName, Weights, device, find_state, load_state, versions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_WIDTHS = {18: 512, 34: 512, 50: 2048}
_PICTURES_AT_A_TIME = 16


class VisualSettings(Settings):
    """How pictures become features."""

    extractor: Literal["resnet", "none"] = Field(default="resnet", description="none leaves the picture out")
    depth: Literal[18, 34, 50] = Field(default=18, description="layers of the ResNet")
    weights: ModelName | None = Field(
        default=None,
        description="state file (.safetensors, .pth), folder or name in the hub cache; null: timm/resnet*.tv_in1k",
    )
    revision: str | None = Field(default=None, description="of a name in the hub cache; null: main")
    frames_per_second: float = Field(default=5.0, gt=0.0, le=120.0, description="pictures looked at; the paper has 30")

    @property
    def used(self) -> bool:
        return self.extractor != "none"

    @property
    def uses_gpu(self) -> bool:
        return self.used

    @property
    def width(self) -> int:
        """Features per step."""
        return _WIDTHS[self.depth]

    def build(self) -> VisualExtractor:
        """The extractor, its weights loaded.

        Raises:
            UserError: the weights are not on this machine, or not those of the model.
        """
        return VisualExtractor(self.depth, self._weights())

    def identity(self) -> dict[str, Any]:
        """What decides the features, wherever the weights lie."""
        if not self.used:
            return {"extractor": "none"}
        return {
            "extractor": self.extractor,
            "depth": self.depth,
            "frames_per_second": self.frames_per_second,
            "picture_size": PICTURE_SIZE,
        } | self._weights().identity()

    def provenance(self) -> dict[str, Any]:
        """Model, revision, digests, parameters, library versions; JSON values."""
        origin = self._weights().origin() if self.used else {}
        return self.identity() | origin | {"libraries": versions("av", "torch", "torchvision")}

    def _weights(self) -> Weights:
        name = self.weights or f"timm/resnet{self.depth}.tv_in1k"
        return find_state(name, option="visual.weights", revision=self.revision)


class VisualExtractor:
    """Pictures -> per step, the mean of the globally pooled feature maps of the pictures in it."""

    def __init__(self, depth: int, weights: Weights) -> None:
        """Load the network.

        Raises:
            UserError: the file does not hold a ResNet of this depth.
        """
        from torchvision.models import get_model

        self.width = _WIDTHS[depth]
        network = get_model(f"resnet{depth}", weights=None)
        network.fc = nn.Identity()
        load_state(network, weights)
        self.network = network.eval().to(device())
        self.mean = torch.tensor(IMAGENET_MEAN, device=device())[:, None, None]
        self.std = torch.tensor(IMAGENET_STD, device=device())[:, None, None]

    def __call__(
        self, pictures: Iterable[Picture], step_seconds: float
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(T, D) features and (T,) presence."""
        means, source = StepMeans(self.width, step_seconds), iter(pictures)
        while batch := list(itertools.islice(source, _PICTURES_AT_A_TIME)):
            vectors = self.encode(np.stack([picture.pixels for picture in batch]))
            means.add([picture.seconds for picture in batch], vectors)
        return means.result()

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, H, W, 3) RGB -> (n, D)."""
        images = torch.from_numpy(pixels).to(device()).permute(0, 3, 1, 2).float() / 255
        features: Tensor = self.network((images - self.mean) / self.std)
        return features.cpu().numpy()
