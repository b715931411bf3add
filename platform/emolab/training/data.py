"""The two splits a training run may see. The test split is not among them, and its path is never formed here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from emolab.names import UserError
from emolab.sessions.loading import SessionStore, load_split
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.shards import claim_session

TrainingSplit = Literal["train", "validation"]
TRAINING_SPLITS: tuple[TrainingSplit, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training and validation sessions, checked."""

    manifest: Manifest
    train: SessionStore
    validation: SessionStore

    def __post_init__(self) -> None:
        """Refuse an empty training split, repeated sessions, and a speaker on both sides.

        Raises:
            UserError: naming the session or the speaker.
        """
        if not len(self.train):
            raise UserError("the training split is empty")
        seen: dict[str, str] = {}
        speakers: dict[str, str] = {}
        for split, store in (("train", self.train), ("validation", self.validation)):
            for session_id, speaker_id in zip(store.session_ids, store.speaker_ids, strict=True):
                claim_session(session_id, speaker_id, split, seen, speakers)
        for split, summary in self.manifest.splits.items():
            for speaker in summary.speakers:
                if speakers.setdefault(speaker, split) != split:
                    raise UserError(f"speaker {speaker!r} is in two splits ({speakers[speaker]} and {split})")


def load_training_data(folder: Path) -> TrainingData:
    """Read train and validation into this process; read once per process and data set.

    Raises:
        UserError: the data set is missing, damaged or inconsistent.
    """
    manifest = read_manifest(folder)
    return _cached(folder.resolve(), manifest.digest)


@lru_cache(maxsize=2)
def _cached(folder: Path, digest: str) -> TrainingData:
    manifest = read_manifest(folder)
    assert manifest.digest == digest
    return TrainingData(
        manifest=manifest,
        train=load_split(folder, manifest, "train"),
        validation=load_split(folder, manifest, "validation"),
    )
