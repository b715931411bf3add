"""What every corpus offers to preparation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emolab.names import UserError
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


class RefusedSessionError(UserError):
    """A session that cannot be used. Preparation sets it aside with this reason and goes on with the others."""


Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step from a reference to its session that keeps something costly in memory (a decoder, an encoder's weights).

    Preparation runs each stage as a pool of Ray Data actors; ``Corpus.load`` runs them one after another.
    """

    name: str
    build: Callable[[], Callable[[SessionReference, Arrays], Arrays]]
    """Called once per actor. What it returns takes a reference and the arrays of the stages before, and returns
    further arrays by name. Sent to the actors, so it is a module-level class or a ``functools.partial`` of one."""
    uses_gpu: bool = False


class Corpus(ABC):
    """A source of sessions. Instances are sent to Ray workers, so they hold paths and numbers, not data.

    Contract, checked for every registered corpus by one suite of property tests:

    - ``references`` lists every session once, in an order that never changes for equal arguments;
    - ``load`` is a function of the corpus's arguments and the reference alone, so that the bytes of a shard do
      not depend on the number of workers or on the order in which sessions are read;
    - every session carries every modality of ``dimensions``, with that width.
    """

    name: str

    generated: bool = False
    """Whether sessions are computed from the options alone: none is ever refused, and none is worth keeping before
    its shard is written."""

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
        """Read or generate one session.

        Raises:
            RefusedSessionError: this session cannot be used, and why.
        """

    def stages(self) -> Sequence[Stage]:
        """The costly stages of ``load``, where it has any; ``assemble`` then makes the session of their arrays."""
        return ()

    def assemble(self, reference: SessionReference, arrays: Arrays) -> Session:
        """The session of a reference, from what all stages returned. Equal to ``load(reference)``."""
        raise NotImplementedError(f"corpus {self.name} has no stages")

    def options(self) -> dict[str, Any]:
        """The options that decide what the data are; where they lie (``source``) does not."""
        return {name: value for name, value in vars(self).items() if name != "source"}

    def reading_options(self) -> dict[str, Any]:
        """The options that decide what a session becomes, not which sessions are listed. An unfinished preparation
        goes on as long as these and the provenance stay the same."""
        return self.options()

    def input_key(self, reference: SessionReference) -> str:
        """What a session is read from, so far as it may change before a preparation is finished (its files' sizes and
        times, its row of a list): a finished session is read again once its key is another."""
        return ""

    def missing_files(self, reference: SessionReference) -> Sequence[Path]:
        """Files that a session is to be read from and that are not there: the session will be refused."""
        del reference
        return ()

    def provenance(self) -> Mapping[str, Any]:
        """JSON values that say where the features come from; stored in the manifest."""
        return {}

    def annotation_summary(self) -> Mapping[str, Any]:
        """JSON values on where the labels come from, for the data report: agreement of several annotators
        (``kappa``), counts of labels that no table maps (``unmapped``), and whatever else the corpus knows."""
        return {}

    def reference_scores(self, split: Split, references: Sequence[SessionReference]) -> Mapping[str, float]:
        """Scores that put results into perspective (a known ceiling), stored in the manifest per split."""
        return {}
