"""Transcripts as words with times: JSON of words, pocketsphinx's JSON, and captions (WebVTT, SubRip)."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pysubs2

from emolab.features.decoding import Limits, UnusableMediaError
from emolab.features.grid import Word

_LARGEST_FILE = 64 * 2**20
"""Bytes; a day of speech is a few megabytes."""
_VARIANT = re.compile(r"\(\d+\)$")
"""Pocketsphinx marks the second pronunciation of a word as ``was(2)``."""
_CUE = re.compile(r"^(.*-->.*)((?:\n.+)*)", re.MULTILINE)
"""A caption of WebVTT: its times and, as far as the next empty line, its text."""
_NEXT = "\n\n0"
"""The number of a next caption: where none follows a caption, pysubs2 takes a number that is said last for it."""
_SAID_NUMBER = re.compile(r"\S *\n *\d+\s*\Z")
"""A line of the last caption; after an empty line it would be the number of another one."""
_MARKUP = re.compile(r"<[^<>]*>")
_NOT_SPOKEN = {"<s>", "</s>", "<sil>", "[NOISE]", "[SPEECH]"}


def read_words(path: Path) -> tuple[Word, ...]:
    """The words of a transcript, by its ending: .json, .vtt, .srt.

    Raises:
        UnusableMediaError: it cannot be read, or is none of these.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UnusableMediaError(f"{path.name}: transcripts end in {', '.join(_READERS)}")
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UnusableMediaError(f"{path.name} is larger than {_LARGEST_FILE >> 20} MB: not a transcript")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UnusableMediaError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UnusableMediaError(f"{path.name} is not UTF-8 text") from None
    return reader(text, path.name)


def check_words(words: Sequence[Word], limits: Limits) -> None:
    """Refuse words that lie nowhere on a session's clock.

    Raises:
        UnusableMediaError: a time that is no number, negative, too late, or runs backwards, with the word.
    """
    latest = 0.0
    for number, (start, end, text) in enumerate(words, start=1):
        where = f"transcript, word {number} ({text[:30]!r})"
        if not (math.isfinite(start) and math.isfinite(end)) or start < 0:
            raise UnusableMediaError(f"{where}: its times are {start:g} to {end:g} s")
        if end < start or start < latest:
            raise UnusableMediaError(f"{where}: times run backwards, {start:g} to {end:g} s after {latest:g} s")
        if end > limits.seconds:
            raise UnusableMediaError(f"{where} ends after the {limits.seconds / 3600:g} hours of max_hours")
        latest = start


def spread_words(text: str, start: float, end: float) -> tuple[Word, ...]:
    """The words of a sentence whose own interval is all that is known, each as long as its share of the letters."""
    spoken = text.split()
    letters = sum(map(len, spoken))
    words, before = [], 0
    for word in spoken:
        after = before + len(word)
        words.append(Word(start + (end - start) * before / letters, start + (end - start) * after / letters, word))
        before = after
    return tuple(words)


def _from_json(text: str, name: str) -> tuple[Word, ...]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            return _from_pocketsphinx(content["w"])
        return tuple(Word(float(word["start"]), float(word["end"]), _text(word["text"])) for word in content)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UnusableMediaError(
            f'{name}: expected [{{"start": s, "end": s, "text": word}}, ...] or what pocketsphinx writes '
            f"({type(error).__name__}: {str(error)[:80]})"
        ) from None


def _text(value: Any) -> str:
    """Refuse what is no text: ``null`` would be heard as the word None."""
    if not isinstance(value, str):
        raise TypeError(f"a word's text is {value!r}")
    return value


def _from_pocketsphinx(entries: Any) -> tuple[Word, ...]:
    spoken = [(float(word["b"]), float(word["d"]), _VARIANT.sub("", _text(word["t"]))) for word in entries]
    return tuple(Word(begin, begin + length, text) for begin, length, text in spoken if text not in _NOT_SPOKEN)


def _from_captions(text: str, name: str) -> tuple[Word, ...]:
    """The words in the order of their start: two people can speak at once."""
    webvtt = Path(name).suffix.lower() == ".vtt"
    try:
        captions = pysubs2.SSAFile.from_string(
            _without_remarks(text) if webvtt else _closed(text), format_="vtt" if webvtt else "srt"
        )
    except (pysubs2.Pysubs2Error, ValueError) as error:
        raise UnusableMediaError(f"{name} is not a caption file: {str(error)[:80]}") from None
    if not captions.events and text.strip().removeprefix("WEBVTT").strip():
        raise UnusableMediaError(f"{name} is not a caption file: it has no caption with times")
    spoken = [
        spread_words(html.unescape(line.plaintext) if webvtt else line.plaintext, line.start / 1000, line.end / 1000)
        for line in captions
    ]
    return tuple(sorted((word for words in spoken for word in words), key=lambda word: word.start))


def _without_remarks(text: str) -> str:
    """WebVTT without what is not said, all of which pysubs2 would take for words: comments, styles, names of captions,
    markup. Times of single words in the markup it would even take for those of a caption."""
    return "\n".join(found[1] + _MARKUP.sub("", found[2]) + _NEXT for found in _CUE.finditer(text))


def _closed(text: str) -> str:
    """SubRip whose last caption does not end in a number."""
    return text.rstrip() + _NEXT if _SAID_NUMBER.search(text) else text


_READERS: dict[str, Callable[[str, str], tuple[Word, ...]]] = {
    ".json": _from_json,
    ".vtt": _from_captions,
    ".srt": _from_captions,
}
