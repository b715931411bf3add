"""Transcripts and label tables: what is read, and what is refused with its place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.features.media_files import real_media, write_rows

from emolab.features.annotations import read_spans
from emolab.features.decoding import Limits, UnusableMediaError
from emolab.features.grid import LabelledSpan, Word
from emolab.features.transcripts import check_words, read_words, spread_words


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_words_as_json(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", '[{"start": 0.5, "end": 1, "text": "why", "extra": 3}]')
    assert read_words(path) == (Word(0.5, 1.0, "why"),)


def test_what_pocketsphinx_wrote_about_real_speech() -> None:
    path = real_media() / "speech" / "sense_and_sensibility_01_austen_64kb-0880.json"
    words = read_words(path)
    assert " ".join(word.text for word in words) == "he was not an ill disposed young man"
    assert words[0] == Word(0.21, 0.21 + 0.12, "he")
    check_words(words, Limits())


def test_captions_spread_their_words_over_their_time(tmp_path: Path) -> None:
    vtt = "WEBVTT\n\nNOTE a comment\n\n1\n00:00:01.000 --> 00:00:03.000\n<v Ann>I am <b>lost</b>\n"
    srt = "1\n00:00:01,000 --> 00:00:03,000\nI am <i>lost</i>\n\n"
    for name, text in (("a.vtt", vtt), ("a.srt", srt)):
        words = read_words(written(tmp_path, name, text))
        assert [word.text for word in words] == ["I", "am", "lost"], name
        assert (words[0].start, words[-1].end) == (1.0, 3.0)
        assert words[1].start == pytest.approx(1 + 2 / 7)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("NOTE a comment\nof two lines\n\n1\n", "so then end"),
        ("STYLE\n::cue { color: red }\n\nREGION\nid:fred\n\n", "so then end"),
        ("a name of the caption\n", "so then end"),
        ("00:02.500 --> 00:02.600 align:start position:0%\nQ&amp;A&nbsp;isn&#39;t\n\n", "so then Q&A isn't end"),
        ("00:02.500 --> 00:02.600\nI<00:02.520><c> see</c><00:02.550><c> it</c>\n\n", "so then I see it end"),
    ],
)
def test_of_webvtt_only_what_is_said_becomes_words(tmp_path: Path, block: str, said: str) -> None:
    text = f"WEBVTT\nKind: captions\n\n00:01.000 --> 00:02.000\n \nso then\n\n{block}00:03.000 --> 00:04.000\nend\n"
    words = read_words(written(tmp_path, "a.vtt", text))
    assert " ".join(word.text for word in words) == said
    assert (words[0].start, words[1].end, words[-1].start, words[-1].end) == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(("suffix", "second"), [("vtt", "00:00:02.000"), ("srt", "00:00:02,000")])
def test_captions_may_overlap(tmp_path: Path, suffix: str, second: str) -> None:
    first, last = (second.replace("02", number) for number in ("00", "04"))
    text = f"WEBVTT\n\n{first} --> {last}\naa bb cc dd\n\n{second} --> {last}\nee ff\n"
    words = read_words(written(tmp_path, f"a.{suffix}", text))
    assert " ".join(word.text for word in words) == "aa bb cc ee dd ff"
    check_words(words, Limits())


@pytest.mark.parametrize(
    "text",
    [
        "1\n00:00:01,000 --> 00:00:02,000\nhow many\n40\n\n2\n00:00:03,000 --> 00:00:04,000\n{end}",
        "WEBVTT\n\n00:01.000 --> 00:02.000\nhow many\n40\n\n00:03.000 --> 00:04.000\n{end}",
        "WEBVTT\n\n1\n00:01.000 --> 00:02.000\nhow many\n40\n\n2\n00:03.000 --> 00:04.000\n{end}",
    ],
    ids=["srt", "vtt", "numbered vtt"],
)
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("perhaps\n42", "perhaps 42"),
        ("perhaps\n 42 \n\n", "perhaps 42"),
        ("42", "42"),
        ("42\n\n", "42"),
        ("perhaps\n\n3\n", "perhaps"),  # cut off: the number of another caption
        ("\n\n3\n", ""),
    ],
)
def test_a_number_that_is_said_is_not_that_of_the_next_caption(tmp_path: Path, text: str, end: str, said: str) -> None:
    suffix = "vtt" if text.startswith("WEBVTT") else "srt"
    words = read_words(written(tmp_path, f"a.{suffix}", text.format(end=end)))
    assert " ".join(word.text for word in words) == f"how many 40 {said}".strip()


@given(st.text("abc defgh  ", max_size=60), st.floats(0, 1e4), st.floats(0, 100))
@settings(deadline=None)
def test_spread_words_fill_the_interval_in_order(text: str, start: float, length: float) -> None:
    words = spread_words(text, start, start + length)
    assert [word.text for word in words] == text.split()
    if words:
        assert words[0].start == pytest.approx(start)
        assert words[-1].end == pytest.approx(start + length)
        check_words(words, Limits(seconds=math.inf))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "hello", r"transcripts end in .json, .vtt, .srt"),
        ("a.json", "{", r"a.json: expected .*JSONDecodeError"),
        ("a.json", '{"words": []}', r"a.json: expected .*KeyError"),
        ("a.json", '[{"start": 0, "end": "soon", "text": "a"}]', r"a.json: expected .*soon"),
        ("a.json", '[{"start": 0, "end": 1, "text": null}]', r"a.json: expected .*a word's text is None"),
        ("a.json", '[{"start": 0, "end": 1, "text": 3}]', r"a.json: expected .*a word's text is 3"),
        ("a.json", '{"w": [{"b": 0, "d": 1, "t": null}]}', r"a.json: expected .*a word's text is None"),
        ("a.json", "[" * 100_000, r"a.json: expected .*RecursionError"),
        ("a.json", "3", r"a.json: expected .*TypeError"),
        ("a.json", f'[{{"start": 1, "end": 1{"0" * 400}, "text": "a"}}]', r"a.json: expected .*OverflowError"),
        ("a.vtt", "this is a letter", "is not a caption file"),
        ("a.srt", "\x00\x01", "is not a caption file"),
    ],
)
def test_what_is_no_transcript_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UnusableMediaError, match=message) as refusal:
        read_words(written(tmp_path, name, text))
    assert "\n" not in str(refusal.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UnusableMediaError, match=r"a\.json is not UTF-8 text"):
        read_words(tmp_path / "a.json")
    with pytest.raises(UnusableMediaError, match=r"nowhere\.json cannot be read"):
        read_words(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([Word(2, 3, "late"), Word(1, 2, "early")], "word 2 .'early'.: times run backwards"),
        ([Word(2, 1, "turned")], "word 1 .'turned'.: times run backwards"),
        ([Word(-1, 1, "before")], "word 1 .'before'.: its times are -1 to 1 s"),
        ([Word(0, math.nan, "never")], "its times are 0 to nan s"),
        ([Word(0, 1e9, "ages")], "ends after the 4 hours of max_hours"),
    ],
)
def test_impossible_times_are_refused(words: list[Word], message: str) -> None:
    with pytest.raises(UnusableMediaError, match=message):
        check_words(words, Limits())


def test_label_tables(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "l.csv", "label,start,end,rater", "bored,0,1.5,x", "curious,1.5,2,y")
    assert read_spans(path) == (LabelledSpan(0.0, 1.5, "bored"), LabelledSpan(1.5, 2.0, "curious"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["start,end", "0,1"], "l.csv: column 'label' is missing"),
        (["start,end,label", "0,1,bored", "1,two,bored"], "l.csv, row 3, column end: expected seconds, got 'two'"),
        (["start,end,label", "2,1,bored"], "l.csv, row 2: a label from 2 to 1 s"),
        (["start,end,label", "0,inf,bored"], "l.csv, row 2: a label from 0 to inf s"),
        (["start,end,label", "0,1,"], "l.csv, row 2, column label: is empty"),
        (["start,end,label", "0"], "l.csv, row 2, column end: expected seconds, got ''"),
    ],
)
def test_wrong_rows_of_a_label_table_are_named(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(UnusableMediaError, match=message):
        read_spans(write_rows(tmp_path / "l.csv", *rows))


def test_a_transcript_of_the_wrong_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emolab.features.transcripts._LARGEST_FILE", 10)
    path = written(tmp_path, "a.json", json.dumps([{"start": 0, "end": 1, "text": "word"}]))
    with pytest.raises(UnusableMediaError, match="not a transcript"):
        read_words(path)
