"""MOSI: the reader against a tiny folder in the published layout, and against the published files where they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emolab.corpora.corpus import SessionReference
from emolab.corpora.mosi import Mosi
from emolab.names import UserError

WIDTHS = {"audio": 73, "video": 100, "text": 100}

# utterances as transcripts.csv lists them, sorted as text: position 10 stands before position 2
TRANSCRIPTS = [
    ("-hyphen_1", 0),
    ("-hyphen_10", 1),
    ("-hyphen_2", 1),
    ("under_score_3", 0),
    ("under_score_4", 1),
    ("zebra_1", 0),
]
ROWS = {"train": [2, 0, 1, 5], "test": [4, 3]}


def value(row: int, column: int, modality: str) -> float:
    """A feature that says where it came from."""
    return row + column / 128 + 1000 * list(WIDTHS).index(modality)


def write_folder(folder: Path) -> Path:
    """The six utterances above in the published layout, quotes and carriage returns included."""
    folder.mkdir()
    lines = [f'"{name}","WORDS, WITH A COMMA","7","{label}"' for name, label in TRANSCRIPTS]
    (folder / "transcripts.csv").write_text("\r\n".join(lines) + "\r\n")
    for split, rows in ROWS.items():
        (folder / f"rows_{split}.txt").write_text("".join(f"{row}\n" for row in rows))
        for modality, width in WIDTHS.items():
            table = [[*(value(row, column, modality) for column in range(width)), TRANSCRIPTS[row][1]] for row in rows]
            text = "".join(",".join(f'"{number}"' for number in line) + "\r\n" for line in table)
            (folder / f"{modality}_{split}0.csv").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "published")


def test_rows_are_matched_and_utterances_ordered(folder: Path) -> None:
    corpus = Mosi(source=str(folder), validation_videos=0)
    references = {each.session_id: each for each in corpus.references()}
    assert {key: each.published_split for key, each in references.items()} == {
        "mosi--hyphen": "train",
        "mosi-under_score": "test",
        "mosi-zebra": "train",
    }
    session = corpus.load(references["mosi--hyphen"])
    session.check(classes=2)
    assert session.speaker_id == "mosi--hyphen"
    assert session.step_seconds == 1.0
    assert session.labels.tolist() == [0, 1, 1]
    for name, modality in {"audio": "audio", "visual": "video", "text": "text"}.items():
        assert session.present[name].all()
        expected = [[value(row, column, modality) for column in range(WIDTHS[modality])] for row in (0, 2, 1)]
        np.testing.assert_array_equal(session.features[name], np.array(expected, dtype=np.float32))
    assert corpus.load(references["mosi-under_score"]).labels.tolist() == [0, 1]


def test_validation_videos_are_cut_from_training(folder: Path) -> None:
    splits = [
        {
            each.session_id: each.published_split
            for each in Mosi(source=str(folder), validation_videos=1, seed=seed).references()
        }
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert splits[0] == splits[1]
    assert all(Counter(each.values()) == {"train": 1, "validation": 1, "test": 1} for each in splits)
    assert all(each["mosi-under_score"] == "test" for each in splits)
    assert any(each != splits[0] for each in splits), "the seed chooses"


def test_class_prior_answers_the_training_majority(folder: Path) -> None:
    corpus = Mosi(source=str(folder), validation_videos=0)
    scores = {
        split: corpus.reference_scores(split, [each for each in corpus.references() if each.published_split == split])
        for split in ("train", "test")
    }
    assert scores == {"train": {"class_prior_accuracy": 0.5}, "test": {"class_prior_accuracy": 0.5}}


def test_relative_sources_are_pinned_where_they_were_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    corpus = Mosi(source="published", validation_videos=0)
    monkeypatch.chdir("/")
    assert len(corpus.references()) == 3


def replace(file: str, old: str, new: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return spoil


def lengthen(file: str) -> Callable[[Path], object]:
    """A quote too many, which nothing closes before what a reader takes for one cell."""

    def spoil(folder: Path) -> None:
        (folder / file).write_text('"stray,' + "no quote\n" * 20_000 + (folder / file).read_text())

    return spoil


def keep_lines(file: str, count: int) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / file).write_text("".join((folder / file).read_text().splitlines(keepends=True)[:count]))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "text_test0.csv").unlink(), "cannot read .*text_test0.csv"),
        (lambda folder: (folder / "rows_train.txt").write_text(""), "rows_train.txt is empty"),
        (keep_lines("audio_train0.csv", 3), r"audio_train0.csv is 3 x 74, expected 4 rows of 73"),
        (keep_lines("rows_test.txt", 1), "name row 3 of transcripts.csv 0 times"),
        (replace("rows_test.txt", "4", "2"), "name row 2 of transcripts.csv 2 times"),
        (replace("rows_test.txt", "4", "6"), r"rows_test.txt, line 1: expected a row .*0 to 5.*'6'"),
        (replace("rows_test.txt", "4", "-4"), "rows_test.txt, line 1"),
        (replace("rows_test.txt", "4", "4" * 5000), "rows_test.txt, line 1"),
        (replace("transcripts.csv", "zebra_1", f"zebra_{'1' * 5000}"), r"transcripts.csv, line 6: expected <video>"),
        (replace("video_train0.csv", '"1002.0",', ""), "video_train0.csv: expected 101 numbers"),
        (replace("video_train0.csv", '"1002.0"', '"smile"'), "video_train0.csv: expected 101 numbers"),
        (replace("video_train0.csv", '"1002.0"', '"nan"'), "video_train0.csv, line 1: a value is not finite"),
        (replace("transcripts.csv", '"7","1"', '"7","0"'), r"audio_train0.csv, line 3: label 1, but .* says 0"),
        (replace("transcripts.csv", "zebra_1", "zebra1"), r"transcripts.csv, line 6: expected <video>_<n>"),
        (replace("transcripts.csv", '"7","0"', '"7","2"'), r"transcripts.csv, line 1: expected"),
        (lengthen("transcripts.csv"), r"transcripts.csv, line \d+: not a CSV file \(field larger than field limit"),
        (lengthen("text_test0.csv"), r"text_test0.csv, line \d+: not a CSV file \(field larger than field limit"),
        (replace("transcripts.csv", "zebra_1", "under_score_4"), "an utterance is listed twice"),
        (replace("transcripts.csv", "zebra_1", "under_score_5"), "'under_score' has utterances in both"),
    ],
)
def test_contradictions_are_named_in_one_line(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        Mosi(source=str(folder), validation_videos=0).references()
    assert "\n" not in str(refusal.value)


def test_options_and_references_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation_videos=-1"):
        Mosi(source=str(folder), validation_videos=-1)
    with pytest.raises(UserError, match="validation_videos=2: must be below 2"):
        Mosi(source=str(folder), validation_videos=2).references()
    with pytest.raises(UserError, match="absent does not exist"):
        Mosi(source=str(tmp_path / "absent")).references()
    with pytest.raises(UserError, match="no session 'mosi-other'"):
        Mosi(source=str(folder)).load(SessionReference(session_id="mosi-other", speaker_id="mosi-other"))


def published() -> Mosi:
    folder = Path(os.environ.get("EMOLAB_MOSI", Path(__file__).parents[3] / "shared" / "data" / "mosi"))
    if not folder.is_dir():
        pytest.skip("the published files are at neither EMOLAB_MOSI nor ../shared/data/mosi")
    return Mosi(source=str(folder))


def test_published_files_have_the_published_counts() -> None:
    corpus = published()
    references = corpus.references()
    assert Counter(each.published_split for each in references) == {"train": 52, "validation": 10, "test": 31}
    steps = {"train": 0, "validation": 0, "test": 0}
    lengths = []
    for each in references:
        session = corpus.load(each)
        session.check(classes=2)
        assert each.published_split is not None
        steps[each.published_split] += session.num_steps
        lengths.append(session.num_steps)
    assert steps["train"] + steps["validation"] == 1447
    assert steps["test"] == 752
    assert (min(lengths), max(lengths)) == (9, 63)


def test_one_published_video_read_by_hand() -> None:
    """Each feature row, found through the rows file by plain text, stands at its utterance's place."""
    corpus = published()
    folder = Path(corpus.source)
    names = [line.split(",")[0].strip('"') for line in (folder / "transcripts.csv").read_text().splitlines()]
    rows = [int(line) for line in (folder / "rows_test.txt").read_text().split()]
    lines = (folder / "text_test0.csv").read_text().splitlines()
    video = names[rows[0]].rpartition("_")[0]
    session = corpus.load(SessionReference(session_id=f"mosi-{video}", speaker_id=f"mosi-{video}"))
    found = {
        int(names[row].rpartition("_")[2]): [float(cell.strip('"')) for cell in line.split(",")]
        for row, line in zip(rows, lines, strict=True)
        if names[row].rpartition("_")[0] == video
    }
    table = np.array([found[position] for position in sorted(found)])
    np.testing.assert_array_equal(session.features["text"], table[:, :-1].astype(np.float32))
    np.testing.assert_array_equal(session.labels, table[:, -1])
