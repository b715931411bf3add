"""The data contract: what is written is read back, and nothing else is."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import ToyCorpus
from tests.sessions.staged_corpus import StagedCorpus

from emolab.corpora.corpus import Corpus
from emolab.locks import holding
from emolab.names import UserError
from emolab.sessions.loading import Block, SessionStore, epoch_batches, load_split, ordered_batches
from emolab.sessions.manifest import Manifest, read_manifest, write_manifest
from emolab.sessions.preparation import assign_splits, prepare
from emolab.sessions.schema import Session, arrow_schema, from_table, to_row
from emolab.sessions.shards import describe, read_shard, sha256, verify, write_shard
from emolab.sessions.splits import split_by_speaker
from emolab.sessions.work import WorkFolder
from emolab.training.data import load_training_data
from emolab.training.datasets import shared_datasets
from emolab.training.readiness import check_data
from emolab.training.recipe import TrainingSettings, TrainSettings, check_selection

Make = Callable[..., tuple[Path, Manifest]]
CORPUS = ToyCorpus()


def some_sessions(count: int) -> list[Session]:
    return [CORPUS.load(reference) for reference in CORPUS.references()[:count]]


def write_one(folder: Path, sessions: list[Session]) -> Manifest:
    """A hand-made data set with everything in its training split."""
    shard = write_shard(folder, "train/part-00000.parquet", sessions, arrow_schema(CORPUS.dimensions, quality=False))
    widths = CORPUS.dimensions.items()
    manifest = Manifest.model_validate(
        {
            "corpus": "toy",
            "classes": CORPUS.classes,
            "dimensions": CORPUS.dimensions,
            "step_seconds": 1.0,
            "seed": 0,
            "command": "test",
            "statistics": {"mean": {n: [0.0] * w for n, w in widths}, "std": {n: [1.0] * w for n, w in widths}},
            "splits": {},
            "shards": [shard.model_dump()],
        }
    )
    write_manifest(manifest, folder)
    return manifest


def test_sessions_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    sessions = some_sessions(7)
    manifest = write_one(tmp_path, sessions)
    table = read_shard(tmp_path, manifest.shards[0])
    store = load_split(tmp_path, manifest, "train")
    for index, session in enumerate(sessions):
        row, batch = from_table(table, index), store.batch([index])
        assert (row.session_id, row.speaker_id, row.num_steps) == (
            session.session_id,
            session.speaker_id,
            session.num_steps,
        )
        np.testing.assert_array_equal(row.labels, session.labels)
        np.testing.assert_array_equal(batch.labels[0].numpy(), session.labels)
        for name in session.features:
            np.testing.assert_array_equal(row.features[name], session.features[name])
            np.testing.assert_array_equal(batch.features[name][0].numpy(), session.features[name])
            np.testing.assert_array_equal(row.present[name], session.present[name])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 59), min_size=1, max_size=8, unique=True))
def test_a_batch_is_its_sessions_padded(indices: list[int]) -> None:
    sessions = some_sessions(60)
    store = store_of(sessions)
    batch = store.batch(indices)
    assert batch.lengths.tolist() == [sessions[i].num_steps for i in indices]
    for row, index in enumerate(indices):
        steps = sessions[index].num_steps
        np.testing.assert_array_equal(batch.features["visual"][row, :steps].numpy(), sessions[index].features["visual"])
        assert (batch.labels[row, steps:] == -100).all()
        assert not batch.present["audio"][row, steps:].any()


def store_of(sessions: list[Session]) -> SessionStore:
    schema = arrow_schema(CORPUS.dimensions, quality=False)
    half = len(sessions) // 2
    parts = [part for part in (sessions[:half], sessions[half:]) if part]
    return SessionStore([Block.from_table(pa.Table.from_pylist([to_row(s) for s in p], schema=schema)) for p in parts])


def test_the_bytes_do_not_depend_on_how_often_or_in_what_order_shards_are_made(make_dataset: Make) -> None:
    first, second = make_dataset()[1], make_dataset()[1]
    assert first.shards == second.shards
    assert first.statistics == second.statistics
    assert first.digest == second.digest


def test_statistics_are_those_of_observed_steps_of_the_training_split(toy_data: Path) -> None:
    manifest = read_manifest(toy_data)
    split = assign_splits(CORPUS.references(), seed=0)["train"]
    sessions = [CORPUS.load(reference) for reference in split]
    for name in CORPUS.dimensions:
        observed = np.concatenate([s.features[name][s.present[name]] for s in sessions]).astype(np.float64)
        np.testing.assert_allclose(manifest.statistics.mean[name], observed.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(manifest.statistics.std[name], observed.std(0), rtol=1e-9)


def test_a_data_set_verifies_and_describes_itself(toy_data: Path) -> None:
    text = describe(verify(toy_data))
    assert "train: 42 sessions" in text
    assert "digest" in text


def test_preparing_again_keeps_what_is_there_and_refuses_another_data_set(
    make_dataset: Make, one_line: Callable[..., None]
) -> None:
    folder, manifest = make_dataset()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    assert prepare(CORPUS, folder, seed=0, shard_sessions=16) == manifest
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    with pytest.raises(UserError) as error:
        prepare(ToyCorpus(sessions=30), folder, seed=0, shard_sessions=16)
    one_line(error, "another data set", str(folder))


@pytest.mark.fault
@pytest.mark.parametrize("corpus", [CORPUS, StagedCorpus(source="nowhere")])
def test_a_second_driver_is_refused_before_it_touches_anything(
    tmp_path: Path, corpus: Corpus, one_line: Callable[..., None]
) -> None:
    (tmp_path / "train").mkdir()
    with patch.object(StagedCorpus, "references", CORPUS.references), holding(WorkFolder(tmp_path).root, what="work"):
        with pytest.raises(UserError) as error:
            prepare(corpus, tmp_path, seed=0, shard_sessions=16)
        one_line(error, "the preparation in", "is in use by another process", str(os.getpid()))
    assert (tmp_path / "train").is_dir()


@pytest.mark.fault
@pytest.mark.parametrize("generated", [True, False])
def test_a_driver_that_began_before_another_ended_finds_what_that_made(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generated: bool
) -> None:
    monkeypatch.setattr(ToyCorpus, "generated", generated)

    def after_the_other(folder: Path, *, what: str) -> Any:
        shutil.copytree(toy_data, tmp_path / "data")
        return holding(folder, what=what)

    monkeypatch.setattr("emolab.sessions.preparation.holding", after_the_other)
    told: list[str] = []
    made = prepare(CORPUS, tmp_path / "data", seed=0, shard_sessions=16, report=told.append)
    assert made == verify(tmp_path / "data") == read_manifest(toy_data)
    assert not told, "nothing is written again"
    assert not WorkFolder(tmp_path / "data").root.exists()


@pytest.mark.fault
def test_an_interrupted_preparation_is_finished_with_the_same_bytes(make_dataset: Make) -> None:
    folder, manifest = make_dataset()
    (folder / "dataset.json").unlink()
    (folder / manifest.shards[0].path).write_bytes(b"half a shard")
    (folder / "report.html").write_text("of the data set that was here")
    assert prepare(CORPUS, folder, seed=0, shard_sessions=16, report=lambda _: None).shards == manifest.shards
    assert not (folder / "report.html").exists()


def test_data_without_labels_are_prepared_with_a_warning_and_not_trained_on(
    ray_cluster: None, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    told: list[str] = []
    manifest = prepare(ToyCorpus(labelled=False), tmp_path, seed=0, shard_sessions=60, report=told.append)
    assert told[-1] == "warning: no step of train, validation, test has a label: good for predictions alone"
    with pytest.raises(UserError) as error:
        check_data(TrainSettings(data=str(tmp_path)), manifest)
    one_line(error, f"{tmp_path}: no step of the train split has a label")
    labelled = manifest.splits["train"].model_copy(update={"label_counts": [1, 0, 0]})
    manifest = manifest.model_copy(update={"splits": manifest.splits | {"train": labelled}})
    with pytest.raises(UserError) as error:
        check_selection(TrainingSettings(), manifest, data="mine")
    one_line(error, "mine: no step of the validation split has a label: set training.selection=last")
    check_selection(TrainingSettings(selection="last"), manifest, data="mine")


@pytest.mark.fault
@pytest.mark.parametrize("position", [0.02, 0.3, 0.6, 0.99])
def test_one_flipped_byte_is_refused_with_the_shards_name(
    make_dataset: Make, position: float, one_line: Callable[..., None]
) -> None:
    folder, manifest = make_dataset()
    path = folder / manifest.split_shards("train")[1].path
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(bytes(content))
    for reader in (load_training_data, verify, lambda f: shared_datasets(f, manifest)):
        with pytest.raises(UserError) as error:
            reader(folder)
        one_line(error, path.name, "damaged")


@pytest.mark.fault
def test_page_checksums_notice_a_flip_even_without_the_manifest(make_dataset: Make) -> None:
    folder, manifest = make_dataset()
    path = folder / manifest.shards[0].path
    content = bytearray(path.read_bytes())
    noticed = 0
    for offset in range(100, 1100, 50):
        flipped = bytearray(content)
        flipped[offset] ^= 1
        path.write_bytes(bytes(flipped))
        try:
            pq.read_table(path, page_checksum_verification=True)
        except OSError:
            noticed += 1
    assert noticed >= 18


@pytest.mark.fault
def test_a_missing_shard_is_refused(make_dataset: Make, one_line: Callable[..., None]) -> None:
    folder, manifest = make_dataset()
    path = folder / manifest.split_shards("validation")[0].path
    path.unlink()
    with pytest.raises(UserError) as error:
        load_training_data(folder)
    one_line(error, path.name, "missing")


def test_a_missing_folder_is_refused(tmp_path: Path, one_line: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        load_training_data(tmp_path / "nowhere")
    one_line(error, "nowhere", "jobs/prepare.py")


@pytest.mark.fault
def test_nan_where_a_modality_is_present_is_refused_and_elsewhere_harmless(
    tmp_path: Path, one_line: Callable[..., None]
) -> None:
    session = some_sessions(1)[0]
    poisoned = {name: values.copy() for name, values in session.features.items()}
    poisoned["text"][1, 2] = np.nan
    seen = replace(session, features=poisoned, present={n: np.ones(session.num_steps, bool) for n in poisoned})
    with pytest.raises(UserError) as error:
        load_split(tmp_path, write_one(tmp_path, [seen]), "train")
    one_line(error, session.session_id, "text", "step 1")
    with pytest.raises(UserError):
        seen.check(classes=3)
    hidden = replace(seen, present={n: np.arange(session.num_steps) != 1 for n in poisoned})
    hidden.check(classes=3)
    assert len(load_split(tmp_path, write_one(tmp_path, [hidden]), "train")) == 1


@pytest.mark.fault
@pytest.mark.parametrize("claimed", [(2, 6), (2, 5), (4, 5)])
def test_lists_that_are_not_as_long_as_the_steps_are_refused(
    tmp_path: Path, claimed: tuple[int, int], one_line: Callable[..., None]
) -> None:
    """A foreign shard: what stands under its own digest need not be true."""
    alike = some_sessions(1)[0]
    cut = {name: values[:1].repeat(4, axis=0) for name, values in alike.features.items()}
    present = {name: np.ones(4, bool) for name in cut}
    four = replace(alike, features=cut, present=present, labels=np.zeros(4, np.int64))
    manifest = write_one(tmp_path, [four, replace(four, session_id="second")])
    table = read_shard(tmp_path, manifest.shards[0])
    pq.write_table(
        table.set_column(table.column_names.index("num_steps"), "num_steps", pa.array(claimed, pa.int32())),
        tmp_path / manifest.shards[0].path,
    )
    shard = manifest.shards[0].model_copy(update={"sha256": sha256(tmp_path / manifest.shards[0].path)})
    write_manifest(manifest.model_copy(update={"shards": [shard]}), tmp_path)
    for reader in (verify, lambda folder: load_split(folder, read_manifest(folder), "train")):
        with pytest.raises(UserError) as error:
            reader(tmp_path)
        one_line(error, shard.path, "second" if claimed[0] == 4 else alike.session_id, "steps")


@pytest.mark.fault
@pytest.mark.parametrize(("sessions", "parts"), [(0, ["no session"]), (1, ["'s000'", "no steps"])])
def test_a_shard_of_nothing_is_refused(
    tmp_path: Path, sessions: int, parts: list[str], one_line: Callable[..., None]
) -> None:
    manifest = write_one(tmp_path, [cut_short(session) for session in some_sessions(sessions)])
    with pytest.raises(UserError) as error:
        load_split(tmp_path, manifest, "train")
    one_line(error, "train/part-00000.parquet", *parts)


def cut_short(session: Session) -> Session:
    """Without any step."""
    return replace(
        session,
        features={name: values[:0] for name, values in session.features.items()},
        present={name: mask[:0] for name, mask in session.present.items()},
        labels=session.labels[:0],
    )


def test_duplicate_session_ids_are_refused(tmp_path: Path, one_line: Callable[..., None]) -> None:
    sessions = some_sessions(3)
    with pytest.raises(UserError) as error:
        load_split(tmp_path, write_one(tmp_path, [*sessions, sessions[1]]), "train")
    one_line(error, sessions[1].session_id, "duplicated")
    references = CORPUS.references()
    with pytest.raises(UserError, match="duplicated"):
        assign_splits([*references, references[0]], seed=0)


@pytest.mark.fault
def test_a_speaker_in_two_splits_is_refused(tmp_path: Path, one_line: Callable[..., None]) -> None:
    references = [replace(r, published_split="train") for r in CORPUS.references()]
    references[-1] = replace(references[-1], published_split="test")
    with pytest.raises(UserError) as error:
        assign_splits(references, seed=0)
    one_line(error, references[-1].speaker_id, "two splits")


@given(st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=3, max_size=60), st.integers(0, 5))
def test_splits_are_disjoint_complete_and_deterministic(speakers: set[str], seed: int) -> None:
    split = split_by_speaker(speakers, seed=seed)
    assert split == split_by_speaker(sorted(speakers, reverse=True), seed=seed)
    assert set(split) == speakers
    assert set(split.values()) == {"train", "validation", "test"}


def test_the_papers_split_is_35_5_10() -> None:
    split = split_by_speaker([f"p{i}" for i in range(50)], seed=0)
    counts = [list(split.values()).count(name) for name in ("train", "validation", "test")]
    assert counts == [35, 5, 10]


def some_lengths(sessions: int) -> NDArray[np.int64]:
    return np.random.default_rng(sessions).integers(30, 301, sessions)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 5), st.integers(0, 3), st.sampled_from([0, 1, 3, 50]))
def test_global_batches_do_not_depend_on_the_number_of_workers(
    sessions: int, batch_size: int, workers: int, epoch: int, buckets: int
) -> None:
    def plan(**share: int) -> list[NDArray[np.int64]]:
        lengths = some_lengths(sessions)
        return epoch_batches(lengths, batch_size, seed=1, epoch=epoch, bucket_batches=buckets, **share)

    alone = plan()
    shares = [plan(rank=r, workers=workers) for r in range(workers)]
    assert len({len(share) for share in shares}) == 1
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(i for share in shares for i in share[step])
    assert sorted(i for batch in alone for i in batch) == list(range(sessions))
    sizes = [len(batch) for batch in alone]
    assert len(sizes) == -(-sessions // batch_size)
    assert sorted(sizes)[1:] == [batch_size] * (len(sizes) - 1)
    dealt = [
        i for r in range(workers) for b in ordered_batches(sessions, batch_size, rank=r, workers=workers) for i in b
    ]
    assert sorted(dealt) == list(range(sessions))


def test_length_buckets_hold_similar_lengths_and_are_shuffled_anew_in_every_epoch() -> None:
    lengths = some_lengths(320)

    def plan(epoch: int, buckets: int) -> list[list[int]]:
        return [b.tolist() for b in epoch_batches(lengths, 16, seed=3, epoch=epoch, bucket_batches=buckets)]

    def padded(batches: list[list[int]]) -> float:
        return sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum()

    assert plan(0, 20) == plan(0, 20)
    assert padded(plan(0, 20)) < 1.06 < 1.5 < padded(plan(0, 0))
    assert padded(plan(0, 5)) < 1.2
    means = [lengths[batch].mean() for batch in plan(0, 20)]
    assert means != sorted(means)
    first, second = ({frozenset(batch) for batch in plan(epoch, 5)} for epoch in (0, 1))
    assert not first & second  # other sessions meet each other
    assert plan(0, 0) == [
        np.random.default_rng([3, 0]).permutation(320)[start : start + 16].tolist() for start in range(0, 320, 16)
    ]


@pytest.mark.fault
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["statistics"]["std"]["audio"].reverse(),  # what a model standardises with
        lambda values: values["splits"]["train"]["label_counts"].reverse(),  # the accuracy of guessing
        lambda values: values["splits"]["test"]["reference_scores"].update(exact_filter=1.0),
    ],
)
def test_a_changed_manifest_is_refused(
    toy_data: Path, tmp_path: Path, change: Callable[[Any], None], one_line: Callable[..., None]
) -> None:
    path = tmp_path / "dataset.json"
    values = json.loads((toy_data / path.name).read_text())
    path.write_text(json.dumps(values, indent=1) + "\n")
    assert read_manifest(tmp_path) == read_manifest(toy_data)
    change(values)
    path.write_text(json.dumps(values, indent=1) + "\n")
    for reader in (read_manifest, verify):
        with pytest.raises(UserError) as error:
            reader(tmp_path)
        one_line(error, str(path), "was changed after it was written", "prepare the data set again")


def test_a_manifest_cannot_point_outside_its_folder(make_dataset: Make) -> None:
    folder, _ = make_dataset()
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace("train/part-00000.parquet", "train/../../evil.parquet"))
    with pytest.raises(UserError, match="shards"):
        read_manifest(folder)
