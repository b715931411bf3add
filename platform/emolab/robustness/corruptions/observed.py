"""Corruption of prepared sessions: from one session and one variant to what a model is given of one modality."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import MODALITIES
from emolab.names import UserError
from emolab.robustness.corruptions.catalog import corruption
from emolab.robustness.corruptions.streams import Stream, hashed_unit
from emolab.sessions.schema import Session

CLEAN = "clean"
"""Name that stands for no corruption in a variant and in a cell."""


@dataclass(frozen=True, kw_only=True, order=True)
class Variant:
    """One modality under one instance of a corruption; equal variants are built and encoded once."""

    modality: str
    corruption: str = CLEAN
    level: float = 0.0
    """Rate or severity; 0 is the identity."""
    seed: int = 0
    group: tuple[str, ...] = ()
    """The modalities corrupted together, where the corruption is a joint one."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What is left of one modality of a session."""

    features: NDArray[np.float32]
    """(T, D); anything where absent."""
    present: NDArray[np.bool_]
    """(T,)."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a corruption may look at besides the session."""

    std: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    """Modality -> (D,) standard deviation over the training split, for noise in units of it."""
    donor: Callable[[str, int], Session] | None = None
    """(session id, seed) -> the other session whose values are swapped in; see ``choose_donor``."""


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """Everything that a feature corruption is a function of."""

    session: Session
    variant: Variant
    surroundings: Surroundings

    @property
    def observed(self) -> Observed:
        """The modality as it is."""
        name = self.variant.modality
        return Observed(features=self.session.features[name], present=self.session.present[name])

    def stream(self, modality: str | None = None) -> Stream:
        """The stream of this variant's modality, or of another that is corrupted together with it."""
        return Stream(
            session_id=self.session.session_id,
            modality=modality or self.variant.modality,
            corruption=self.variant.corruption,
            seed=self.variant.seed,
        )

    def std(self) -> NDArray[np.floating]:
        """(D,) training standard deviation of the modality.

        Raises:
            UserError: it was not given.
        """
        name = self.variant.modality
        if name not in self.surroundings.std:
            raise UserError(f"corruption {self.variant.corruption!r} needs the training split's statistics of {name}")
        return self.surroundings.std[name]


def corrupt(session: Session, variant: Variant, surroundings: Surroundings | None = None) -> Observed:
    """One modality of a session under a variant; the session itself is never changed.

    Level 0 returns the session's own arrays.

    Raises:
        UserError: unknown corruption or level, a corruption of raw signals, or a modality the session lacks.
    """
    if variant.modality not in session.features:
        raise UserError(f"session {session.session_id!r} has no {variant.modality}, only {', '.join(session.features)}")
    request = FeatureRequest(session=session, variant=variant, surroundings=surroundings or Surroundings())
    if variant.corruption == CLEAN:
        return request.observed
    chosen = corruption(variant.corruption)
    if chosen.stage != "features":
        raise UserError(f"corruption {chosen.name!r} works on raw {chosen.stage}: apply it when sessions are prepared")
    chosen.check_level(variant.level)
    return request.observed if variant.level == 0 else chosen.apply(request)


def group_of(modalities: Sequence[str]) -> tuple[str, ...]:
    """The modalities in their canonical order."""
    return tuple(name for name in MODALITIES if name in modalities)


def choose_donor(session_id: str, seed: int, session_ids: Sequence[str]) -> str:
    """The session that ``session_id`` is swapped with: a function of the two and of the set of ids, which must be
    sorted; never the session itself.

    Raises:
        UserError: there is no other session.
    """
    own = bisect_left(session_ids, session_id)
    contains = own < len(session_ids) and session_ids[own] == session_id
    others = len(session_ids) - contains
    if others < 1:
        raise UserError(f"session {session_id!r} cannot be swapped: there is no other session")
    index = int(hashed_unit("donor", session_id, seed) * others)
    return session_ids[index + (contains and index >= own)]
