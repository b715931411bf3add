"""IEMOCAP: five sessions of two actors each, in dialogues with transcripts, categorical labels and evaluators.

``Session<n>/dialog/EmoEvaluation/<dialogue>.txt`` has a line ``[start - end]<tab>utterance<tab>code<tab>[V, A, D]`` for
each utterance, followed by what each evaluator said (``C-E2:<tab>Neutral;<tab>()``; ``C-F1`` and ``C-M1`` are the
actors' own). ``Session<n>/dialog/transcriptions/<dialogue>.txt`` has lines ``utterance [start-end]: text``,
``Session<n>/dialog/avi/DivX/<dialogue>.avi`` the picture of both actors side by side, and
``Session<n>/sentences/wav/<dialogue>/<utterance>.wav`` the sound of each utterance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emolab.corpora.annotators import agreement, judgement_matrix
from emolab.corpora.catalog import register
from emolab.corpora.corpus import Split
from emolab.corpora.labelled_recordings import LabelledRecordings, UnusableRecording, read_text
from emolab.corpora.labels import OWN
from emolab.corpora.recordings import Clip, Recording, Word
from emolab.features.transcripts import spread_words
from emolab.names import UserError, contained

CODES = ("ang", "hap", "sad", "neu", "fru", "exc", "fea", "sur", "dis")
"""Anger, happiness, sadness, neutral, frustration, excitement, fear, surprise, disgust."""
_NO_STATE = ("oth", "xxx")
"""Another emotion; no majority among the evaluators."""

_UTTERANCE = re.compile(r"\[\s*(\S+)\s*-\s*(\S+)\s*\]\s+(Ses0\d[FM]_\w+)\s+(\S+)\s+\[")
_JUDGEMENT = re.compile(r"C-(E\d+):\s*(.*?)\s*(?:\(.*)?")
_SENTENCE = re.compile(r"(Ses0\d[FM]_\w+)\s+\[\s*(\S+?)\s*-\s*(\S+?)\s*\]:\s*(.*)")
_NOISE = re.compile(r"\[[^\]]*\]")
_DIALOGUE = re.compile(r"Ses0[1-5][FM]_\w+")


@register
@dataclass(frozen=True, kw_only=True)
class Iemocap(LabelledRecordings):
    """151 dialogues, 10,039 utterances. A session is a dialogue; utterance ids in a table are those of the corpus.

    Both actors are heard and seen in a dialogue, and the ten of them meet only within their own session, so what must
    not be in two splits is the session: ``speaker_id`` names it. There is no published split.
    """

    name = "iemocap"

    source: str
    """Folder with Session1 to Session5 (IEMOCAP_full_release)."""
    sound: Literal["sentences", "dialog"] = "sentences"
    """Hear the utterances' own files at their times, or the sound track of the dialogue's video."""
    test_session: int | None = None
    """Number of the session to test on, for the usual five-fold protocol: the next one validates, three train."""
    label_table: str = OWN
    """``own`` (nine codes), ``education`` (fru is frustrated, the rest is unmapped) or a table of yours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_session is not None and not 1 <= self.test_session <= 5:
            raise UserError(f"test_session={self.test_session}: must be 1 to 5")

    @property
    def own_labels(self) -> tuple[str, ...]:
        return CODES

    @property
    def tabled_labels(self) -> tuple[str, ...]:
        return CODES + _NO_STATE

    def recordings(self) -> Sequence[Recording]:
        """One session per dialogue.

        Raises:
            UserError: there is no Session folder, or one has no evaluations.
        """
        return [self._recording(dialogue) for dialogue in _dialogues(Path(self.source))]

    def utterance_labels(self) -> Iterable[tuple[str, str | None]]:
        for dialogue in _dialogues(Path(self.source)):
            yield from ((each.name, each.code) for each in dialogue.utterances)

    def annotation_summary(self) -> Mapping[str, Any]:
        """With the agreement of the corpus's evaluators, over utterances for which each named one category."""
        found = dict(super().annotation_summary())
        votes = {
            each.name: each.judgements for dialogue in _dialogues(Path(self.source)) for each in dialogue.utterances
        }
        categories = sorted({category for given in votes.values() for category in given.values()})
        published = agreement(judgement_matrix(votes, categories), categories)
        if published is not None:
            found["published_agreement"] = published.to_json()
            found.setdefault("kappa", published.kappa)
        return found

    def provenance(self) -> Mapping[str, Any]:
        return dict(super().provenance()) | {
            "source": "IEMOCAP, full release",
            "citation": "Busso et al., IEMOCAP: interactive emotional dyadic motion capture database, Language "
            "Resources and Evaluation 42, 2008",
            "speakers": "the two actors of a session share every dialogue: speaker ids name sessions",
            "words": "spread over the time of their utterance by the number of letters",
        }

    def _recording(self, dialogue: _Dialogue) -> Recording:
        name, number = dialogue.name, dialogue.session
        identity: dict[str, Any] = {
            "session_id": f"iemocap-{name}",
            "speaker_id": f"iemocap-Session{number}",
            "published_split": self._split(number),
            "listed": f"{name}.txt",
        }
        damage = dialogue.damage or self.undocumented(each.code for each in dialogue.utterances)
        if damage:
            return UnusableRecording(**identity, reason=damage)
        folder = contained(Path(self.source), f"Session{number}", what="folder")
        video = contained(folder, "dialog", "avi", "DivX", f"{name}.avi", what="file")
        picture = (Clip(path=video),) if video.is_file() else ()
        sentences = [
            Clip(path=contained(folder, "sentences", "wav", name, f"{each.name}.wav", what="file"), offset=each.start)
            for each in dialogue.utterances
        ]
        return Recording(
            **identity,
            video=picture,
            audio=picture if self.sound == "dialog" else tuple(clip for clip in sentences if clip.path.is_file()),
            words=dialogue.words,
            spans=tuple(
                span for each in dialogue.utterances for span in self.span(each.start, each.end, each.name, each.code)
            ),
        )

    def _split(self, number: int) -> Split | None:
        if self.test_session is None:
            return None
        turns: tuple[Split, ...] = ("test", "validation", "train", "train", "train")
        return turns[(number - self.test_session) % 5]


