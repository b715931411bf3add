"""Noise on a transcript with word times, severities 1 to 5; the words hit at one severity are hit at every higher."""

from __future__ import annotations

import string
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from emolab.robustness.corruptions.catalog import register
from emolab.robustness.corruptions.recording import Recording, Word
from emolab.robustness.corruptions.streams import Stream

SHARE = (0.1, 0.2, 0.3, 0.4, 0.5)
UNKNOWN = "[UNK]"
SUBSTITUTED, DELETED = 0.6, 0.25
"""Shares of the word errors of a recogniser; the rest are insertions."""


def _words(recording: Recording) -> tuple[Word, ...]:
    assert recording.words is not None  # corrupt_recording has looked
    return recording.words


@register("text_unknown_words", stage="transcript", source="unknown-token rate 10 to 50 %")
def text_unknown_words(recording: Recording, severity: int, stream: Stream) -> Recording:
    words = _words(recording)
    hit = stream.uniform("words", len(words)) < SHARE[severity - 1]
    changed = tuple(word._replace(text=UNKNOWN) if struck else word for word, struck in zip(words, hit, strict=True))
    return replace(recording, words=changed)


@register("text_character_edits", stage="transcript", source="one edit in 10 to 50 % of the words")
def text_character_edits(recording: Recording, severity: int, stream: Stream) -> Recording:
    """A typing mistake in a word: a letter replaced, left out, doubled, or swapped with the next one."""
    words = _words(recording)
    hit = stream.uniform("words", len(words)) < SHARE[severity - 1]
    draws = stream.generator("edits").random((len(words), 3))
    changed = tuple(
        word._replace(text=_edited(word.text, *draw)) if struck and word.text else word
        for word, struck, draw in zip(words, hit, draws, strict=True)
    )
    return replace(recording, words=changed)


def _edited(text: str, place: float, kind: float, letter: float) -> str:
    at = int(place * len(text))
    before, here, after = text[:at], text[at], text[at + 1 :]
    replaced = before + string.ascii_lowercase[int(letter * 26)] + after
    # A word of one letter cannot lose it: an empty word would be a deletion.
    edits = [replaced, before + after or replaced, before + here + here + after, before + after[:1] + here + after[1:]]
    return edits[int(kind * len(edits))]


@register("text_word_errors", stage="transcript", source="simulated word error rate 10 to 50 %")
def text_word_errors(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Errors of a speech recogniser, 60 % substitutions, 25 % deletions, 15 % insertions."""
    hit = stream.uniform("words", len(_words(recording))) < SHARE[severity - 1]
    return replace(recording, words=misheard(recording, stream, hit))


def misheard(recording: Recording, stream: Stream, hit: NDArray[np.bool_]) -> tuple[Word, ...]:
    """The words with one error at each that is hit; wrong words come from the recording's own vocabulary."""
    words = _words(recording)
    vocabulary = sorted({word.text for word in words})
    draws = stream.generator("errors").random((len(words), 2))
    heard: list[Word] = []
    for word, struck, (kind, choice) in zip(words, hit, draws, strict=True):
        if not struck:
            heard.append(word)
            continue
        other = _another(word.text, vocabulary, choice)
        if kind < SUBSTITUTED:
            heard.append(word._replace(text=other))
        elif kind >= SUBSTITUTED + DELETED:
            middle = (word.start + word.end) / 2
            heard += [word._replace(end=middle), Word(other, middle, word.end)]
    return tuple(heard)


def _another(text: str, vocabulary: list[str], choice: float) -> str:
    others = [known for known in vocabulary if known != text]
    return others[int(choice * len(others))] if others else UNKNOWN
