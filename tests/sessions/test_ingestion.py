"""Recorded corpora: whatever one session does, the others arrive, and arrive with the same bytes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import REPOSITORY
from tests.sessions.staged_corpus import StagedCorpus, write_recordings

from emolab.corpora.corpus import Corpus, SessionReference, Stage
from emolab.names import UserError
from emolab.sessions.assembly import plan_shards
from emolab.sessions.ingestion import screen
from emolab.sessions.inventory import read_inventory
from emolab.sessions.loading import load_split
from emolab.sessions.manifest import Manifest
from emolab.sessions.pools import plan_pools
from emolab.sessions.preparation import prepare
from emolab.sessions.protocol import Protocol
from emolab.sessions.shards import verify
from emolab.sessions.work import WorkFolder

OneLine = Callable[..., None]


def made(corpus: Corpus, output: Path, **arguments: Any) -> Manifest:
    return prepare(corpus, output, **({"seed": 0, "shard_sessions": 16, "report": lambda _: None} | arguments))


def reasons(output: Path) -> dict[str, str]:
    with (output / "quarantine.csv").open(newline="") as file:
        return {row["session_id"]: row["reason"] for row in csv.DictReader(file)}


def reads(folder: Path) -> Counter[str]:
    log = folder / "read.log"
    return Counter(log.read_text().split()) if log.exists() else Counter()


BAD = {3: "truncated", 7: "strange", 11: "crash", 12: "memory", 15: "nan"}


@dataclass(frozen=True)
class Story:
    """Forty recordings, five bad: too many; then two mended, two work files damaged, one source replaced, run again."""

    folder: Path
    refused: UserError
    first: dict[str, str]
    first_reads: Counter[str]
    manifest: Manifest
    lines: list[str]


@pytest.fixture(scope="module")
def story(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("mixed")
    corpus = StagedCorpus(source=str(write_recordings(folder / "media", 40, bad=BAD)), step_seconds=0.2)
    with pytest.raises(UserError) as error:
        made(corpus, folder / "data", max_refused=0.1)
    assert not (folder / "data" / "dataset.json").exists()
    first, first_reads = reasons(folder / "data"), reads(folder)
    for name in ("s003", "s011"):
        (folder / "media" / name).write_text("sound")
    work = folder / "data" / ".unfinished"
    content = bytearray((work / "sessions" / "s020").read_bytes())
    content[len(content) // 2] ^= 1
    (work / "sessions" / "s020").write_bytes(content)
    (work / "records" / "s021").write_bytes(b"{")
    os.utime(folder / "media" / "s022", ns=(1, 1))  # another file under the name of a finished session
    (folder / "read.log").unlink()
    lines: list[str] = []
    without_actors = replace(corpus, staged=False)  # the same sessions, sooner
    manifest = made(without_actors, folder / "data", max_refused=0.1, report=lines.append)
    return Story(folder, error.value, first, first_reads, manifest, lines)


@pytest.mark.fault
def test_bad_sessions_are_set_aside_with_their_reasons(story: Story) -> None:
    assert set(story.first) == {f"s{index:03d}" for index in BAD}
    parts = {3: "s003 is truncated", 7: "KeyError", 11: "died twice", 12: "MemoryError", 15: "not finite at step 2"}
    for index, part in parts.items():
        assert part in story.first[f"s{index:03d}"], story.first


def test_too_many_of_them_end_the_job_in_one_line(story: Story) -> None:
    message = str(story.refused)
    for part in ("5 of 40 sessions", "max_refused=0.1", "s003 is truncated", "quarantine.csv"):
        assert part in message
    assert "\n" not in message


@pytest.mark.fault
def test_a_crash_costs_its_neighbours_at_most_one_more_reading(story: Story) -> None:
    assert story.first_reads["s011"] == 2
    assert all(count <= 2 for count in story.first_reads.values())
    assert sum(story.first_reads.values()) <= 40 + 4


@pytest.mark.fault
def test_running_again_reads_only_what_is_unfinished_damaged_or_replaced(story: Story) -> None:
    assert set(reads(story.folder)) == {*(f"s{index:03d}" for index in BAD), "s020", "s021", "s022"}


def test_what_is_left_is_a_sound_data_set(story: Story) -> None:
    output, manifest = story.folder / "data", story.manifest
    assert manifest.quarantined == 3
    assert manifest.step_seconds == 0.2, "exactly: recordings to predict are cut into steps by it"
    assert sum(split.sessions for split in manifest.splits.values()) == 37
    assert verify(output) == manifest
    assert "quarantined: 3 of 40" in "\n".join(story.lines)
    names = {"train", "validation", "test", "dataset.json", "sessions.csv", "quarantine.csv"}
    assert {path.name for path in output.iterdir()} == names
    assert set(reasons(output)) == {"s007", "s012", "s015"}
    store = load_split(output, manifest, "train")
    corpus = StagedCorpus(source=str(story.folder / "media"))
    references = {reference.session_id: reference for reference in corpus.references()}
    for index, name in enumerate(store.session_ids):
        for modality, values in corpus.load(references[name]).features.items():
            np.testing.assert_array_equal(store.batch([index]).features[modality][0].numpy(), values)


def test_every_session_is_accounted_for(story: Story) -> None:
    entries = read_inventory(story.folder / "data", story.manifest)
    assert Counter(entry.outcome for entry in entries) == {"kept": 37, "quarantined": 3}
    for split, summary in story.manifest.splits.items():
        facts = [entry.facts for entry in entries if entry.facts is not None and entry.split == split]
        assert sum(each.steps for each in facts) == summary.steps
        assert np.sum([each.label_counts for each in facts], axis=0).tolist() == summary.label_counts


def test_a_table_that_was_changed_into_something_else_is_refused(
    story: Story, tmp_path: Path, one_line: OneLine
) -> None:
    for content in ("session_id\n" + "s" * 200_000, "session_id\ns000\n"):
        (tmp_path / "sessions.csv").write_text(content)
        with pytest.raises(UserError) as error:
            read_inventory(tmp_path, story.manifest)
        one_line(error, "sessions.csv cannot be read", "prepare it again")


def test_unfinished_work_of_other_options_is_refused(tmp_path: Path, one_line: OneLine) -> None:
    corpus = StagedCorpus(source=str(tmp_path))
    WorkFolder(tmp_path).claim(corpus)
    WorkFolder(tmp_path).claim(replace(corpus, source="elsewhere"))
    with pytest.raises(UserError) as error:
        WorkFolder(tmp_path).claim(replace(corpus, gap=2))
    one_line(error, ".unfinished", "another corpus, options or extractors")


@pytest.mark.fault
def test_a_stage_that_cannot_start_ends_the_job_at_once(ray_cluster: None, tmp_path: Path, one_line: OneLine) -> None:
    corpus = StagedCorpus(source=str(write_recordings(tmp_path / "media", 10)), starts=False)
    with pytest.raises(UserError) as error:
        made(corpus, tmp_path / "data")
    one_line(error, "stage encode cannot start", "weights are missing")


@pytest.mark.fault
@pytest.mark.slow
def test_a_recording_that_hangs_ends_the_job_and_is_named(ray_cluster: None, tmp_path: Path, one_line: OneLine) -> None:
    # The last one, so that none waits behind it, however many processes Ray starts.
    corpus = StagedCorpus(source=str(write_recordings(tmp_path / "media", 6, bad={5: "hang"})), staged=False)
    with pytest.raises(UserError) as error:
        made(corpus, tmp_path / "data", stall_seconds=8.0)
    one_line(error, "no session was finished for 8 s; 1 are left", "(s005)")
    (tmp_path / "media" / "s005").write_text("sound")
    assert made(corpus, tmp_path / "data").quarantined == 0


def test_a_repeated_id_is_set_aside_where_people_list_recordings_and_refused_elsewhere(
    tmp_path: Path, one_line: OneLine
) -> None:
    corpus = StagedCorpus(source=str(write_recordings(tmp_path / "media", 12)), repeated=True)
    sound, refused = screen(corpus, corpus.references())
    assert [reference.session_id for reference in sound] == [f"s{index:03d}" for index in range(1, 12)]
    assert [each.session_id for each in refused] == ["s000", "s000"]
    assert "listed 2 times" in refused[0].reason
    with pytest.raises(UserError) as error:
        made(replace(corpus, staged=False), tmp_path / "other")
    one_line(error, "s000", "duplicated")
    assert not (tmp_path / "other").exists()


def test_an_id_that_may_not_become_a_path_is_set_aside(tmp_path: Path) -> None:
    corpus = StagedCorpus(source=str(write_recordings(tmp_path / "media", 3)))
    evil = [replace(each, session_id=name) for each, name in zip(corpus.references(), ("../a", "", "s"), strict=True)]
    sound, refused = screen(corpus, evil)
    assert [each.session_id for each in sound] == ["s"]
    assert [each.session_id for each in refused] == ["../a", ""]


def test_the_protocol_is_part_of_the_data_set(ray_cluster: None, tmp_path: Path, one_line: OneLine) -> None:
    media = write_recordings(tmp_path / "media", 40)
    corpus = StagedCorpus(source=str(media), gap=5, step_seconds=0.04, staged=False)
    protocol = Protocol(max_gap_seconds=0.16, balance="classes", normalise="session")
    manifest = made(corpus, tmp_path / "data", protocol=protocol)
    assert manifest.protocol == {"max_gap_seconds": 0.16, "balance": "classes", "normalise": "session"}
    assert manifest.step_seconds == 0.04
    assert manifest.dropped["gap"] == 10  # five steps of 0.04 s
    entries = [entry for entry in read_inventory(tmp_path / "data", manifest) if entry.outcome == "kept"]
    assert set(Counter(entry.facts.dominant for entry in entries if entry.facts).values()) == {10}
    store = load_split(tmp_path / "data", manifest, "train")
    for values in store.batch([0]).features.values():
        np.testing.assert_allclose(values[0].mean(0), 0.0, atol=1e-6)
        np.testing.assert_allclose(values[0].std(0, correction=0), 1.0, atol=1e-5)
    assert made(corpus, tmp_path / "data", protocol=protocol) == manifest
    assert manifest.digest != manifest.model_copy(update={"protocol": {}}).digest
    for other in (Protocol(), Protocol(max_gap_seconds=3)):
        with pytest.raises(UserError) as error:
            made(corpus, tmp_path / "data", protocol=other)
        one_line(error, "another data set", "max_gap_seconds")


KILLED = """
import sys
from pathlib import Path
from emolab.cluster import ClusterSettings, connected
from emolab.sessions.preparation import prepare
from tests.sessions.staged_corpus import StagedCorpus
with connected(ClusterSettings(address="local", cpus=2)):
    prepare(StagedCorpus(source=sys.argv[1], seconds=0.3), Path(sys.argv[2]), seed=0, shard_sessions=16)
