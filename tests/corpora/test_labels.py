"""Label tables: what a user writes, what is refused, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.corpora.corpus import SessionReference
from emolab.corpora.labels import LabelledCorpus
from emolab.names import UserError
from emolab.sessions.schema import Session

UTTERANCES = [("d1_0", "fru"), ("d1_1", "neu"), ("d1_2", "xxx"), ("d2_0", "fru"), ("d2_1", None), ("d2_2", "exc")]
OWN = ("neu", "fru", "exc")
OneLine = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Dialogues(LabelledCorpus):
    """Utterances with labels and nothing else."""

    name = "dialogues"
    source: str = "."
    label_table: str = "own"

    @property
    def own_labels(self) -> tuple[str, ...]:
        return OWN

    @property
    def dimensions(self) -> dict[str, int]:
        return {"text": 1}

    def utterance_labels(self) -> Iterable[tuple[str, str | None]]:
        return UTTERANCES

    def references(self) -> Sequence[SessionReference]:
        self.check_table()
        return []

    def load(self, reference: SessionReference) -> Session:
        raise NotImplementedError


def labels(corpus: Dialogues) -> list[int]:
    return [corpus.table.index(*each) for each in UTTERANCES]


def table(folder: Path, text: str, name: str = "table.csv") -> Dialogues:
    (folder / name).write_text(text, encoding="utf-8")
    return Dialogues(label_table=str(folder / name))


def test_without_a_table_the_corpus_s_own_labels_are_the_classes() -> None:
    corpus = Dialogues()
    assert corpus.classes == OWN
    assert labels(corpus) == [1, 0, IGNORED_LABEL, 1, IGNORED_LABEL, 2]
    assert corpus.annotation_summary() == {
        "utterances": 6,
        "labelled": 4,
        "ties": 0,
        "without_label": 1,
        "unmapped": {"xxx": 1},
        "unknown_utterances": 0,
    }


def test_a_table_by_label_leaves_the_rest_unmapped_and_counted(tmp_path: Path) -> None:
    corpus = table(tmp_path, "label,class\r\nfru,frustrated\r\n\r\n exc , curious \r\n")
    assert corpus.classes == ("frustrated", "curious")
    assert labels(corpus) == [0, IGNORED_LABEL, IGNORED_LABEL, 0, IGNORED_LABEL, 1]
    assert corpus.annotation_summary()["unmapped"] == {"neu": 1, "xxx": 1}
    assert json.loads(json.dumps(corpus.annotation_summary())) == corpus.annotation_summary()


def test_a_table_by_utterance_wins_over_labels(tmp_path: Path) -> None:
    text = """
    classes: [confused, curious, bored, frustrated]
    labels: {fru: frustrated}
    utterances: {d1_0: confused, d2_1: bored, elsewhere_3: bored}
    """
    corpus = table(tmp_path, text, "table.yaml")
    assert corpus.classes == ("confused", "curious", "bored", "frustrated")
    assert labels(corpus) == [0, IGNORED_LABEL, IGNORED_LABEL, 3, 2, IGNORED_LABEL]
    found = corpus.annotation_summary()
    assert (found["labelled"], found["unknown_utterances"]) == (3, 1)


def test_three_annotators_vote_and_their_agreement_is_reported(tmp_path: Path) -> None:
    votes = {
        "d1_0": ("confused", "confused", "bored"),
        "d1_1": ("confused", "bored", "curious"),
        "d1_2": ("bored", "bored", "bored"),
    }
    rows = [f"{item},annotator{n},{name}" for item, given in votes.items() for n, name in enumerate(given)]
    corpus = table(tmp_path, "utterance,annotator,class\n" + "\n".join(rows) + "\n")
    assert corpus.classes == ("confused", "bored", "curious")
    assert labels(corpus) == [0, IGNORED_LABEL, 1, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]
    found = corpus.annotation_summary()
    assert (found["labelled"], found["ties"], found["unmapped"]) == (2, 1, {"fru": 1, "exc": 1})
    # by hand: P = (1/3 + 0 + 1)/3, P_e = (3/9)^2 + (5/9)^2 + (1/9)^2
    expected = (4 / 9 - 35 / 81) / (1 - 35 / 81)
    assert found["kappa"] == pytest.approx(expected)
    assert found["agreement"]["statistic"] == "fleiss_kappa"
    assert found["agreement"]["annotators"] == 3


def test_the_shipped_table_maps_what_needs_no_opinion() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Shipped(Dialogues):
        name = "iemocap"
        label_table: str = "education"

    assert Shipped().classes == ("confused", "curious", "bored", "frustrated")
    assert labels(Shipped()) == [3, IGNORED_LABEL, IGNORED_LABEL, 3, IGNORED_LABEL, IGNORED_LABEL]
    with pytest.raises(UserError, match=r"label_table=education: none of dialogues's labels .* daisee, iemocap"):
        _ = Dialogues(label_table="education").classes


def test_a_table_counts_by_content_not_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "label,class\nfru,frustrated\nneu,bored\n"
    first, second = table(tmp_path, text, "a.csv"), table(tmp_path, text, "b.csv")
    assert first.options() == second.options() != Dialogues().options()
    assert str(tmp_path) not in str(first.options())
    monkeypatch.chdir(tmp_path)
    relative = Dialogues(label_table="a.csv")
    monkeypatch.chdir("/")
    assert relative.classes == ("frustrated", "bored")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "t.csv", "line 1: expected the columns label,class or"),
        ("label,klass\nfru,a\n", "t.csv", "line 1: expected the columns .* got 'label,klass'"),
        ("label,class\nfru\n", "t.csv", "line 2: expected 2 filled columns"),
        ("label,class\nfru,\n", "t.csv", "line 2: expected 2 filled columns"),
        ("label,class\nfru,a\nfru,b\n", "t.csv", "line 3: 'fru' was there before"),
        ("utterance,annotator,class\nu,ann,a\nu,ann,b\n", "t.csv", "line 3: 'ann' judged 'u' before"),
        ("label,class\nfru,a\nfrx,b\n", "t.csv", "no label 'frx', did you mean 'fru'"),
        ("label,class\nfru,a\n", "t.csv", "two or more different classes, got a"),
        ("label,class\nfru,a\nneu,b c\n", "t.csv", "class 'b c' is not allowed"),
        ('label,class\nfru,"a\nneu,b\n', "t.csv", "not a CSV file"),
        ("labels: {fru: a, neu: b}\nclasses: [a]\n", "t.yaml", "'neu' has class 'b', which is not in classes"),
        ("labels: {fru: a}\nlabel: {neu: b}\n", "t.yaml", "unknown key 'label', did you mean 'labels'"),
        ("labels: {fru: a, no: b}\n", "t.yaml", "labels: a key must be text, got false"),
        ("labels: {fru: a, neu: 3}\n", "t.yaml", "labels.neu: must be text, got 3"),
        ("labels: {fru: a, neu: b, fru: b}\n", "t.yaml", "'fru' is there 2 times"),
        ("classes: [a, b]\nclasses: [b, a]\n", "t.yaml", "'classes' is there 2 times"),
        ("classes: [a, a]\n", "t.yaml", "two or more different classes"),
        ("- a\n- b\n", "t.yaml", "expected a mapping"),
        ("labels: {fru: [}\n", "t.yaml", "not valid YAML"),
        ("utterance,class\nother_1,a\nother_2,b\n", "t.csv", "no utterance of it, e.g. 'other_1', .* e.g. 'd1_0'"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str, name: str, message: str, one_line: OneLine) -> None:
    corpus = table(tmp_path, text, name)
    with pytest.raises(UserError, match=message) as refusal:
        corpus.references()
        _ = corpus.classes
    one_line(refusal, name)


def test_a_table_that_is_not_there_is_named(tmp_path: Path, one_line: OneLine) -> None:
    for name in ("absent.csv", "absent.yaml", "."):
        with pytest.raises(UserError) as refusal:
            _ = Dialogues(label_table=str(tmp_path / name)).classes
        one_line(refusal, str(tmp_path))
        with pytest.raises(UserError):
            Dialogues(label_table=str(tmp_path / name)).options()


@given(content=st.binary(max_size=200), suffix=st.sampled_from(["csv", "yaml"]), prefix=st.booleans())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_break_the_reader(tmp_path: Path, content: bytes, suffix: str, prefix: bool) -> None:
    path = tmp_path / f"{abs(hash(content))}.{suffix}"
    path.write_bytes((b"label,class\n" if prefix else b"") + content)
    try:
        assert len(Dialogues(label_table=str(path)).classes) >= 2
    except UserError as error:
        assert "\n" not in str(error)
