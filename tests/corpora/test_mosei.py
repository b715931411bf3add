"""CMU-MOSEI: segments and seconds as steps, features by shared time, damaged files set aside."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.corpora.published_layouts import MOSEI_LABELS, write_csd, write_mosei

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.mosei import EMOTIONS, Mosei
from emolab.corpora.overlap import finite_mean, overlap_means
from emolab.names import UserError

OneLine = Callable[..., None]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests only read."""
    folder = tmp_path_factory.mktemp("mosei") / "mosei"
    write_mosei(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(published, tmp_path / "mosei"))


def reference(video: str) -> SessionReference:
    return SessionReference(session_id=f"mosei-{video}", speaker_id=f"mosei-{video}")


def test_videos_are_sessions_and_segments_are_steps(folder: Path) -> None:
    corpus = Mosei(source=str(folder))
    assert [each.session_id for each in corpus.references()] == [f"mosei-{video}" for video in sorted(MOSEI_LABELS)]
    assert {each.published_split for each in corpus.references()} == {None}
    assert corpus.dimensions == {"audio": 74, "visual": 35, "text": 300}
    assert corpus.classes == (*EMOTIONS, "none")
    sessions = [corpus.load(each) for each in corpus.references()]
    assert [session.num_steps for session in sessions] == [3, 2, 1]
    for session in sessions:
        session.check(classes=len(corpus.classes))
        assert session.step_seconds == 1.0
    first = sessions[0]
    # in the order of time: happy outweighs anger, then nothing at all, then sad
    assert [corpus.classes[label] for label in first.labels] == ["happy", "none", "sad"]
    assert sessions[1].labels.tolist() == [IGNORED_LABEL, EMOTIONS.index("surprise")], "happy and sad are equal"
    assert [session.present["visual"].tolist() for session in sessions] == [[True] * 3, [True] * 2, [False]]
    assert first.present["text"].tolist() == [True, True, False], "nothing is said after 4 s"
    assert not first.features["text"][2].any()


def test_features_are_means_over_the_segment(folder: Path) -> None:
    session = Mosei(source=str(folder)).load(reference("-hyphen_video"))
    columns = np.arange(35) / 1024
    # half-second intervals that start at 0, 0.5, ... 3.5; then 3 ... 5.5; then 6 ... 8.5
    for step, mean in enumerate((1.75, 4.25, 7.25)):
        np.testing.assert_allclose(session.features["visual"][step], mean + columns, rtol=1e-6)
    audio = session.features["audio"]
    assert np.isfinite(audio).all()
    # of the first segment's eight intervals that at 3 s has no finite value, those at 2 and 2.5 s none in column 0
    assert audio[0, 0] == pytest.approx(np.mean([0, 0.5, 1, 1.5, 3.5]))
    assert audio[0, 1] == pytest.approx(np.mean([0, 0.5, 1, 1.5, 2, 2.5, 3.5]) + 1 / 1024)


def test_a_regular_grid_takes_most_of_each_step(folder: Path) -> None:
    corpus = Mosei(source=str(folder), step_seconds=2.0, visual="VisualOpenFace2")
    session = corpus.load(reference("-hyphen_video"))
    session.check(classes=len(corpus.classes))
    assert session.step_seconds == 2.0
    assert session.num_steps == 5
    # segments 0-4 happy, 3-6 none, 6-9 sad: the second step is more happy than none, the last is sad for its half
    assert [corpus.classes[label] for label in session.labels] == ["happy", "happy", "none", "sad", "sad"]
    assert session.features["visual"].shape == (5, 713)
    np.testing.assert_allclose(session.features["visual"][:, 0], [0.75, 2.75, 4.75, 6.75, 8.75], rtol=1e-6)
    assert session.present["text"].tolist() == [True, True, False, False, False]


def test_sentiment_and_tables(folder: Path, tmp_path: Path) -> None:
    corpus = Mosei(source=str(folder), annotation="sentiment")
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.load(reference("-hyphen_video")).labels.tolist() == [2, 1, 0]
    table = tmp_path / "table.csv"
    table.write_text("utterance,class\n-hyphen_video[0],bored\n-hyphen_video[1],curious\nzebra[0],bored\n")
    corpus = Mosei(source=str(folder), label_table=str(table))
    assert corpus.load(reference("-hyphen_video")).labels.tolist() == [1, IGNORED_LABEL, 0], "numbered as in the file"
    found = corpus.annotation_summary()
    assert (found["utterances"], found["labelled"], found["without_label"]) == (6, 3, 1)
    assert found["unmapped"] == {"none": 1, "surprise": 1}


