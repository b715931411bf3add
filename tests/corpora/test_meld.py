"""MELD: dialogues of consecutive clips, the lists' own encoding and times, no split that is independent of speakers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.corpora.recorded_layouts import MELD_HEADER, MELD_ROWS, replaced, write_meld
from tests.features.media_files import bert_folder, save_resnet

from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.meld import EMOTIONS, Meld
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.names import UserError
from emolab.sessions.splits import assign_splits

OneLine = Callable[..., None]
NOTHING: dict[str, Any] = {"visual": VisualSettings(extractor="none"), "text": TextSettings(extractor="none")}
TRAIN = "train/train_sent_emo.csv"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests only read."""
    folder = tmp_path_factory.mktemp("meld") / "MELD.Raw"
    write_meld(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(published, tmp_path / "MELD.Raw"))


def reference(name: str = "train-dia0") -> SessionReference:
    return SessionReference(session_id=f"meld-{name}", speaker_id=f"meld-{name}")


def test_dialogues_are_sessions_of_the_published_splits(published: Path) -> None:
    references = Meld(source=str(published), **NOTHING).references()
    assert {each.session_id: each.published_split for each in references} == {
        "meld-train-dia0": "train",
        "meld-train-dia2": "train",
        "meld-dev-dia0": "validation",
        "meld-test-dia0": "test",
    }
    assert all(each.speaker_id == each.session_id for each in references), "nobody is promised to be in one split"


def test_episodes_stay_together_in_a_split_of_one_s_own(published: Path) -> None:
    references = Meld(source=str(published), split="episode", **NOTHING).references()
    assert {each.session_id[5:]: each.speaker_id for each in references} == {
        "train-dia0": "meld-s04e07",
        "train-dia2": "meld-s08e21",
        "dev-dia0": "meld-s08e21",
        "test-dia0": "meld-s03e19",
    }
    splits = assign_splits(references, seed=0)
    assert Counter(len(members) for members in splits.values()) in (Counter([1, 1, 2]),)


def test_utterances_follow_each_other_with_words_put_right(published: Path) -> None:
    recording = Meld(source=str(published), **NOTHING).recording(reference())
    assert [(clip.path.name, clip.offset, clip.end) for clip in recording.video] == [
        ("dia0_utt0.mp4", 0.0, 1.5),
        ("dia0_utt3.mp4", 2.5, 4.0),
    ]
    assert recording.audio == recording.video
    assert [tuple(span) for span in recording.spans] == [
        (0.0, 1.5, "sadness"),
        (1.5, 2.5, "surprise"),
        (2.5, 4.0, "neutral"),
    ]
    words: Any = recording.words
    assert " ".join(word.text for word in words) == 'Oh my God, he’s lost it. What? He said "No".'
    assert (words[0].start, words[-1].end) == (0.0, 4.0)


def test_three_modalities_and_labels_meet_on_one_grid(published: Path, tmp_path: Path) -> None:
    corpus = Meld(
        source=str(published),
        visual=VisualSettings(weights=str(save_resnet(tmp_path / "resnet18.safetensors")), frames_per_second=2.0),
        text=TextSettings(model=str(bert_folder())),
        step_seconds=0.5,
    )
    assert corpus.dimensions == {"audio": 40, "visual": 512, "text": 384}
    session = corpus.load(reference())
    session.check(classes=len(EMOTIONS))
    assert [EMOTIONS[label] for label in session.labels] == ["sadness"] * 3 + ["surprise"] * 2 + ["neutral"] * 3
    # clips of one second at 0 and 2.5 s; the second utterance's is missing, its words are not
    seen = [True, True, False, False, False, True, True, False]
    assert session.present["visual"].tolist() == seen
    assert [a and not b for a, b in zip(seen, session.present["audio"].tolist(), strict=True)] == [False] * 8
    assert session.present["text"].all()


def test_a_dialogue_without_its_last_video_ends_earlier(folder: Path) -> None:
    (folder / "train" / "train_splits" / "dia0_utt3.mp4").unlink()
    session = Meld(source=str(folder), **NOTHING).load(reference())
    assert [EMOTIONS[label] for label in session.labels] == ["sadness"], "the words are not read"


