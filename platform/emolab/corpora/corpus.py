"""What every corpus offers to preparation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from emolab.sessions.schema import Session

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class SessionReference:
    """A session that has not been read yet: enough to plan splits and shards, small enough to send anywhere."""

    session_id: str
    speaker_id: str
    published_split: Split | None = None
    """The split that the corpus itself publishes; None where preparation chooses by speaker."""


class Corpus(ABC):
    """A source of sessions. Instances are sent to Ray workers, so they hold paths and numbers, not data.

    Contract, checked for every registered corpus by one suite of property tests:

    - ``references`` lists every session once, in an order that never changes for equal arguments;
    - ``load`` is a function of the corpus's arguments and the reference alone, so that the bytes of a shard do
      not depend on the number of workers or on the order in which sessions are read;
    - every session carries every modality of ``dimensions``, with that width.
    """

    name: str

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names; their positions are the label values."""

    @property
    @abstractmethod
    def dimensions(self) -> Mapping[str, int]:
        """Modality -> number of features, in the order of MODALITIES."""

    @property
    def has_quality(self) -> bool:
        """Whether sessions carry the true quality of each modality."""
        return False

    @abstractmethod
    def references(self) -> Sequence[SessionReference]:
        """Every session of the corpus."""

    @abstractmethod
    def load(self, reference: SessionReference) -> Session:
        """Read or generate one session."""

    def options(self) -> dict[str, Any]:
        """The options that decide what the data are; where they lie (``source``) does not."""
        return {name: value for name, value in vars(self).items() if name != "source"}

    def provenance(self) -> Mapping[str, Any]:
        """JSON values that say where the features come from; stored in the manifest."""
        return {}

    def reference_scores(self, split: Split, references: Sequence[SessionReference]) -> Mapping[str, float]:
        """Scores that put results into perspective (a known ceiling), stored in the manifest per split."""
        return {}
