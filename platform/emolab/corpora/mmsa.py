"""The feature files of MMSA for CMU-MOSI, CMU-MOSEI and CH-SIMS: one pickle per corpus and alignment.

A pickle holds ``train``, ``valid`` and ``test``, each with, for N utterances: ``id`` (``<video>$_$<clip>``), ``text``
(N, L, D), ``audio`` and ``vision`` likewise, ``annotations`` (Negative, Neutral, Positive) or at least
``regression_labels`` (their sign says the same), ``text_bert`` (N, 3, L; row 1 is the token mask), lengths.

A video is a session and its utterances, in the order of their clip numbers, are the steps: a label belongs to an
utterance, and the frames of one carry no times. A step's features are the mean over the utterance's frames.
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
from emolab.corpora.corpus import RefusedSessionError, SessionReference, Split
from emolab.corpora.labels import OWN, LabelledCorpus
from emolab.corpora.overlap import finite_mean
from emolab.corpora.pickled_arrays import PickledArray, RefusedPickleError
from emolab.corpora.restricted_pickle import read_pickle
from emolab.names import UserError, checked_name, contained
from emolab.sessions.schema import Session

_SPLITS: dict[str, Split] = {"train": "train", "valid": "validation", "test": "test"}
_FIELDS = {"audio": "audio", "visual": "vision", "text": "text"}
_SIGNS = ("negative", "neutral", "positive")


@register
@dataclass(frozen=True, kw_only=True)
class Mmsa(LabelledCorpus):
    """One of the three corpora, whichever the file holds. Utterance ids in a label table: ``<video>$_$<clip>``."""

    name = "mmsa"

    source: str
    """Folder with the pickle, local or on a file system that every worker sees."""
    file: str | None = None
    """The pickle in it, e.g. unaligned_50.pkl; may stay open where there is only one."""
    sha256: str | None = None
    """The file's digest, if its publisher gives one. Compared before anything of the file is read."""
    split: Literal["published", "speaker"] = "published"
    """``published``, or ``speaker``: by video, where the published splits cut through videos (CH-SIMS)."""
    label_table: str = OWN
    """``own`` (negative, neutral, positive) or a table; see ``corpora.labels``."""

    @property
    def own_labels(self) -> tuple[str, ...]:
        return _SIGNS

    def references(self) -> Sequence[SessionReference]:
        """One session per video, by name.

        Raises:
            UserError: the file is refused, contradicts itself, or a video has utterances in two published splits.
        """
        self.check_table()
        chosen: dict[str, Split] = {}
        for video, rows in self._content().rows_of_video.items():
            splits = sorted({split for split, _ in rows})
            if len(splits) > 1 and self.split == "published":
                raise UserError(
                    f"{self._path()}: video {video!r} has utterances in {' and '.join(splits)}: pass "
                    "options.split=speaker to split by video"
                )
            chosen[video] = _SPLITS[splits[0]]
        return [
            SessionReference(
                session_id=f"mmsa-{video}",  # some video names begin with a hyphen, which no session id may
                speaker_id=f"mmsa-{video}",
                published_split=split if self.split == "published" else None,
            )
            for video, split in sorted(chosen.items())
        ]

    def load(self, reference: SessionReference) -> Session:
        """The utterances of one video. ``step_seconds`` is 1.0 for want of times: durations vary.

        Raises:
            RefusedSessionError: no utterance has any feature.
        """
        content = self._content()
        rows = content.rows_of_video.get(reference.session_id.removeprefix("mmsa-"))
        if rows is None or not reference.session_id.startswith("mmsa-"):
            raise UserError(f"{self.source} has no session {reference.session_id!r}: take references from the corpus")
        features, present = {}, {}
        for modality in _FIELDS:
            pooled = [content.parts[split].pooled(modality, row) for split, row in rows]
            features[modality] = np.stack([means for means, _ in pooled])
            present[modality] = np.array([found for _, found in pooled], dtype=np.bool_)
        if not any(mask.any() for mask in present.values()):
            raise RefusedSessionError(f"session {reference.session_id!r}: every feature of it is zero or not a number")
        named = [(content.parts[split].ids[row], content.parts[split].labels[row]) for split, row in rows]
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.speaker_id,
            corpus=self.name,
            step_seconds=1.0,
            features=features,
            present=present,
            labels=np.array([self.table.index(*each) for each in named], dtype=np.int64),
        )

    @property
    def dimensions(self) -> Mapping[str, int]:
        part = self._content().parts["train"]
        return {modality: part.frames[modality].shape[2] for modality in _FIELDS}

    def utterance_labels(self) -> Iterable[tuple[str, str]]:
        for part in self._content().parts.values():
            yield from zip(part.ids, part.labels, strict=True)

    def provenance(self) -> Mapping[str, Any]:
        return {
            "source": f"MMSA features, file {self._path().name}",
            "sha256": self.sha256 or "not given",
            "citation": "Mao et al., M-SENA: An Integrated Platform for Multimodal Sentiment Analysis, ACL 2022",
            "step": "one utterance; step_seconds carries no duration",
            "pooling": "mean over an utterance's frames; frames of zeros are padding or nothing found, values that "
            "are not finite do not count",
            "speakers": "videos stand for speakers, who are not published",
        }

    def _path(self) -> Path:
        folder = Path(self.source)
        if self.file is not None:
            return contained(folder, self.file, what="options.file")
        found = sorted(folder.glob("*.pkl"))
        if len(found) != 1:
            listed = ", ".join(each.name for each in found[:5]) or "none"
            raise UserError(f"{folder} holds {len(found)} pickles ({listed}): name one as options.file")
        return contained(folder, found[0].name, what="file")

    def _content(self) -> _Content:
        path = self._path()
        try:
            return _content(path, self.sha256)
        except RefusedPickleError as error:
            raise UserError(f"{path} is refused: {error}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One split of the file: N utterances."""

    ids: Sequence[str]
    labels: Sequence[str]
    frames: Mapping[str, NDArray[Any]]
    """Modality -> (N, L, D); may lie in the file still."""
    tokens: NDArray[Any] | None
    """(N, L) token mask of the text, where the file has one of the same length."""

    def pooled(self, modality: str, row: int) -> tuple[NDArray[np.float32], bool]:
        """(D,) mean over the frames of an utterance that hold something, and whether there are any."""
        frames = self.frames[modality][row].astype(np.float64)
        used = frames.any(axis=1)
        if modality == "text" and self.tokens is not None:
            used &= self.tokens[row] != 0
        return finite_mean(frames[used])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Content:
    parts: Mapping[str, _Part]
    rows_of_video: Mapping[str, list[tuple[str, int]]]
    """Video -> (split, row) of its utterances in the order of their clips."""


@lru_cache(maxsize=2)
def _content(path: Path, sha256: str | None) -> _Content:
    """Read and check the file, once per process: changes that come later are not noticed."""
    if not path.parent.is_dir():
        raise UserError(f"MMSA folder {path.parent} does not exist: pass the folder with the pickle as source")
    root = read_pickle(path, sha256=sha256)
    if not isinstance(root, dict) or not set(_SPLITS) <= set(root):
        raise UserError(f"{path}: expected a dictionary of {', '.join(_SPLITS)}")
    parts = {split: _part(f"{path}, {split}", root[split]) for split in _SPLITS}
    for modality, field in _FIELDS.items():
        widths = {part.frames[modality].shape[2] for part in parts.values()}
        if len(widths) != 1 or 0 in widths:
            raise UserError(f"{path}: {field} has {sorted(widths)} features, expected one number in every split")
    return _Content(parts=parts, rows_of_video=_videos(path, parts))


def _videos(path: Path, parts: Mapping[str, _Part]) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, dict[tuple[int, str], tuple[str, int]]] = {}
    for split, part in parts.items():
        for row, name in enumerate(part.ids):
            video, mark, clip = name.partition("$_$")
            if not mark or not video or not clip:
                raise UserError(f"{path}, {split}: id {name[:60]!r} is not <video>$_$<clip>")
            checked_name(f"mmsa-{video}", what=f"{path}: session")
            number = int(clip) if clip.isascii() and clip.isdecimal() and len(clip) < 10 else -1
            clips = found.setdefault(video, {})
            if (number, clip) in clips:
                raise UserError(f"{path}, {split}: utterance {name[:60]!r} is there twice")
            clips[number, clip] = (split, row)
    if not found:
        raise UserError(f"{path} holds no utterance")
    return {video: [clips[key] for key in sorted(clips)] for video, clips in found.items()}


