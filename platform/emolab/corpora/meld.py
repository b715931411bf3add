"""MELD: dialogues from the series Friends, a short video for each utterance, seven emotions.

``{train,dev,test}_sent_emo.csv`` (Sr No., Utterance, Speaker, Emotion, Sentiment, Dialogue_ID, Utterance_ID, Season,
Episode, StartTime, EndTime; times of the episode like ``00:14:38,127``) and, per split, a folder of
``dia<D>_utt<U>.mp4``: ``train_splits``, ``dev_splits_complete``, ``output_repeated_splits_test``. Both lie directly in
the source or, as the archives unpack, below a folder named after the split. Dialogue numbers start again in each split.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emolab.corpora.catalog import register
from emolab.corpora.corpus import Split
from emolab.corpora.labelled_recordings import LabelledRecordings, UnusableRecording, read_table
from emolab.corpora.labels import OWN
from emolab.corpora.recordings import Clip, Recording
from emolab.features.transcripts import spread_words
from emolab.names import UserError, contained

EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
_SPLITS: dict[str, Split] = {"train": "train", "dev": "validation", "test": "test"}
_VIDEOS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
_NUMBERS = ("Dialogue_ID", "Utterance_ID", "Season", "Episode")
_COLUMNS = ("Utterance", "Speaker", "Emotion", *_NUMBERS, "StartTime", "EndTime")
_TIME = re.compile(r"(\d{1,2}):(\d{1,2}):(\d{1,2})[,.](\d{1,3})")


@register
@dataclass(frozen=True, kw_only=True)
class Meld(LabelledRecordings):
    """1,432 dialogues, 13,708 utterances. Utterance ids in a table: ``<train|dev|test>_dia<D>_utt<U>``.

    A session is a dialogue. Its utterances follow each other without the pauses between them, for which there is no
    video, so a session is as long as its utterances together.

    The same six people speak in every published split: no split of MELD is independent of speakers. ``speaker_id``
    therefore never names a person here; it names the dialogue, or with ``split=episode`` the episode, which keeps at
    least every scene on one side.
    """

    name = "meld"

    source: str
    """Folder with the three lists and the three folders of videos (MELD.Raw)."""
    split: Literal["published", "episode"] = "published"
    """The published splits, or one of preparation's own that keeps episodes together."""
    label_table: str = OWN
    """``own`` (seven emotions) or a table; see ``corpora.labels``."""

    @property
    def own_labels(self) -> tuple[str, ...]:
        return EMOTIONS

    def recordings(self) -> Sequence[Recording]:
        """One session per dialogue.

        Raises:
            UserError: no list is there, or one is malformed; names the file and the line.
        """
        return [self._recording(dialogue) for dialogue in _dialogues(Path(self.source))]

    def utterance_labels(self) -> Iterable[tuple[str, str | None]]:
        for dialogue in _dialogues(Path(self.source)):
            yield from ((each.name, each.emotion) for each in dialogue.utterances)

    def provenance(self) -> Mapping[str, Any]:
        return dict(super().provenance()) | {
            "source": "MELD (MELD.Raw)",
            "citation": "Poria et al., MELD: A Multimodal Multi-Party Dataset for Emotion Recognition in "
            "Conversations, ACL 2019",
            "split": self.split,
            "speakers": "the same people speak in every split: scores are not independent of speakers",
            "clock": "utterances one after the other; the pauses between them are not in the corpus",
            "words": "spread over the time of their utterance by the number of letters",
        }

    def _recording(self, dialogue: _Dialogue) -> Recording:
        published = self.split == "published"
        name = f"meld-{dialogue.split}-dia{dialogue.number}"
        identity: dict[str, Any] = {
            "session_id": name,
            "speaker_id": name if published else dialogue.episode,
            "published_split": _SPLITS[dialogue.split] if published else None,
            "listed": f"{dialogue.split}_sent_emo.csv, line {dialogue.utterances[0].line}",
        }
        damage = next((each.damage for each in dialogue.utterances if each.damage), "")
        damage = damage or self.undocumented(each.emotion for each in dialogue.utterances)
        if damage:
            return UnusableRecording(**identity, reason=damage)
        videos = _video_folder(Path(self.source), dialogue.split)
        starts = [0.0, *itertools.accumulate(each.seconds for each in dialogue.utterances)]
        placed = list(zip(dialogue.utterances, itertools.pairwise(starts), strict=True))
        clips = [
            Clip(
                path=contained(videos, f"dia{dialogue.number}_utt{each.number}.mp4", what="file"),
                offset=start,
                seconds=each.seconds,  # a longer file would be heard and seen in the next utterance's steps
            )
            for each, (start, _) in placed
        ]
        found = tuple(clip for clip in clips if clip.path.is_file())
        return Recording(
            **identity,
            video=found,
            audio=found,
            words=tuple(word for each, (start, end) in placed for word in spread_words(each.text, start, end)),
            spans=tuple(
                span for each, (start, end) in placed for span in self.span(start, end, each.name, each.emotion)
            ),
        )