def test_tables_name_utterances_by_split_dialogue_and_number(published: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("utterance,class\ntrain_dia0_utt3,bored\ndev_dia0_utt0,curious\n")
    corpus = Meld(source=str(published), label_table=str(table), **NOTHING)
    assert corpus.load(reference()).labels.tolist() == [-100, -100, 0, 0]
    found = corpus.annotation_summary()
    assert found["labelled"] == 2
    assert found["unmapped"] == {"joy": 1, "sadness": 1, "surprise": 2}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_lists_in_other_encodings_read_the_same(folder: Path, published: Path, encoding: str) -> None:
    text = (folder / TRAIN).read_bytes().decode("utf-8").replace("\x92", "’")
    (folder / TRAIN).write_bytes(text.encode(encoding))
    recordings = [Meld(source=str(each), **NOTHING).recording(reference()) for each in (folder, published)]
    assert recordings[0].words == recordings[1].words


def test_lists_and_videos_may_lie_side_by_side(folder: Path) -> None:
    shutil.move(folder / TRAIN, folder / "train_sent_emo.csv")
    shutil.move(folder / "train" / "train_splits", folder / "train_splits")
    corpus = Meld(source=str(folder), **NOTHING)
    assert len(corpus.references()) == 4
    assert len(corpus.recording(reference()).video) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced(TRAIN, "00:20:58,756", "00:20:57,256"), "utterance 0 runs from '00:20:57,256' to '00:20:57,256'"),
        (replaced(TRAIN, "00:20:58,756", "later"), "utterance 0 runs from '00:20:57,256' to 'later'"),
        (replaced(TRAIN, "sadness", "sad"), "unknown label 'sad' .labels: anger"),
    ],
)
def test_damage_to_one_dialogue_is_that_dialogue_s(
    folder: Path, spoil: Callable[[Path], object], message: str, one_line: OneLine
) -> None:
    spoil(folder)
    corpus = Meld(source=str(folder), **NOTHING)
    assert len(corpus.references()) == 4
    with pytest.raises(RefusedSessionError, match=message) as refusal:
        corpus.load(reference())
    one_line(refusal, "meld-train-dia0", "train_sent_emo.csv, line 2")
    assert corpus.load(reference("train-dia2")).num_steps == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced(TRAIN, "Dialogue_ID", "Dialog"), "line 1: column 'Dialogue_ID' is missing"),
        (replaced(TRAIN, ",positive,2,0,", ",positive,two,0,"), "line 5: Dialogue_ID, .* must be numbers"),
        (replaced(TRAIN, ",positive,2,0,", ",positive,../2,0,"), "line 5: Dialogue_ID, .* must be numbers"),
        (replaced(TRAIN, ",negative,0,1,", ",negative,0,0,"), "line 3: utterance 0 of dialogue 0 is there twice"),
        (replaced(TRAIN, "2,What?,", "2,What?,really,"), "line 3: 12 cells, expected 11"),
        (lambda folder: (folder / TRAIN).write_bytes(b"\0"), "not a text file"),
    ],
)
def test_a_malformed_list_is_named_in_one_line(
    folder: Path, spoil: Callable[[Path], object], message: str, one_line: OneLine
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        Meld(source=str(folder), **NOTHING).references()
    one_line(refusal, "train_sent_emo.csv")


def test_a_folder_without_lists_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of train_sent_emo.csv, dev_sent_emo.csv"):
        Meld(source=str(tmp_path), **NOTHING).references()


lists = st.lists(
    st.one_of(
        st.sampled_from([MELD_HEADER, *(row for rows in MELD_ROWS.values() for row in rows), '"', "1,2"]),
        st.text(max_size=30),
    ),
    max_size=8,
).map(lambda lines: "\r\n".join([MELD_HEADER, *lines]).encode("utf-8", "replace"))


@given(content=st.one_of(lists, st.binary(max_size=100)))
@settings(max_examples=50, deadline=None)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "train_sent_emo.csv").write_bytes(content)
    corpus = Meld(source=str(folder), **NOTHING)
    try:
        corpus.annotation_summary()
        for each in corpus.references():
            corpus.recording(each)
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)
