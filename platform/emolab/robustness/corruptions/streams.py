"""Random streams that depend on what is corrupted, never on when, where or in which order it is done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The source of randomness of one corruption of one modality of one session.

    A draw is a counter-based Philox sequence keyed by a hash of these four fields and the name of the draw. The
    level is left out of the key on purpose: one set of draws serves every level, so that the steps missing at a
    rate are among those missing at any higher rate, and noise grows in amplitude without changing direction.
    Differences between two levels are then effects of the level, not of another draw.

    Uniform numbers are bit-identical on every platform; normal ones up to the platform's ``exp`` and ``log``.
    """

    session_id: str
    modality: str
    corruption: str
    seed: int

    def generator(self, draw: str) -> np.random.Generator:
        """A fresh generator for the draw of that name; equal names give equal numbers."""
        key = json.dumps([self.session_id, self.modality, self.corruption, self.seed, draw])
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))

    def uniform(self, draw: str, size: int) -> NDArray[np.float64]:
        """(size,) numbers in [0, 1)."""
        return self.generator(draw).random(size)


def hashed_unit(*parts: str | int) -> float:
    """A number in [0, 1) that is a function of the parts, for choices made once per speaker or session."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