class _Utterance(NamedTuple):
    name: str
    number: int
    text: str
    emotion: str
    seconds: float
    """Its length by the list."""
    line: int
    damage: str = ""
    """Why its times make no sense; empty where they do."""


class _Dialogue(NamedTuple):
    split: str
    number: int
    episode: str
    """A speaker id that all dialogues of the episode share."""
    utterances: Sequence[_Utterance]
    """In the order of their numbers."""


@lru_cache(maxsize=4)
def _dialogues(source: Path) -> Sequence[_Dialogue]:
    """Every dialogue, by split and number. Read once per process: files that change later are not noticed."""
    found = [dialogue for split in _SPLITS for dialogue in _split_dialogues(source, split)]
    if not found:
        lists = ", ".join(f"{split}_sent_emo.csv" for split in _SPLITS)
        raise UserError(f"{source} holds none of {lists}: pass the folder MELD.Raw")
    return found


def _split_dialogues(source: Path, split: str) -> list[_Dialogue]:
    path = _first(source, split, f"{split}_sent_emo.csv")
    if not path.is_file():
        return []
    utterances: dict[int, dict[int, _Utterance]] = {}
    episodes: dict[int, str] = {}
    for line, row in read_table(path, _COLUMNS):
        numbers = {name: row[name] for name in _NUMBERS}
        wrong = next((name for name, cell in numbers.items() if not (cell.isascii() and cell.isdecimal())), None)
        if wrong is not None or any(len(cell) > 6 for cell in numbers.values()):
            raise UserError(f"{path}, line {line}: {', '.join(_NUMBERS)} must be numbers, got {list(numbers.values())}")
        dialogue, number, season, episode = (int(cell) for cell in numbers.values())
        members = utterances.setdefault(dialogue, {})
        if number in members:
            raise UserError(f"{path}, line {line}: utterance {number} of dialogue {dialogue} is there twice")
        members[number] = _utterance(row, f"{split}_dia{dialogue}_utt{number}", number, line)
        episodes.setdefault(dialogue, f"meld-s{season:02d}e{episode:02d}")
    return [
        _Dialogue(split, number, episodes[number], [members[place] for place in sorted(members)])
        for number, members in sorted(utterances.items())
    ]


def _utterance(row: Mapping[str, str], name: str, number: int, line: int) -> _Utterance:
    start, end = _seconds(row["StartTime"]), _seconds(row["EndTime"])
    damage = ""
    if start is None or end is None or end <= start:
        damage = f"utterance {number} runs from {row['StartTime'][:20]!r} to {row['EndTime'][:20]!r}"
    seconds = 0.0 if damage or start is None or end is None else round(end - start, 3)
    return _Utterance(name, number, row["Utterance"], row["Emotion"].lower(), seconds, line, damage)


def _seconds(text: str) -> float | None:
    found = _TIME.fullmatch(text)
    if not found:
        return None
    hours, minutes, seconds = (int(part) for part in found.groups()[:3])
    return 3600 * hours + 60 * minutes + seconds + int(found[4].ljust(3, "0")) / 1000


def _video_folder(source: Path, split: str) -> Path:
    return _first(source, split, _VIDEOS[split])


def _first(source: Path, split: str, name: str) -> Path:
    """Where something lies: directly in the source, or in the folder of its split."""
    direct = contained(source, name, what="path")
    return direct if direct.exists() else contained(source, split, name, what="path")
