"""IEMOCAP: dialogues on the grid of their evaluations, two people at once, evaluators' agreement."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.corpora.recorded_layouts import IMPRO, IMPRO_WORDS, replaced, write_iemocap
from tests.features.media_files import bert_folder, save_resnet

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.corpora.annotators import agreement, judgement_matrix
from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.iemocap import CODES, Iemocap
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.names import UserError
from emolab.sessions.splits import split_by_speaker

OneLine = Callable[..., None]
IMPRO_FILE = "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
WORDS_FILE = "Session1/dialog/transcriptions/Ses01F_impro01.txt"
NOTHING: dict[str, Any] = {"visual": VisualSettings(extractor="none"), "text": TextSettings(extractor="none")}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests only read."""
    folder = tmp_path_factory.mktemp("iemocap") / "IEMOCAP_full_release"
    write_iemocap(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(published, tmp_path / "release"))


def reference(dialogue: str = "Ses01F_impro01") -> SessionReference:
    return SessionReference(session_id=f"iemocap-{dialogue}", speaker_id="iemocap-Session1")


def test_dialogues_are_sessions_and_sessions_are_speakers(published: Path) -> None:
    references = Iemocap(source=str(published), **NOTHING).references()
    assert [each.session_id for each in references] == [
        "iemocap-Ses01F_impro01",
        *(f"iemocap-Ses0{n}M_script01_1" for n in range(1, 6)),
    ]
    assert [each.speaker_id[-1] for each in references] == ["1", "1", "2", "3", "4", "5"]
    assert {each.published_split for each in references} == {None}
    assert len(set(split_by_speaker([each.speaker_id for each in references], seed=0).values())) == 3


def test_one_session_tests_and_the_next_validates(published: Path) -> None:
    references = Iemocap(source=str(published), test_session=5, **NOTHING).references()
    splits = {each.speaker_id[-1]: each.published_split for each in references}
    assert splits == {"1": "validation", "2": "train", "3": "train", "4": "train", "5": "test"}


def test_three_modalities_and_labels_meet_on_one_grid(published: Path, tmp_path: Path) -> None:
    corpus = Iemocap(
        source=str(published),
        visual=VisualSettings(weights=str(save_resnet(tmp_path / "resnet18.safetensors")), frames_per_second=1.0),
        text=TextSettings(model=str(bert_folder())),
    )
    assert corpus.dimensions == {"audio": 40, "visual": 512, "text": 384}
    assert corpus.classes == CODES
    session = corpus.load(corpus.references()[0])
    session.check(classes=len(corpus.classes))
    assert session.num_steps == 6, "the picture lasts 5.5 s"
    # neutral covers half of the first and all of the second; from 2 s frustration outweighs it; 4 to 5 s is xxx
    assert session.labels.tolist() == [3, 3, 4, 4, IGNORED_LABEL, IGNORED_LABEL]
    assert session.present["audio"].tolist() == [True] * 5 + [False]
    assert session.present["visual"].all()
    assert session.present["text"].tolist() == [True] * 5 + [False]
    alone = corpus.load(reference("Ses02M_script01_1"))
    assert not alone.present["visual"].any(), "a release without videos is one without pictures"
    assert alone.labels.tolist() == [0, 0]


