"""Live inference: one step of a session at a time, equal to the forward pass over the whole session.

    live = streaming("edu_emotionnet", model, dimensions={"audio": 40, "visual": 512, "text": 768})
    session = live.open()
    said = session.step({"audio": vector, "visual": None, "text": vector})     # None: not observed

Edu-EmotionNet, its ablations and readings of eq. 4 carry their state from step to step (``streaming_network.py``).
Other causal models of the zoo have no such form: they keep what they were given and run the whole prefix again,
which ``StreamingModel.recomputes`` says. Models that look ahead are refused.

With ``window=n`` memory is constant. It is a model of its own, defined by a band: in every encoder layer, and in
eq. 4, the query at t sees the keys of steps t-n+1 .. t (in eq. 4 under `window:m` those of the last min(m, n)).
Positions still count from the session's first step and the feedback y_{t-1} is kept, so up to step n nothing
differs from an unlimited history, and through the layers a step reaches back further than n.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edu_emotionnet import zoo
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL
from edu_emotionnet.network import EduEmotionNet
from edu_emotionnet.streaming_network import SessionMemory, StreamingNetwork

StepFeatures = Mapping[str, Tensor | None]
"""Modality -> (D_m,) raw features of one step; None, or no such key, where it was not observed."""


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """What a model says of one step."""

    probabilities: Tensor
    """(K,) class probabilities."""
    confidence: Tensor | None
    """(M,) weight of each modality, as ``Predictions.confidence``; None where a model has none."""


class SessionStream(ABC):
    """A session under way."""

    steps: int = 0
    """How many steps were taken."""

    @abstractmethod
    def step(self, features: StepFeatures) -> StepPrediction:
        """The next step.

        Raises:
            ValueError: an unknown modality, a wrong width, or values that are not finite or so large that the answer is
                not. The session is as it was before and can go on.
        """


@dataclass(frozen=True, kw_only=True)
class StreamingModel(ABC):
    """A trained model, ready to follow any number of sessions; they share its weights."""

    dimensions: Mapping[str, int]
    """Modality -> number of features."""
    recomputes: bool
    """Whether every step runs the whole prefix again: the time and memory of a step then grow with the session."""

    @abstractmethod
    def open(self) -> SessionStream:
        """A new session, before its first step."""


def streaming(
    name: str, model: nn.Module, *, dimensions: Mapping[str, int], window: int | None = None
) -> StreamingModel:
    """The streaming form of a trained model.

    Args:
        name: of the zoo.
        model: its module; taken in evaluation mode. Its weights are copied where they are stacked.
        dimensions: modality -> number of features, those the model was built with.
        window: see above; None keeps the whole history, in caches that grow by doubling.

    Raises:
        ValueError: the model looks ahead, a window below 1, or a window for a model without a streaming form.
    """
    if not zoo.entry(name).causal:
        raise ValueError(
            f"model {name!r} looks ahead: what it says of a step depends on later ones, so it cannot stream"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 step, got {window}")
    model = model.eval()
    if isinstance(model, EduEmotionNet):
        network = StreamingNetwork(model)
        return _CachedModel(dimensions=dict(dimensions), recomputes=False, network=network, window=window)
    if window is not None:
        raise ValueError(f"model {name!r} has no streaming form and recomputes the prefix: it takes no window")
    return _RecomputingModel(dimensions=dict(dimensions), recomputes=True, model=model)


@dataclass(frozen=True, kw_only=True)
class _CachedModel(StreamingModel):
    network: StreamingNetwork
    window: int | None

    def open(self) -> SessionStream:
        return _CachedStream(self)


class _CachedStream(SessionStream):
    """Carries key/value caches and the previous prediction."""

    def __init__(self, owner: _CachedModel) -> None:
        self._owner = owner
        self._memory = SessionMemory(owner.network, window=owner.window)

    @torch.inference_mode()
    def step(self, features: StepFeatures) -> StepPrediction:
        network = self._owner.network
        check(features, self._owner.dimensions)
        with np.errstate(over="ignore", invalid="ignore"):  # the answer shows it
            h = network.embed(features, self._memory.begin_step())
            log_probabilities, weights = network.advance(h, self._memory.caches, self._memory.belief)
        probabilities = log_probabilities.exp()
        if not math.isfinite(probabilities.sum()):
            raise ValueError(not_finite(features))
        self._memory.end_step(probabilities)
        self.steps += 1
        return StepPrediction(probabilities=probabilities[0].clone(), confidence=weights)


@dataclass(frozen=True, kw_only=True)
class _RecomputingModel(StreamingModel):
    model: nn.Module

    def open(self) -> SessionStream:
        return _RecomputingStream(self)


class _RecomputingStream(SessionStream):
    """Keeps the session and runs the model over all of it at every step."""

    def __init__(self, owner: _RecomputingModel) -> None:
        self._owner = owner
        self._rows: dict[str, list[Tensor]] = {name: [] for name in owner.dimensions}
        self._present: dict[str, list[bool]] = {name: [] for name in owner.dimensions}

    @torch.inference_mode()
    def step(self, features: StepFeatures) -> StepPrediction:
        check(features, self._owner.dimensions)
        for value in features.values():
            if value is not None and not value.isfinite().all():  # some models answer to infinity with a number
                raise ValueError(not_finite(features))
        rows, present = {}, {}
        for name, width in self._owner.dimensions.items():
            value = features.get(name)
            rows[name] = [*self._rows[name], torch.zeros(width) if value is None else value]
            present[name] = [*self._present[name], value is not None]
        said: Predictions = self._owner.model(self._batch(rows, present))
        probabilities = said.log_probabilities[0, -1].exp()
        if not math.isfinite(probabilities.sum()):
            raise ValueError(not_finite(features))
        self._rows, self._present = rows, present
        self.steps += 1
        return StepPrediction(
            probabilities=probabilities, confidence=None if said.confidence is None else said.confidence[0, -1]
        )

    def _batch(self, rows: Mapping[str, list[Tensor]], present: Mapping[str, list[bool]]) -> SessionBatch:
        like = next(parameter for parameter in self._owner.model.parameters())
        steps = self.steps + 1
        return SessionBatch(
            features={name: torch.stack(values)[None].to(like) for name, values in rows.items()},
            present={name: torch.tensor(mask)[None] for name, mask in present.items()},
            lengths=torch.tensor([steps]),
            labels=torch.full((1, steps), IGNORED_LABEL),
        )


def check(features: StepFeatures, dimensions: Mapping[str, int]) -> None:
    """Refuse what cannot be one step of a session.

    Raises:
        ValueError: an unknown modality or a wrong width.
    """
    for name, value in features.items():
        if name not in dimensions:
            raise ValueError(f"unknown modality {name!r}: the model takes {', '.join(dimensions)}")
        if value is not None and value.shape != (dimensions[name],):
            raise ValueError(f"{name} needs {dimensions[name]} features, got {tuple(value.shape)}")


def not_finite(features: StepFeatures) -> str:
    """The message about values that the model has no answer to."""
    bad = [name for name, value in features.items() if value is not None and not value.isfinite().all()]
    return f"{', '.join(bad)} features are not finite" if bad else "the features are too large for float32"
