"""DAiSEE: learners in front of a webcam, ten seconds at a time, four affects at four levels.

``DataSet/{Train,Validation,Test}/<subject>/<clip>/<clip>.avi`` and ``Labels/{Train,Validation,Test}Labels.csv``
(ClipID, Boredom, Engagement, Confusion, Frustration, the last with a space behind it; 0 very low to 3 very high).
There is no speech: sound and words are missing throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from emolab.corpora.catalog import register
from emolab.corpora.corpus import Split
from emolab.corpora.labelled_recordings import LabelledRecordings, UnusableRecording, read_table
from emolab.corpora.labels import OWN
from emolab.corpora.recordings import Clip, Recording
from emolab.features.audio import AudioSettings
from emolab.features.text import TextSettings
from emolab.names import UserError, checked_name, contained

AFFECTS = ("boredom", "engagement", "confusion", "frustration")
CLIP_SECONDS = 10.0
_SPLITS: dict[str, Split] = {"Train": "train", "Validation": "validation", "Test": "test"}
_SUBJECT_DIGITS = 6
"""A clip's name begins with its subject's."""


@register
@dataclass(frozen=True, kw_only=True)
class Daisee(LabelledRecordings):
    """9,068 clips of 112 people. A session is a clip, its label holds for all of it; utterance ids are clip names.

    A clip's own label is the affect with the highest level among those that the label table maps, if that is at least
    ``minimum_level`` and no other shares it. Affects that the table leaves out do not compete: engagement is high in
    nearly every clip.

    Sound and words are left out of the data set. To use the clips beside corpora that have them, choose the same
    extractors as there (``audio.extractor``, ``text.extractor``): both are then absent at every step.
    """

    name = "daisee"

    source: str
    """Folder with DataSet and Labels."""
    minimum_level: int = 2
    """Lowest level (0 to 3) that counts as showing an affect: 2 is high."""
    label_table: str = OWN
    """``own`` (the four affects), ``education`` (without engagement) or a table of yours."""
    audio: AudioSettings = field(default_factory=lambda: AudioSettings(extractor="none"))
    text: TextSettings = field(default_factory=lambda: TextSettings(extractor="none"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.minimum_level <= 3:
            raise UserError(f"minimum_level={self.minimum_level}: must be 0 to 3")

    @property
    def own_labels(self) -> tuple[str, ...]:
        return AFFECTS

    def recordings(self) -> Sequence[Recording]:
        """One session per labelled clip.

        Raises:
            UserError: no list of labels is there, or one is malformed; names the file and the line.
        """
        return [self._recording(clip) for clip in _clips(Path(self.source))]

    def utterance_labels(self) -> Iterable[tuple[str, str | None]]:
        return ((clip.name, self._own_label(clip)) for clip in _clips(Path(self.source)))

    def annotation_summary(self) -> Mapping[str, Any]:
        """With the number of clips in which two affects share the first place, or none is high enough."""
        verdicts = Counter(self._first_places(clip) for clip in _clips(Path(self.source)))
        shared = sum(count for places, count in verdicts.items() if len(places) > 1)
        return dict(super().annotation_summary()) | {"shared_first_place": shared, "below_minimum_level": verdicts[()]}

    def provenance(self) -> Mapping[str, Any]:
        return dict(super().provenance()) | {
            "source": "DAiSEE",
            "citation": "Gupta et al., DAiSEE: Towards User Engagement Recognition in the Wild, 2016",
            "labels": f"highest level among the affects that the table maps, at least {self.minimum_level}, not shared",
        }

    def _recording(self, clip: _Clip) -> Recording:
        identity: dict[str, Any] = {
            "session_id": f"daisee-{clip.name}",
            "speaker_id": f"daisee-{clip.subject}",
            "published_split": _SPLITS[clip.split],
            "listed": f"{clip.split}Labels.csv, line {clip.line}",
        }
        if clip.path is None:
            return UnusableRecording(**identity, reason="its video is missing")
        return Recording(
            **identity,
            video=(Clip(path=clip.path),),
            spans=self.span(0.0, CLIP_SECONDS, clip.name, self._own_label(clip)),
        )

    def _own_label(self, clip: _Clip) -> str | None:
        places = self._first_places(clip)
        if len(places) == 1:
            return places[0]
        if places:
            return None
        # no mapped affect shows: name what does, so that it is counted as unmapped
        highest = _highest(clip.levels, AFFECTS, self.minimum_level)
        return highest[0] if len(highest) == 1 else None

    def _first_places(self, clip: _Clip) -> tuple[str, ...]:
        mapped = tuple(affect for affect in AFFECTS if affect in self.table.by_label) or AFFECTS
        return _highest(clip.levels, mapped, self.minimum_level)


class _Clip(NamedTuple):
    name: str
    split: str
    subject: str
    path: Path | None
    """None where the video is missing."""
    levels: Mapping[str, int]
    line: int


def _highest(levels: Mapping[str, int], affects: Sequence[str], minimum: int) -> tuple[str, ...]:
    """The affects that share the highest level; none where it is below the minimum."""
    highest = max(levels[affect] for affect in affects)
    return tuple(affect for affect in affects if levels[affect] == highest) if highest >= minimum else ()


@lru_cache(maxsize=4)
def _clips(source: Path) -> Sequence[_Clip]:
    """Every labelled clip, by split and name. Read once per process: files that change later are not noticed."""
    found: dict[str, _Clip] = {}
    for split in _SPLITS:
        path = contained(source, "Labels", f"{split}Labels.csv", what="file")
        if not path.is_file():
            continue
        folders = _subjects(source, split)
        for line, row in read_table(path, ("ClipID", *(affect.capitalize() for affect in AFFECTS))):
            clip = _clip(source, split, folders, row, f"{path}, line {line}", line)
            if clip.name in found:
                raise UserError(f"{path}, line {line}: clip {clip.name!r} was listed before")
            found[clip.name] = clip
    if not found:
        raise UserError(f"{source} holds no labelled clip: pass the folder with DataSet and Labels/TrainLabels.csv ...")
    return list(found.values())


def _clip(source: Path, split: str, folders: Mapping[str, str], row: Mapping[str, str], where: str, line: int) -> _Clip:
    file = checked_name(row["ClipID"], what=f"{where}: ClipID")
    levels = {affect: row[affect.capitalize()] for affect in AFFECTS}
    if not all(level in ("0", "1", "2", "3") for level in levels.values()):
        raise UserError(f"{where}: levels must be 0 to 3, got {', '.join(levels.values())[:60]!r}")
    name, dot, ending = file.rpartition(".")
    if not dot or ending.lower() not in ("avi", "mp4"):
        raise UserError(f"{where}: ClipID {file[:40]!r} is not the name of an .avi or .mp4 file")
    subject = folders.get(name)
    path = contained(source, "DataSet", split, subject, name, file, what="file") if subject else None
    return _Clip(
        name=name,
        split=split,
        subject=subject or name[:_SUBJECT_DIGITS],
        path=path if path is not None and path.is_file() else None,
        levels={affect: int(level) for affect, level in levels.items()},
        line=line,
    )


def _subjects(source: Path, split: str) -> dict[str, str]:
    """Clip -> subject, by the folders of a split."""
    folder = contained(source, "DataSet", split, what="folder")
    return {clip.name: subject.name for subject in _folders(folder) for clip in _folders(subject)}


def _folders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