def test_damage_to_one_video_is_that_video_s(folder: Path, tmp_path: Path) -> None:
    labels = {
        "backwards": (np.zeros((1, 7)), np.array([[2.0, 1.0]])),
        "endless": (np.zeros((1, 7)), np.array([[0.0, 1e9]])),
        "few": (np.zeros((1, 6)), np.array([[0.0, 1.0]])),
        "many": (np.zeros((2, 7)), np.array([[0.0, 1.0]])),
        "none": (np.zeros((0, 7)), np.zeros((0, 2))),
        "silent": (np.zeros((1, 7)), np.array([[0.0, 1.0]])),
        "undefined": (np.full((1, 7), np.nan), np.array([[0.0, 1.0]])),
        "zebra": (np.zeros((1, 7)), np.array([[0.0, 1.0]])),
    }
    write_csd(folder / "CMU_MOSEI_Labels.csd", "All Labels", labels)
    corpus = Mosei(source=str(folder))
    assert len(corpus.references()) == len(labels)
    for video in labels:
        if video != "zebra":
            with pytest.raises(RefusedSessionError, match=video):
                corpus.load(reference(video))
    assert corpus.load(reference("zebra")).num_steps == 1
    assert corpus.annotation_summary()["utterances"] == 2


def outside_link(folder: Path) -> None:
    secret = folder.parent / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["features"], file["intervals"] = np.zeros((1, 35)), np.array([[0.0, 1.0]])
    with h5py.File(folder / "CMU_MOSEI_VisualFacet42.csd", "a") as file:
        file["FACET 4.2/data/zebra"] = h5py.ExternalLink(str(secret), "/")