"""


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_job_goes_on_and_ends_with_the_bytes_of_an_unbroken_one(ray_cluster: None, tmp_path: Path) -> None:
    media, output = write_recordings(tmp_path / "media", 30), tmp_path / "data"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(media), str(output)], cwd=REPOSITORY, env=environment, start_new_session=True
    )
    records = output / ".unfinished" / "records"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.is_dir() and len(list(records.glob("s*"))) >= 4):
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    _wait_for_silence(tmp_path / "read.log")
    before = {path.name for path in records.glob("s*")}
    assert 4 <= len(before) < 30
    assert not (output / "dataset.json").exists()
    (tmp_path / "read.log").unlink()
    corpus = StagedCorpus(source=str(media), staged=False)  # the same sessions, read without actors
    manifest = made(corpus, output)
    assert set(reads(tmp_path)) == {reference.session_id for reference in corpus.references()} - before
    unbroken = made(corpus, tmp_path / "unbroken")
    assert manifest.digest == unbroken.digest
    assert (output / "sessions.csv").read_bytes() == (tmp_path / "unbroken" / "sessions.csv").read_bytes()


def _wait_for_silence(log: Path) -> None:
    """The workers of a killed driver notice it and end; until then they go on."""
    size = -1
    while size != log.stat().st_size:
        size = log.stat().st_size
        time.sleep(2.0)


@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 16.0, 64.0]),
    st.sampled_from([0.0, 1.0, 2.0, 8.0]),
)
def test_pools_fit_the_cluster_and_starve_nobody(on_gpu: list[bool], cpus: float, gpus: float) -> None:
    pools = plan_pools(
        [Stage(name=str(i), build=dict, uses_gpu=gpu) for i, gpu in enumerate(on_gpu)], cpus=cpus, gpus=gpus
    )  # pyright: ignore[reportArgumentType]
    assert all(pool.size >= 1 and pool.cpus > 0 for pool in pools)
    assert sum(pool.size * pool.cpus for pool in pools) <= cpus + 1e-9
    assert sum(pool.size * pool.gpus for pool in pools) <= gpus + 1e-9
    assert all((pool.gpus > 0) == (gpu and gpus > 0) for pool, gpu in zip(pools, on_gpu, strict=True))
    if cpus >= len(on_gpu) and not (gpus and any(on_gpu)):
        assert sum(pool.size * pool.cpus for pool in pools) > cpus - 1


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 8))
def test_shards_are_cut_by_number_and_by_size(megabytes: list[int], shard_sessions: int) -> None:
    references = [SessionReference(session_id=f"s{i}", speaker_id="p") for i in range(len(megabytes))]
    sizes = {f"s{i}": size * 2**20 for i, size in enumerate(megabytes)}
    plans = plan_shards({"train": references, "test": []}, shard_sessions, sizes=sizes)
    assert [r for plan in plans for r in plan.references] == references
    for plan in plans:
        assert 1 <= len(plan.references) <= shard_sessions
        assert len(plan.references) == 1 or sum(sizes[r.session_id] for r in plan.references) <= 256 * 2**20
