"""CMU-MOSI with the utterance-level features of bc-LSTM: real speech, faces and words, binary sentiment.

A video is one session of one speaker and its utterances, in spoken order, are the steps. The folder holds, as
published by declare-lab: ``{audio,video,text}_{train0,test0}.csv`` (features and, in the last column, the
label), ``transcripts.csv`` (``<video>_<n>``, words, video number, label) and ``rows_{train,test}.txt`` (for
each feature row its 0-based row in transcripts.csv).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emolab.corpora.catalog import register
from emolab.corpora.corpus import Corpus, SessionReference, Split
from emolab.limits import TABLE_BYTES, read_bytes
from emolab.names import UserError
from emolab.sessions.schema import Session

_WIDTHS = {"audio": 73, "visual": 100, "text": 100}
_FILES = {"audio": "audio", "visual": "video", "text": "text"}
_PUBLISHED: tuple[Split, ...] = ("train", "test")
_NUMBER = re.compile(r"[0-9]{1,9}")
"""Of an utterance or a row; Python reads no number of any length."""


@register
@dataclass(frozen=True, kw_only=True)
class Mosi(Corpus):
    """93 videos, 2,199 utterances; published training and test videos share no speaker.

    Honest use is training at fixed hyper-parameters and one look at the test videos: see ``provenance`` for
    why a validation part says nothing here.
    """

    name = "mosi"

    source: str
    """Folder with the published files, local or on a file system that every worker sees."""
    validation_videos: int = 10
    """Training videos set aside as validation split, 0 for none. Never select anything by them."""
    seed: int = 0
    """Chooses the validation videos."""

    def __post_init__(self) -> None:
        if self.validation_videos < 0 or self.seed < 0:
            raise UserError(f"validation_videos={self.validation_videos}, seed={self.seed}: both must be 0 or more")
        # workers have another current folder than the job that built this
        object.__setattr__(self, "source", str(Path(self.source).expanduser().resolve()))

    @property
    def classes(self) -> tuple[str, ...]:
        return ("negative", "positive")

    @property
    def dimensions(self) -> Mapping[str, int]:
        return dict(_WIDTHS)

    def references(self) -> Sequence[SessionReference]:
        """One session per video, by name.

        Raises:
            UserError: the folder or a file is missing or contradicts another, or too many validation videos.
        """
        published = _tables(self.source).split_of_video
        splits: dict[str, Split] = dict(published)
        for video in self._validation(published):
            splits[video] = "validation"
        return [
            # some video names begin with a hyphen or underscore, which no session or speaker id may
            SessionReference(session_id=f"mosi-{video}", speaker_id=f"mosi-{video}", published_split=splits[video])
            for video in sorted(splits)
        ]

    def load(self, reference: SessionReference) -> Session:
        """The utterances of one video. ``step_seconds`` is 1.0 for want of a rate: durations vary."""
        tables = _tables(self.source)
        rows = tables.rows_of_video.get(reference.session_id.removeprefix("mosi-"))
        if rows is None:
            raise UserError(f"{self.source} has no session {reference.session_id!r}: take references from the corpus")
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.session_id,
            corpus=self.name,
            step_seconds=1.0,
            features={modality: values[rows] for modality, values in tables.features.items()},
            present={modality: np.ones(len(rows), dtype=np.bool_) for modality in tables.features},
            labels=tables.labels[rows],
        )

    def provenance(self) -> Mapping[str, Any]:
        return {
            "source": "CMU-MOSI, folder bc-LSTM/data of github.com/declare-lab/multimodal-deep-learning",
            "licence": "MIT (features and code); the videos belong to their authors",
            "features": {
                "audio": "openSMILE, 73",
                "visual": "3D-CNN, 100, trained with the training videos' labels",
                "text": "text-CNN, 100, trained with the training videos' labels",
            },
            "citation": [
                "Poria et al., Context-Dependent Sentiment Analysis in User-Generated Videos, ACL 2017",
                "Zadeh et al., MOSI: Multimodal Corpus of Sentiment Intensity, 2016",
            ],
            "caveat": "text and visual features have seen the labels of all published training videos, so "
            "accuracy on the validation split, which is cut from them, looks near-perfect and must select "
            "nothing: report the published test videos at hyper-parameters fixed beforehand",
            "validation_videos": self.validation_videos,
            "seed": self.seed,
            "step": "one utterance; step_seconds carries no duration",
        }

    def reference_scores(self, split: Split, references: Sequence[SessionReference]) -> Mapping[str, float]:
        """Accuracy of always answering the most frequent class of the training split."""
        if not references:
            return {}
        training = [each for each in self.references() if each.published_split == "train"]
        counts = np.bincount(np.concatenate([self.load(each).labels for each in training]), minlength=2)
        labels = np.concatenate([self.load(reference).labels for reference in references])
        return {"class_prior_accuracy": float((labels == np.argmax(counts)).mean())}

    def _validation(self, published: Mapping[str, Split]) -> list[str]:
        training = sorted(video for video, split in published.items() if split == "train")
        if self.validation_videos >= len(training):
            raise UserError(
                f"validation_videos={self.validation_videos}: must be below {len(training)}, the number of "
                f"training videos in {self.source}"
            )
        order = np.random.default_rng(self.seed).permutation(len(training))
        return [training[place] for place in order[: self.validation_videos]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tables:
    """The folder's content; N utterances in the order of transcripts.csv."""

    features: Mapping[str, NDArray[np.float32]]
    """Modality -> (N, D)."""
    labels: NDArray[np.int64]
    """(N,)."""
    rows_of_video: Mapping[str, NDArray[np.int64]]
    """Video -> its rows in spoken order."""
    split_of_video: dict[str, Split]


