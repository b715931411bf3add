"""DAiSEE: clips of learners, levels of four affects, neither sound nor words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.corpora.recorded_layouts import DAISEE_CLIPS, DAISEE_MISSING, replaced, write_daisee
from tests.features.media_files import bert_folder

from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.daisee import AFFECTS, Daisee
from emolab.features.audio import AudioSettings
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.names import UserError

OneLine = Callable[..., None]
Published = tuple[Path, VisualSettings]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A folder that tests only read, and settings for pictures."""
    folder = tmp_path_factory.mktemp("daisee") / "DAiSEE"
    return folder, VisualSettings.model_validate(write_daisee(folder)["visual"])


@pytest.fixture
def folder(published: Published, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(published[0], tmp_path / "DAiSEE"))


def reference(clip: str) -> SessionReference:
    return SessionReference(session_id=f"daisee-{clip}", speaker_id=f"daisee-{clip[:6]}")


def own_labels(corpus: Daisee) -> list[str | None]:
    return [label for _, label in corpus.utterance_labels()]


def test_clips_are_sessions_of_their_subjects(published: Published) -> None:
    references = Daisee(source=str(published[0])).references()
    assert [(each.session_id, each.speaker_id, each.published_split) for each in references] == [
        (f"daisee-{clip}", f"daisee-{clip[:6]}", split.lower())
        for split, clips in DAISEE_CLIPS.items()
        for clip in clips
    ]


def test_only_pictures_are_there(published: Published) -> None:
    corpus = Daisee(source=str(published[0]), visual=published[1])
    assert corpus.dimensions == {"visual": 512}
    session = corpus.load(reference("4000221001"))
    session.check(classes=4)
    assert session.num_steps == 2
    assert session.present["visual"].all()
    assert session.labels.tolist() == [AFFECTS.index("confusion")] * 2


def test_beside_other_corpora_sound_and_words_are_absent(published: Published) -> None:
    corpus = Daisee(
        source=str(published[0]),
        visual=published[1],
        audio=AudioSettings(extractor="mfcc"),
        text=TextSettings(model=str(bert_folder())),
    )
    assert corpus.dimensions == {"audio": 40, "visual": 512, "text": 384}
    session = corpus.load(reference("4000221001"))
    session.check(classes=4)
    assert {name: mask.tolist() for name, mask in session.present.items()} == {
        "audio": [False, False],
        "visual": [True, True],
        "text": [False, False],
    }
    assert not session.features["audio"].any()


def test_the_highest_affect_is_the_label(published: Published) -> None:
    corpus = Daisee(source=str(published[0]))
    assert own_labels(corpus) == ["engagement", "boredom", "engagement", "confusion", None, "engagement"]
    found = corpus.annotation_summary()
    assert (found["labelled"], found["below_minimum_level"], found["shared_first_place"]) == (5, 1, 0)
    low = Daisee(source=str(published[0]), minimum_level=1).annotation_summary()
    assert (low["labelled"], low["below_minimum_level"], low["shared_first_place"]) == (5, 0, 1)


def test_affects_that_the_table_leaves_out_do_not_compete(published: Published, tmp_path: Path) -> None:
    corpus = Daisee(source=str(published[0]), label_table="education", visual=published[1])
    assert corpus.classes == ("confused", "curious", "bored", "frustrated")
    # boredom and confusion share the third clip; the last is frustrated beside a higher engagement
    assert own_labels(corpus) == ["engagement", "boredom", None, "confusion", None, "frustration"]
    assert corpus.load(reference("5000441002")).labels.tolist() == [3, 3]
    found = corpus.annotation_summary()
    assert found["unmapped"] == {"engagement": 1}
    assert (found["labelled"], found["without_label"], found["shared_first_place"]) == (3, 2, 1)
    table = tmp_path / "table.csv"
    table.write_text("label,class\nengagement,curious\nboredom,bored\n")
    curious = Daisee(source=str(published[0]), label_table=str(table))
    assert own_labels(curious) == ["engagement", "boredom", "engagement", "confusion", None, "engagement"]
    assert curious.annotation_summary()["unmapped"] == {"confusion": 1}


def test_a_clip_that_is_not_there_is_set_aside(published: Published, one_line: OneLine) -> None:
    corpus = Daisee(source=str(published[0]), visual=published[1])
    with pytest.raises(RefusedSessionError) as refusal:
        corpus.load(reference(DAISEE_MISSING))
    one_line(refusal, f"daisee-{DAISEE_MISSING}", "TrainLabels.csv, line 3", "its video is missing")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            replaced("Labels/TrainLabels.csv", "Boredom", "Bored"),
            "TrainLabels.csv, line 1: column 'Boredom' is missing",
        ),
        (replaced("Labels/TrainLabels.csv", "0,2,0,0", "0,4,0,0"), "TrainLabels.csv, line 2: levels must be 0 to 3"),
        (replaced("Labels/TrainLabels.csv", "0,2,0,0", "0,2,0"), "TrainLabels.csv, line 2: 4 cells, expected 5"),
        (
            replaced("Labels/TestLabels.csv", "5000441001", "5000441002"),
            "TestLabels.csv, line 3: clip '5000441002' was",
        ),
        (
            replaced("Labels/TestLabels.csv", "5000441001", "../Train/x"),
            "TestLabels.csv, line 2: ClipID .* is not allowed",
        ),
        (replaced("Labels/TestLabels.csv", "5000441001.avi", "5000441001"), "is not the name of an .avi or .mp4"),
        (lambda folder: shutil.rmtree(folder / "Labels"), "holds no labelled clip"),
        (lambda folder: (folder / "Labels" / "TestLabels.csv").write_bytes(b"\0"), "is not a text file"),
    ],
)
def test_mistakes_are_named_in_one_line(
    folder: Path, spoil: Callable[[Path], object], message: str, one_line: OneLine
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        Daisee(source=str(folder)).references()
    one_line(refusal)


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    clip = folder / "DataSet" / "Test" / "500044" / "5000441001" / "5000441001.avi"
    shutil.move(clip, tmp_path / "secret.avi")
    clip.symlink_to(tmp_path / "secret.avi")
    with pytest.raises(UserError, match="leaves the folder"):
        Daisee(source=str(folder)).references()


def test_options_are_checked(tmp_path: Path) -> None:
    for level in (-1, 4):
        with pytest.raises(UserError, match=f"minimum_level={level}"):
            Daisee(source=str(tmp_path), minimum_level=level)


HEADER = "ClipID,Boredom,Engagement,Confusion,Frustration "
lists = st.lists(
    st.one_of(st.sampled_from(["1100011002.avi,0,2,0,0", "a.avi,9,9,9,9", '"', ",,,,"]), st.text(max_size=20)),
    max_size=6,
).map(lambda rows: "\n".join([HEADER, *rows]).encode("utf-8", "replace"))


@given(content=st.one_of(lists, st.binary(max_size=80)))
@settings(max_examples=50, deadline=None)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "Labels").mkdir()
    (folder / "Labels" / "TrainLabels.csv").write_bytes(content)
    corpus: Any = Daisee(source=str(folder))
    try:
        corpus.annotation_summary()
        for each in corpus.references():
            corpus.recording(each)
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)