def outside_storage(folder: Path) -> None:
    raw = folder.parent / "secret.bin"
    np.zeros((4, 35)).tofile(raw)
    with h5py.File(folder / "CMU_MOSEI_VisualFacet42.csd", "a") as file:
        group = file.create_group("FACET 4.2/data/zebra")
        group.create_dataset("features", (4, 35), dtype="f8", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
        group["intervals"] = np.zeros((4, 2))


def outside_view(folder: Path) -> None:
    layout = h5py.VirtualLayout((1, 35), dtype="f8")
    layout[:] = h5py.VirtualSource(str(folder.parent / "secret.h5"), "features", (1, 35))
    with h5py.File(folder / "CMU_MOSEI_VisualFacet42.csd", "a") as file:
        group = file.create_group("FACET 4.2/data/zebra")
        group.create_virtual_dataset("features", layout)
        group["intervals"] = np.zeros((1, 2))


def bomb(folder: Path) -> None:
    with h5py.File(folder / "CMU_MOSEI_VisualFacet42.csd", "a") as file:
        group = file.create_group("FACET 4.2/data/zebra")
        group.create_dataset("features", (2**40, 35), dtype="f4", chunks=(1024, 35), compression="gzip")
        group["intervals"] = np.zeros((1, 2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (outside_link, "link"),
        (outside_storage, "lies in another file"),
        (outside_view, "lies in another file"),
        (bomb, "values, expected at most"),
    ],
)
def test_nothing_outside_is_read_and_no_size_is_believed(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    corpus = Mosei(source=str(folder))
    with pytest.raises(RefusedSessionError, match=message):
        corpus.load(reference("zebra"))
    assert corpus.load(reference("0_clip")).num_steps == 2


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.csd"
    (folder / "CMU_MOSEI_COVAREP.csd").rename(elsewhere)
    (folder / "CMU_MOSEI_COVAREP.csd").symlink_to(elsewhere)
    with pytest.raises(UserError, match="leaves the folder"):
        Mosei(source=str(folder)).references()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "CMU_MOSEI_Labels.csd").unlink(), "CMU_MOSEI_Labels.csd: no such file"),
        (lambda folder: (folder / "CMU_MOSEI_COVAREP.csd").unlink(), "CMU_MOSEI_COVAREP.csd: no such file"),
        (lambda folder: (folder / "CMU_MOSEI_COVAREP.csd").write_bytes(b""), "COVAREP.csd is damaged"),
        (lambda folder: (folder / "CMU_MOSEI_COVAREP.csd").write_text("sorry, moved"), "COVAREP.csd is damaged"),
        (lambda folder: h5py.File(folder / "CMU_MOSEI_COVAREP.csd", "w").close(), "expected one group with data"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_mistakes_are_named_in_one_line(
    folder: Path, spoil: Callable[[Path], object], message: str, one_line: OneLine
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        Mosei(source=str(folder)).references()
    one_line(refusal)


def test_options_and_foreign_references(folder: Path) -> None:
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="step_seconds"):
            Mosei(source=str(folder), step_seconds=seconds)
    with pytest.raises(UserError, match="no session 'mosei-other'"):
        Mosei(source=str(folder)).load(reference("other"))
    with pytest.raises(UserError, match="no session 'zebra'"):
        Mosei(source=str(folder)).load(SessionReference(session_id="zebra", speaker_id="zebra"))


@given(
    name=st.sampled_from(["Labels", "VisualFacet42"]),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_truncated_and_flipped_bytes_are_refused_or_read(
    published: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    keep: float,
    flips: list[tuple[float, int]],
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for each in published.iterdir():
        os.link(each, folder / each.name)
    damaged = folder / f"CMU_MOSEI_{name}.csd"
    content = bytearray(damaged.read_bytes())
    for place, mask in flips:
        content[int(place * len(content))] ^= mask
    damaged.unlink()
    damaged.write_bytes(content if flips else content[: round(keep * len(content))])
    try:
        corpus = Mosei(source=str(folder))
        for each in corpus.references():
            with contextlib.suppress(RefusedSessionError):
                corpus.load(each).check(classes=7)
        corpus.annotation_summary()
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)


# ---- features onto steps -------------------------------------------------------------------------------------


@given(
    spans=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 3)), min_size=1, max_size=12),
    steps=st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_overlap_means_are_integrals(
    spans: list[tuple[float, float]], steps: list[tuple[float, float]], seed: int
) -> None:
    """Against the definition summed over a fine grid of instants, and in any order of the intervals."""
    intervals = np.array([(start, start + length) for start, length in spans])
    bounds = np.array([(start, start + length) for start, length in steps])
    values = np.random.default_rng(seed).normal(size=(len(spans), 3))
    means, present = overlap_means(values, intervals, bounds)
    order = np.random.default_rng(seed).permutation(len(spans))
    again, _ = overlap_means(values[order], intervals[order], bounds)
    np.testing.assert_allclose(again, means, rtol=1e-5, atol=1e-5)
    for step, (start, end) in enumerate(bounds):
        shared = [max(0.0, min(end, b) - max(start, a)) for a, b in intervals]
        if sum(shared) > 1e-6:
            expected = sum(value * share for value, share in zip(values, shared, strict=True)) / sum(shared)
            np.testing.assert_allclose(means[step], expected, rtol=1e-4, atol=1e-4)
            assert present[step]
        elif not any(a == b and start <= a < end for a, b in intervals) and sum(shared) == 0:
            assert not present[step]
            assert not means[step].any()


def test_intervals_without_length_count_where_nothing_else_does() -> None:
    values, intervals = np.array([[1.0], [5.0]]), np.array([[0.0, 1.0], [2.5, 2.5]])
    means, present = overlap_means(values, intervals, np.array([[0.0, 3.0], [2.0, 3.0], [2.5, 2.5]]))
    assert means[:, 0].tolist() == [1.0, 5.0, 0.0]
    assert present.tolist() == [True, True, False]


def test_values_that_are_not_finite_do_not_count() -> None:
    means, found = finite_mean(np.array([[1.0, -np.inf, np.nan], [3.0, 2.0, 1e300]]))
    assert means.tolist() == [2.0, 2.0, 0.0]
    assert found
    assert finite_mean(np.full((2, 2), np.nan)) == (pytest.approx([0, 0]), False)
    assert finite_mean(np.empty((0, 2)))[1] is False