@lru_cache(maxsize=4)
def _tables(source: str) -> _Tables:
    """Read and cross-check the folder, once per process: files that change later are not noticed."""
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"MOSI folder {folder} does not exist: pass the folder with transcripts.csv as source")
    names, labels = _transcripts(folder / "transcripts.csv")
    rows: dict[Split, NDArray[np.int64]] = {
        split: _rows(folder / f"rows_{split}.txt", len(labels)) for split in _PUBLISHED
    }
    utterances = np.concatenate([rows[split] for split in _PUBLISHED])
    counts = np.bincount(utterances, minlength=len(labels))
    if not (counts == 1).all():
        row = int(np.argmax(counts != 1))
        raise UserError(
            f"{folder}/rows_train.txt and rows_test.txt name row {row} of transcripts.csv "
            f"{counts[row]} times, expected once: restore the published files"
        )
    features = {name: np.empty((len(labels), width), dtype=np.float32) for name, width in _WIDTHS.items()}
    for split in _PUBLISHED:
        for modality, width in _WIDTHS.items():
            path = folder / f"{_FILES[modality]}_{split}0.csv"
            features[modality][rows[split]] = _features(path, width, labels[rows[split]])
    return _Tables(
        features=features,
        labels=labels,
        rows_of_video=_spoken_order(names),
        split_of_video=_splits(names, rows, folder),
    )


def _transcripts(path: Path) -> tuple[list[tuple[str, int]], NDArray[np.int64]]:
    """(video, position) and label of every utterance."""
    names, labels = [], []
    for line, fields in enumerate(_table(path), start=1):
        video, _, position = fields[0].rpartition("_") if len(fields) == 4 else ("", "", "")
        if not video or not _NUMBER.fullmatch(position) or fields[3] not in ("0", "1"):
            raise UserError(f"{path}, line {line}: expected <video>_<n>, words, video number and label 0 or 1")
        names.append((video, int(position)))
        labels.append(int(fields[3]))
    if len(set(names)) < len(names):
        raise UserError(f"{path}: an utterance is listed twice")
    return names, np.array(labels, dtype=np.int64)


def _rows(path: Path, utterances: int) -> NDArray[np.int64]:
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if not _NUMBER.fullmatch(line) or int(line) >= utterances:
            raise UserError(
                f"{path}, line {number}: expected a row of transcripts.csv (0 to {utterances - 1}), got {line[:20]!r}"
            )
    return np.array([int(line) for line in lines], dtype=np.int64)


def _features(path: Path, width: int, labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """(rows, width) features of one file, after comparing its shape and its label column."""
    rows = _table(path)
    try:
        table = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path}: expected {width + 1} numbers in every line ({error})") from error
    if table.shape != (len(labels), width + 1):
        shape = " x ".join(map(str, table.shape))
        raise UserError(f"{path} is {shape}, expected {len(labels)} rows of {width} features and a label")
    if not np.isfinite(table).all():
        raise UserError(f"{path}, line {int(np.argmin(np.isfinite(table).all(axis=1))) + 1}: a value is not finite")
    wrong = table[:, -1] != labels
    if wrong.any():
        line = int(np.argmax(wrong))
        raise UserError(f"{path}, line {line + 1}: label {table[line, -1]:g}, but transcripts.csv says {labels[line]}")
    return table[:, :-1].astype(np.float32)


def _table(path: Path) -> list[list[str]]:
    reader = csv.reader(_lines(path))
    try:
        return list(reader)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from None


def _lines(path: Path) -> list[str]:
    try:
        lines = read_bytes(path, most=TABLE_BYTES, what="a published table").decode().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def _spoken_order(names: Sequence[tuple[str, int]]) -> dict[str, NDArray[np.int64]]:
    rows: dict[str, list[int]] = {}
    for row in sorted(range(len(names)), key=lambda row: names[row]):
        rows.setdefault(names[row][0], []).append(row)
    return {video: np.array(members, dtype=np.int64) for video, members in rows.items()}


def _splits(
    names: Sequence[tuple[str, int]], rows: Mapping[Split, NDArray[np.int64]], folder: Path
) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for split, members in rows.items():
        for row in members:
            video = names[row][0]
            if splits.setdefault(video, split) != split:
                raise UserError(f"{folder}: video {video!r} has utterances in both rows_train.txt and rows_test.txt")
    return splits
