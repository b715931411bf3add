"""What preparation, its protocol and its report need to know of a session once its features are on disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emolab.sessions.schema import Session


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    """Counts of one session; JSON values only."""

    session_id: str
    speaker_id: str
    steps: int
    step_seconds: float
    label_counts: tuple[int, ...]
    """Labelled steps per class."""
    present: dict[str, int]
    """Modality -> steps at which it was observed."""
    longest_gap: dict[str, int]
    """Modality -> steps of its longest unbroken absence, at the beginning and the end too."""

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds

    @property
    def labelled(self) -> int:
        return sum(self.label_counts)

    @property
    def dominant(self) -> int | None:
        """The class with the most steps, the first of several; None where no step is labelled."""
        return self.label_counts.index(max(self.label_counts)) if self.labelled else None


def facts_of(session: Session, *, classes: int) -> SessionFacts:
    """Count a checked session."""
    labels = session.labels[session.labels >= 0]
    return SessionFacts(
        session_id=session.session_id,
        speaker_id=session.speaker_id,
        steps=session.num_steps,
        step_seconds=float(session.step_seconds),
        label_counts=tuple(np.bincount(labels, minlength=classes).tolist()),
        present={name: int(mask.sum()) for name, mask in session.present.items()},
        longest_gap={name: longest_run(~mask) for name, mask in session.present.items()},
    )


def longest_run(mask: NDArray[np.bool_]) -> int:
    """Length of the longest run of true values in (T,)."""
    others = np.flatnonzero(~mask)
    if len(others) == 0:
        return len(mask)
    between = np.diff(others).max(initial=1) - 1
    return int(max(others[0], between, len(mask) - 1 - others[-1]))