class _Utterance(NamedTuple):
    name: str
    start: float
    end: float
    code: str
    judgements: dict[str, str]
    """Evaluator -> category, of evaluators who named exactly one."""


class _Dialogue(NamedTuple):
    name: str
    session: int
    utterances: Sequence[_Utterance] = ()
    """In the order of their start."""
    words: tuple[Word, ...] = ()
    damage: str = ""
    """Why the dialogue cannot be used; empty where it can."""


@lru_cache(maxsize=4)
def _dialogues(source: Path) -> Sequence[_Dialogue]:
    """Every dialogue by name. Read once per process: files that change later are not noticed."""
    found: list[_Dialogue] = []
    for number in range(1, 6):
        folder = contained(source, f"Session{number}", "dialog", what="folder")
        if not (folder / "EmoEvaluation").is_dir():
            continue
        # the release also holds ._*.txt files of a Macintosh and folders of single evaluators
        names = sorted(path.stem for path in (folder / "EmoEvaluation").glob("Ses*.txt"))
        found += [_dialogue(folder, name, number) for name in names if _DIALOGUE.fullmatch(name)]
    if not found:
        raise UserError(f"{source} holds no Session1..5/dialog/EmoEvaluation/Ses*.txt: pass IEMOCAP_full_release")
    return found


def _dialogue(folder: Path, name: str, number: int) -> _Dialogue:
    try:
        utterances = _utterances(contained(folder, "EmoEvaluation", f"{name}.txt", what="file"))
        transcript = contained(folder, "transcriptions", f"{name}.txt", what="file")
        words = _words(transcript) if transcript.is_file() else ()
    except UserError as error:
        return _Dialogue(name, number, damage=str(error))
    return _Dialogue(name, number, utterances, words)


def _utterances(path: Path) -> list[_Utterance]:
    utterances: list[_Utterance] = []
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path.name}, line {line}"
        if found := _UTTERANCE.match(text):
            start, end = _interval(found[1], found[2], where)
            if start == end:
                raise UserError(f"{where}: the utterance has no length")
            if any(each.name == found[3] for each in utterances):
                raise UserError(f"{where}: utterance {found[3][:60]!r} is there twice")
            utterances.append(_Utterance(found[3], start, end, found[4], {}))
        elif text.startswith("["):
            raise UserError(f"{where}: expected [start - end], utterance, code and [V, A, D]")
        elif utterances and (found := _JUDGEMENT.fullmatch(text.strip())):
            categories = [part.strip() for part in found[2].split(";") if part.strip()]
            if len(categories) == 1:
                utterances[-1].judgements[found[1]] = categories[0]
    if not utterances:
        raise UserError(f"{path.name} holds no utterance")
    return sorted(utterances, key=lambda each: (each.start, each.end, each.name))


def _words(path: Path) -> tuple[Word, ...]:
    """Words in the order of their start: two people can speak at once. Noises in brackets are not words."""
    words: list[Word] = []
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if found := _SENTENCE.match(text.strip()):
            start, end = _interval(found[2], found[3], f"{path.name}, line {line}")
            words += spread_words(_NOISE.sub(" ", found[4]), start, end)
    return tuple(sorted(words))


def _interval(start: str, end: str, where: str) -> tuple[float, float]:
    try:
        times = float(start), float(end)
    except ValueError:
        raise UserError(f"{where}: times {start[:20]!r} and {end[:20]!r} are not numbers of seconds") from None
    if not 0 <= times[0] <= times[1] < float("inf"):
        raise UserError(f"{where}: the utterance runs from {times[0]:g} to {times[1]:g} s")
    return times
