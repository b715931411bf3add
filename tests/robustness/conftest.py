"""Small sessions and models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from emolab.sessions.schema import Session

DIMENSIONS = {"audio": 5, "visual": 7, "text": 3}


def make_session(number: int, steps: int = 20, modalities: tuple[str, ...] = tuple(DIMENSIONS), **changes) -> Session:
    generator = np.random.default_rng(number)
    values = {
        "session_id": f"session-{number}",
        "speaker_id": f"speaker-{number % 4}",
        "corpus": "test",
        "step_seconds": 1.0,
        "features": {m: generator.standard_normal((steps, DIMENSIONS[m])).astype(np.float32) for m in modalities},
        "present": {m: generator.random(steps) > 0.1 for m in modalities},
        "labels": np.where(generator.random(steps) < 0.1, -100, generator.integers(0, 4, steps)),
    }
    return Session(**values | changes)


@pytest.fixture(scope="session")
def session() -> Callable[..., Session]:
    """(number, steps, modalities) -> a session with values, gaps and labels of its own."""
    return make_session
