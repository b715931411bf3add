"""Features of sound: MFCC (the paper's text) or Wav2Vec2 (the paper's figure 2)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from emolab.configuration import Settings
from emolab.features.mfcc import COEFFICIENTS, HOP, WINDOW, Mfcc
from emolab.features.signals import SAMPLE_RATE
from emolab.features.wav2vec2 import Wav2Vec2
from emolab.features.weights import ModelName, Weights, find_model, hidden_size, versions

AudioExtractor = Mfcc | Wav2Vec2


class AudioSettings(Settings):
    """How sound becomes features."""

    extractor: Literal["mfcc", "wav2vec2", "none"] = Field(default="mfcc", description="none leaves audio out")
    model: ModelName = Field(
        default="facebook/wav2vec2-base",
        validate_default=True,
        description="of wav2vec2: a folder or a name in the hub cache",
    )
    revision: str | None = Field(default=None, description="of a name in the hub cache; null: main")
    window_seconds: float = Field(default=20.0, ge=1.0, le=120.0, description="of wav2vec2: sound read at once")
    context_seconds: float = Field(default=2.0, ge=0.0, le=60.0, description="of wav2vec2: further sound on each side")

    @property
    def used(self) -> bool:
        return self.extractor != "none"

    @property
    def uses_gpu(self) -> bool:
        return self.extractor == "wav2vec2"

    @property
    def width(self) -> int:
        """Features per step."""
        return COEFFICIENTS if self.extractor == "mfcc" else hidden_size(self._weights())

    def build(self) -> AudioExtractor:
        """The extractor, its weights loaded.

        Raises:
            UserError: the weights are not on this machine, or not those of the model.
        """
        if self.extractor == "mfcc":
            return Mfcc()
        return Wav2Vec2(self._weights(), window_seconds=self.window_seconds, context_seconds=self.context_seconds)

    def identity(self) -> dict[str, Any]:
        """What decides the features, wherever the weights lie."""
        parameters: dict[str, Any] = {"extractor": self.extractor, "sample_rate": SAMPLE_RATE}
        if self.extractor == "mfcc":
            window = {"window_ms": 1000 * WINDOW // SAMPLE_RATE, "hop_ms": 1000 * HOP // SAMPLE_RATE}
            return parameters | {"coefficients": COEFFICIENTS, "normalised": "per session"} | window
        if self.extractor == "wav2vec2":
            windows = {"window_seconds": self.window_seconds, "context_seconds": self.context_seconds}
            return parameters | windows | self._weights().identity()
        return {"extractor": "none"}

    def provenance(self) -> dict[str, Any]:
        """Model, revision, digests, parameters, library versions; JSON values."""
        libraries = {"mfcc": ("torchaudio",), "wav2vec2": ("transformers",), "none": ()}[self.extractor]
        origin = self._weights().origin() if self.extractor == "wav2vec2" else {}
        return self.identity() | origin | {"libraries": versions("av", "torch", *libraries)}

    def _weights(self) -> Weights:
        return find_model(self.model, option="audio.model", revision=self.revision)
