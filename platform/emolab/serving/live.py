"""One live session as a conversation: a message per step in, an answer per message out, whatever carries them.

A message is ``{"step": 0, "features": {"audio": [...], "visual": null}}``: the index of the step, counted from 0,
and the raw features of each modality, null (or no such key) where it was not observed. The answer is a prediction
or a refusal, both JSON. A refused message changes nothing and the session goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from edu_emotionnet.streaming import StepPrediction, StreamingModel
from emolab.serving.models import LoadedModel

POLICY, TOO_BUSY = 1008, 1013
"""WebSocket close codes (RFC 6455): what was sent broke the rules; try again later."""


class RefusedError(ValueError):
    """A message that cannot be answered with a prediction."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one session may ask for."""

    message_bytes: int
    steps: int
    mistakes: int
    """Refused messages in a row after which the session is closed."""
    unanswered: int = 64
    """Messages, of ``message_bytes`` together, that wait while another is being answered; with more it is closed."""
    idle_seconds: float = 60.0
    """Silence after which the session is closed."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, and whether it is the last."""

    content: dict[str, Any]
    close: int | None = None
    """Close code; None while the session goes on."""

    def text(self) -> str:
        return json.dumps(self.content, allow_nan=False)


class LiveSession:
    """A learner's session under way."""

    def __init__(self, loaded: LoadedModel, live: StreamingModel, limits: Limits) -> None:
        self._loaded = loaded
        self._recomputes = live.recomputes
        self._limits = limits
        self._stream = live.open()
        self._mistakes = 0

    def greeting(self) -> dict[str, Any]:
        """The first thing a client is told."""
        return {
            "type": "session",
            "model": self._loaded.kept.name,
            "weights": self._loaded.kept.digest[:16],
            "classes": list(self._loaded.classes),
            "dimensions": dict(self._loaded.dimensions),
            "recomputes": self._recomputes,
            "limits": {
                "message_bytes": self._limits.message_bytes,
                "steps": self._limits.steps,
                "unanswered": self._limits.unanswered,
            },
        }

    def answer(self, message: str | bytes | None) -> Reply:
        """The answer to one message."""
        try:
            content = self._step(message)
        except RefusedError as error:
            self._mistakes += 1
            last = error.code == "too_many_steps" or self._mistakes >= self._limits.mistakes
            return Reply(
                content=refusal(error.code, str(error), next_step=self._stream.steps), close=POLICY if last else None
            )
        self._mistakes = 0
        return Reply(content=content)

    def _step(self, message: str | bytes | None) -> dict[str, Any]:
        step, features = parse(message, self._loaded.dimensions, limit=self._limits.message_bytes)
        if step != self._stream.steps:
            problem = "was answered already" if step < self._stream.steps else "comes too early"
            raise RefusedError("out_of_order", f"step {step} {problem}: the next is {self._stream.steps}")
        if step >= self._limits.steps:
            raise RefusedError("too_many_steps", f"a session has at most {self._limits.steps} steps: open another")
        try:
            said = self._stream.step(features)
        except ValueError as error:
            raise RefusedError("bad_features", str(error)) from None
        return self._prediction(step, features, said)

    def _prediction(self, step: int, features: Mapping[str, Tensor | None], said: StepPrediction) -> dict[str, Any]:
        probabilities, classes = said.probabilities.tolist(), list(self._loaded.classes)
        weights = None if said.confidence is None else said.confidence.tolist()
        return {
            "type": "prediction",
            "step": step,
            "class": classes[int(np.argmax(probabilities))],
            "classes": classes,
            "probabilities": probabilities,
            "confidence": None if weights is None else dict(zip(self._loaded.dimensions, weights, strict=True)),
            "present": {name: features.get(name) is not None for name in self._loaded.dimensions},
        }


def refusal(code: str, message: str, *, next_step: int | None = None) -> dict[str, Any]:
    """What a client is told instead of a prediction."""
    return {"type": "error", "code": code, "message": message, "next_step": next_step}


def parse(
    message: str | bytes | None, dimensions: Mapping[str, int], *, limit: int
) -> tuple[int, dict[str, Tensor | None]]:
    """A message -> the index of its step, and the features of the modalities that it names.

    Raises:
        RefusedError: too large, not JSON, or not such a message; says what was expected.
    """
    if not isinstance(message, str):
        raise RefusedError("not_text", "send text messages with JSON in them")
    if len(message) > limit or len(message.encode()) > limit:
        raise RefusedError("too_large", f"a message has at most {limit} bytes, got {len(message.encode())}")
    try:
        content = json.loads(message, parse_constant=_not_a_number)
    except RefusedError:
        raise
    except (ValueError, RecursionError) as error:
        raise RefusedError("not_json", f"the message is not JSON: {str(error)[:100]}") from None
    if not isinstance(content, dict) or set(content) != {"step", "features"}:
        raise RefusedError("bad_message", 'a message is {"step": 0, "features": {"audio": [...], "visual": null}}')
    step, features = content["step"], content["features"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise RefusedError("bad_message", "step is a whole number from 0 on")
    if not isinstance(features, dict):
        raise RefusedError("bad_message", "features is an object: modality -> list of numbers, or null")
    return step, {name: _vector(name, values, dimensions) for name, values in features.items()}


def _vector(name: str, values: Any, dimensions: Mapping[str, int]) -> Tensor | None:
    if name not in dimensions:
        raise RefusedError(
            "unknown_modality", f"unknown modality {name[:40]!r}: this model takes {', '.join(dimensions)}"
        )
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != dimensions[name]:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise RefusedError("bad_features", f"{name} needs a list of {dimensions[name]} numbers, got {got}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise RefusedError("bad_features", f"{name} needs numbers alone")
    try:
        with np.errstate(over="ignore"):
            vector = np.asarray(values, dtype=np.float64).astype(np.float32)
    except OverflowError:
        raise RefusedError("bad_features", f"{name} holds a number too large for float32") from None
    if not np.isfinite(vector).all():
        raise RefusedError("bad_features", f"{name} holds a number too large for float32")
    return torch.from_numpy(vector)


def _not_a_number(constant: str) -> NoReturn:
    raise RefusedError(
        "bad_features", f"{constant} is no number that a model could read; null marks a missing modality"
    )