def test_a_dialogue_without_a_picture_and_its_last_sentence_ends_earlier(folder: Path) -> None:
    replaced(IMPRO_FILE, "F001\txxx", "F001\tang")(folder)
    (folder / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F001.wav").unlink()
    session = Iemocap(source=str(folder), **NOTHING).load(reference())
    assert session.labels.tolist() == [3, 3, 4, 4]


def test_a_recording_is_what_the_files_say(published: Path) -> None:
    corpus = Iemocap(source=str(published), **NOTHING)
    recording = corpus.recording(reference())
    assert [(clip.path.name, clip.offset) for clip in recording.audio] == [
        ("Ses01F_impro01_F000.wav", 0.5),
        ("Ses01F_impro01_M000.wav", 2.0),
        ("Ses01F_impro01_F001.wav", 4.0),
    ]
    assert [clip.path.name for clip in recording.video] == ["Ses01F_impro01.avi"]
    words: Any = recording.words
    assert " ".join(word.text for word in words) == "Excuse me now, Do ok. you have your forms? Yeah."
    assert [(words[0].start, words[-1].end)] == [(0.5, 5.0)]
    assert [word.start for word in words] == sorted(word.start for word in words)
    both = Iemocap(source=str(published), sound="dialog", **NOTHING).recording(reference())
    assert both.audio == both.video == recording.video


def test_what_is_unmapped_is_counted_and_the_evaluators_agree(published: Path) -> None:
    corpus = Iemocap(source=str(published), label_table="education", **NOTHING)
    assert corpus.classes == ("confused", "curious", "bored", "frustrated")
    assert corpus.load(reference()).labels.tolist() == [-100, -100, 3, 3, -100]
    found = corpus.annotation_summary()
    assert (found["utterances"], found["labelled"]) == (8, 2)
    assert found["unmapped"] == {"ang": 1, "exc": 1, "neu": 1, "oth": 1, "sad": 1, "xxx": 1}
    # actors judging themselves are no evaluators; one evaluator named two categories for M000
    votes = {
        "F000": dict.fromkeys(("E2", "E3", "E4"), "Neutral"),
        "F001": {"E2": "Anger", "E3": "Frustration", "E4": "Neutral"},
        "M000": {"E2": "Frustration", "E3": "Frustration"},
    } | {f"s{n}": dict.fromkeys(("E2", "E4", "E5"), "Sadness") for n in range(5)}
    classes = sorted({name for given in votes.values() for name in given.values()})
    expected = agreement(judgement_matrix(votes, classes), classes)
    assert expected is not None
    assert found["kappa"] == pytest.approx(expected.kappa)
    assert found["published_agreement"]["items"] == 7
    assert found["published_agreement"]["items_left_out"] == 1


def test_a_table_may_map_what_the_evaluators_left_open(published: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text("labels: {xxx: confused, fru: frustrated}\nutterances: {Ses01F_impro01_F000: bored}\n")
    corpus = Iemocap(source=str(published), label_table=str(table), **NOTHING)
    assert [corpus.classes[label] for label in corpus.load(reference()).labels] == [
        "bored", "bored", "frustrated", "frustrated", "confused",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced(IMPRO_FILE, "\tneu\t", "\tfrx\t"), "unknown label 'frx' .labels: ang"),
        (replaced(IMPRO_FILE, "[0.5000 - 2.5000]", "[2.5000 - 0.5000]"), "line 3: the utterance runs from 2.5 to 0.5"),
        (replaced(IMPRO_FILE, "[0.5000 - 2.5000]", "[0.5000 - 0.5000]"), "line 3: the utterance has no length"),
        (replaced(IMPRO_FILE, "[0.5000 - 2.5000]", "[soon - 2.5000]"), "line 3: times 'soon' and '2.5000'"),
        (replaced(IMPRO_FILE, "[0.5000 - 2.5000]", "[0.5 - nan]"), "line 3: the utterance runs from 0.5 to nan"),
        (replaced(IMPRO_FILE, "Ses01F_impro01_M000", "Ses01F_impro01_F000"), "'Ses01F_impro01_F000' is there twice"),
        (replaced(IMPRO_FILE, "\tSes01F_impro01_M000", ""), "line 18: expected .start - end., utterance, code"),
        (lambda folder: (folder / IMPRO_FILE).write_text(""), "holds no utterance"),
        (lambda folder: (folder / IMPRO_FILE).write_bytes(b"\0\1"), "is not a text file"),
        (
            replaced(WORDS_FILE, "[004.0000-005.0000]", "[005.0000-004.0000]"),
            "line 4: the utterance runs from 5 to 4 s",
        ),
    ],
)
def test_damage_to_one_dialogue_is_that_dialogue_s(
    folder: Path, spoil: Callable[[Path], object], message: str, one_line: OneLine
) -> None:
    spoil(folder)
    corpus = Iemocap(source=str(folder), **NOTHING)
    assert len(corpus.references()) == 6
    corpus.annotation_summary()
    with pytest.raises(RefusedSessionError, match=message) as refusal:
        corpus.load(reference())
    one_line(refusal, "iemocap-Ses01F_impro01")
    assert corpus.load(reference("Ses02M_script01_1")).num_steps == 2


def test_missing_sound_and_words_are_absent_not_wrong(folder: Path) -> None:
    (folder / WORDS_FILE).unlink()
    (folder / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M000.wav").unlink()
    corpus = Iemocap(source=str(folder), **NOTHING)
    assert corpus.recording(reference()).words == ()
    assert corpus.load(reference()).present["audio"].tolist() == [True, True, True, False, True]


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text(IMPRO)
    (folder / IMPRO_FILE).unlink()
    (folder / IMPRO_FILE).symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RefusedSessionError, match="leaves the folder"):
        Iemocap(source=str(folder), **NOTHING).load(reference())


def test_options_are_checked(tmp_path: Path, published: Path) -> None:
    with pytest.raises(UserError, match="test_session=6"):
        Iemocap(source=str(published), test_session=6, **NOTHING)
    with pytest.raises(UserError, match="class_names: the classes of iemocap come from label_table"):
        Iemocap(source=str(published), class_names=("a", "b"), **NOTHING)
    with pytest.raises(UserError, match="does not exist"):
        Iemocap(source=str(tmp_path / "absent"), **NOTHING).references()
    with pytest.raises(UserError, match=r"holds no Session1\.\.5/dialog"):
        Iemocap(source=str(tmp_path), **NOTHING).references()
    assert "class_names" not in Iemocap(source=str(published), **NOTHING).options()


evaluations = st.lists(
    st.one_of(
        st.sampled_from([*IMPRO.splitlines(), *IMPRO_WORDS.splitlines(), "[1 - 2]\tSes01F_x\tneu\t[", "C-E1:", "["]),
        st.text(max_size=30),
    ),
    max_size=12,
).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))


@given(evaluation=st.one_of(evaluations, st.binary(max_size=80)), words=st.one_of(evaluations, st.binary(max_size=80)))
@settings(max_examples=50, deadline=None)
def test_no_bytes_break_the_readers(tmp_path_factory: pytest.TempPathFactory, evaluation: bytes, words: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for file, content in ((IMPRO_FILE, evaluation), (WORDS_FILE, words)):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_bytes(content)
    corpus = Iemocap(source=str(folder), **NOTHING)
    try:
        corpus.annotation_summary()
        for each in corpus.references():
            recording = corpus.recording(each)
            assert isinstance(recording.words, tuple)
            assert np.isfinite([word[:2] for word in recording.words]).all()
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)