def _part(where: str, fields: Any) -> _Part:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a dictionary of fields")
    ids = _texts(where, "id", fields)
    frames = {modality: _numbers(where, field, fields, dimensions=3) for modality, field in _FIELDS.items()}
    for modality, values in frames.items():
        if len(values) != len(ids):
            raise UserError(f"{where}: {_FIELDS[modality]} has {len(values)} utterances, id has {len(ids)}")
    return _Part(
        ids=ids, labels=_labels(where, fields, len(ids)), frames=frames, tokens=_tokens(where, fields, frames["text"])
    )


def _labels(where: str, fields: Mapping[str, Any], count: int) -> Sequence[str]:
    if "annotations" in fields:
        labels = [text.strip().lower() for text in _texts(where, "annotations", fields)]
        strange = next((label for label in labels if label not in _SIGNS), None)
        if strange is not None:
            raise UserError(f"{where}: annotation {strange[:40]!r} is none of {', '.join(_SIGNS)}")
    else:
        scores = _numbers(where, "regression_labels", fields, dimensions=1)
        if not np.isfinite(scores).all():
            raise UserError(f"{where}: regression_labels holds a value that is not a number")
        labels = [_SIGNS[int(sign) + 1] for sign in np.sign(scores)]
    if len(labels) != count:
        raise UserError(f"{where}: {len(labels)} labels for {count} utterances")
    return labels


def _tokens(where: str, fields: Mapping[str, Any], text: NDArray[Any]) -> NDArray[Any] | None:
    if "text_bert" not in fields:
        return None
    tokens = _numbers(where, "text_bert", fields, dimensions=3)
    return tokens[:, 1] if tokens.shape == (len(text), 3, text.shape[1]) else None


def _numbers(where: str, field: str, fields: Mapping[str, Any], *, dimensions: int) -> NDArray[Any]:
    value = fields.get(field)
    values = value.values if isinstance(value, PickledArray) else value
    if isinstance(values, list) and all(isinstance(each, float) or each in range(-100, 100) for each in values):
        values = np.array(values, dtype=np.float64)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise UserError(f"{where}: {field} is missing or not an array of numbers")
    if dimensions == 1:
        values = values.reshape(-1)
    if values.ndim != dimensions:
        raise UserError(f"{where}: {field} has shape {values.shape}, expected {dimensions} dimensions")
    return values


def _texts(where: str, field: str, fields: Mapping[str, Any]) -> list[str]:
    value = fields.get(field)
    values = value.values if isinstance(value, PickledArray) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        raise UserError(f"{where}: {field} is missing or not a list of text")
    return list(values)
