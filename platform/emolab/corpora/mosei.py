"""CMU-MOSEI as its authors publish it: computational sequences (.csd) for the CMU Multimodal SDK.

The folder holds ``CMU_MOSEI_Labels.csd``, ``CMU_MOSEI_COVAREP.csd`` (audio), ``CMU_MOSEI_TimestampedWordVectors.csd``
(text) and ``CMU_MOSEI_VisualFacet42.csd`` or ``CMU_MOSEI_VisualOpenFace2.csd``. A video's labels are segments, each
with the seven numbers sentiment [-3, 3] and happy, sad, anger, surprise, disgust, fear [0, 3].

A video is a session. Its steps are its labelled segments in the order of time, as in the other sentiment corpora here,
or with ``step_seconds`` a regular grid. Features are averaged over each step by the time that they share with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emolab.corpora.catalog import register
from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.csd import VideoSequence, feature_width, read_video, read_videos, video_names
from emolab.corpora.labels import OWN, LabelledCorpus
from emolab.corpora.overlap import overlap_means
from emolab.features.grid import step_labels, steps_covering
from emolab.names import UserError, checked_name, contained
from emolab.sessions.schema import Session

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
_SIGNS = ("negative", "neutral", "positive")
_LABELS = "Labels"


@register
@dataclass(frozen=True, kw_only=True)
class Mosei(LabelledCorpus):
    """3,837 videos. Utterance ids in a label table: ``<video>[<n>]``, n the segment's place in the label file from 0.

    The corpus's own label of a segment is, with ``annotation=emotion``, the emotion with the highest intensity; none
    where all are 0, and no label where two share the first place. With ``annotation=sentiment`` it is the sign of the
    sentiment. The published folds are no part of the files, so preparation splits by video.
    """

    name = "mosei"

    source: str
    """Folder with the .csd files, local or on a file system that every worker sees."""
    annotation: Literal["emotion", "sentiment"] = "emotion"
    """Which of the seven numbers count."""
    visual: Literal["VisualFacet42", "VisualOpenFace2"] = "VisualFacet42"
    """The visual features to use: 35 of Facet 4.2 or 713 of OpenFace 2."""
    step_seconds: float | None = None
    """Length of a step; None for one step per labelled segment (the manifest then says 1.0, which is no duration)."""
    label_table: str = OWN
    """``own`` (the labels above) or a table; see ``corpora.labels``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_seconds is not None and not 0.01 <= self.step_seconds <= 3600:
            raise UserError(f"step_seconds={self.step_seconds:g}: must be 0.01 to 3600 seconds, or null for segments")

    @property
    def own_labels(self) -> tuple[str, ...]:
        return (*EMOTIONS, "none") if self.annotation == "emotion" else _SIGNS

    @property
    def dimensions(self) -> Mapping[str, int]:
        return {modality: feature_width(self._file(name)) for modality, name in self._sequences().items()}

    def references(self) -> Sequence[SessionReference]:
        """One session per labelled video, by name.

        Raises:
            UserError: the folder or a file is missing or damaged.
        """
        if not Path(self.source).is_dir():
            raise UserError(f"MOSEI folder {self.source} does not exist: pass the folder with the .csd files as source")
        for name in self._sequences().values():
            video_names(self._file(name))
        self.check_table()
        names = [checked_name(f"mosei-{video}", what="session") for video in _labels(self._file(_LABELS))]
        return [SessionReference(session_id=name, speaker_id=name) for name in names]

    def load(self, reference: SessionReference) -> Session:
        """The steps of one video.

        Raises:
            RefusedSessionError: the video is damaged in one of the files, or no step has any feature.
        """
        segments, order = self._segments(reference)
        steps, labels = self._grid(reference.session_id, segments, order)
        features, present = {}, {}
        for modality, name in self._sequences().items():
            sequence = read_video(self._file(name), reference.session_id.removeprefix("mosei-"))
            if sequence is None:
                width = feature_width(self._file(name))
                sequence = VideoSequence(np.empty((0, width)), np.empty((0, 2)))
            features[modality], present[modality] = overlap_means(*sequence, steps)
        if not any(mask.any() for mask in present.values()):
            raise RefusedSessionError(f"session {reference.session_id!r}: no feature lies in a labelled segment")
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.speaker_id,
            corpus=self.name,
            step_seconds=self.step_seconds or 1.0,
            features=features,
            present=present,
            labels=labels,
        )

    def utterance_labels(self) -> Iterable[tuple[str, str | None]]:
        for video, segments in _labels(self._file(_LABELS)).items():
            if isinstance(segments, VideoSequence):
                yield from ((f"{video}[{n}]", self._own_label(row)) for n, row in enumerate(segments.features))

    def provenance(self) -> Mapping[str, Any]:
        return {
            "source": "CMU-MOSEI, computational sequences of the CMU Multimodal SDK",
            "features": {
                modality: f"CMU_MOSEI_{name}, {width}"
                for (modality, name), width in zip(self._sequences().items(), self.dimensions.values(), strict=True)
            },
            "citation": "Zadeh et al., Multimodal Language Analysis in the Wild: CMU-MOSEI Dataset and Interpretable "
            "Dynamic Fusion Graph, ACL 2018",
            "step": "one labelled segment; step_seconds carries no duration"
            if self.step_seconds is None
            else f"{self.step_seconds:g} s",
            "pooling": "mean over the intervals in a step, weighted by shared time; values that are not finite do not "
            "count",
            "speakers": "videos stand for speakers, who are not published: one speaker can have several",
        }

    def _sequences(self) -> dict[str, str]:
        return {"audio": "COVAREP", "visual": self.visual, "text": "TimestampedWordVectors"}

    def _file(self, name: str) -> Path:
        return contained(Path(self.source), f"CMU_MOSEI_{name}.csd", what="file")

    def _segments(self, reference: SessionReference) -> tuple[VideoSequence, NDArray[np.int64]]:
        """The labelled segments of a video, and their order in time."""
        video = reference.session_id.removeprefix("mosei-")
        segments = _labels(self._file(_LABELS)).get(video)
        if segments is None or not reference.session_id.startswith("mosei-"):
            raise UserError(f"{self.source} has no session {reference.session_id!r}: take references from the corpus")
        if isinstance(segments, str):
            raise RefusedSessionError(segments)
        return segments, np.lexsort((segments.intervals[:, 1], segments.intervals[:, 0]))

    def _grid(
        self, session_id: str, segments: VideoSequence, order: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(T, 2) start and end of every step, and (T,) labels."""
        video = session_id.removeprefix("mosei-")
        labels = [self.table.index(f"{video}[{n}]", self._own_label(segments.features[n])) for n in order.tolist()]
        intervals = segments.intervals[order]
        if self.step_seconds is None:
            return intervals, np.array(labels, dtype=np.int64)
        seconds = float(intervals[:, 1].max())
        count = steps_covering(seconds, self.step_seconds)
        if count == 0:
            raise RefusedSessionError(f"session {session_id!r}: its labelled segments end before they begin")
        spans = [(float(start), float(end), label) for (start, end), label in zip(intervals, labels, strict=True)]
        starts = np.arange(count, dtype=np.float64) * self.step_seconds
        return np.stack([starts, starts + self.step_seconds], axis=1), step_labels(
            spans, steps=count, seconds=seconds, step_seconds=self.step_seconds
        )

    def _own_label(self, row: NDArray[np.float64]) -> str | None:
        """The corpus's label of a segment's seven numbers, None where it is undecided."""
        if self.annotation == "sentiment":
            return _SIGNS[int(np.sign(row[0])) + 1]
        highest = np.flatnonzero(row[1:] == row[1:].max())
        if not row[1:].any():
            return "none"
        return EMOTIONS[highest[0]] if len(highest) == 1 else None


@lru_cache(maxsize=4)
def _labels(path: Path) -> Mapping[str, VideoSequence | str]:
    """Video -> its labelled segments, or why it has none. Read once per process."""
    found = read_videos(path)
    for video, segments in found.items():
        if isinstance(segments, str):
            continue
        if not len(segments.features) or segments.features.shape[1] != 7 or not np.isfinite(segments.features).all():
            found[video] = f"{path}: video {video!r} has no labels of seven finite numbers"
    return found
