"""Checkpoints on S3-compatible storage: the promises of those on a disk, kept where nothing can be renamed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow.fs import FileSelector, FileSystem, FileType
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims
from tests.faults.test_training_kills import recorded
from tests.training.test_loop import settings_for

from emolab.checkpoint import MANIFEST
from emolab.names import UserError
from emolab.remote_checkpoints import RemoteCheckpoints, run_checkpoints
from emolab.sessions.shards import sha256

pytestmark = pytest.mark.fault
Record = Callable[..., None]


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The address of a bucket on a server of its own, which stands in for any S3-compatible one."""
    pytest.importorskip("moto", reason="moto[s3] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    patch = pytest.MonkeyPatch()
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "EC2_METADATA_DISABLED": "true"}.items():
        patch.setenv(f"AWS_{name}", value)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        FileSystem.from_uri(f"s3://bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
        yield f"s3://bucket/{{}}?{options}"
    finally:
        patch.undo()
        server.kill()
        server.wait()


def checkpoints_in(place: str) -> RemoteCheckpoints:
    found = run_checkpoints(place, Path("run"), "test")
    assert isinstance(found, RemoteCheckpoints)
    return found


def objects(place: str) -> dict[str, bytes]:
    """Path -> bytes of everything below."""
    filesystem, root = FileSystem.from_uri(place)
    entries = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    paths = sorted(entry.path for entry in entries if entry.type == FileType.File)
    return {path: filesystem.open_input_stream(path).read() for path in paths}


def put(place: str, path: str, content: bytes | None) -> None:
    """Replace an object, or delete it."""
    filesystem, _ = FileSystem.from_uri(place)
    if content is None:
        filesystem.delete_file(path)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def test_the_newest_two_stay_and_are_read_as_they_were_written(store: str) -> None:
    place = store.format("kept")
    checkpoints = checkpoints_in(place)
    assert checkpoints.newest() is None
    for epoch in (1, 2, 3, 10_000, 10_001):
        checkpoints.save(epoch, jobs.numbered(epoch))
    newest = checkpoints_in(place).newest()
    assert newest is not None
    assert newest.state == {"epoch": 10_001}
    assert set(newest.tensors) == {"model", "best"}
    assert (newest.tensors["best"]["w"] == 10_001.0).all()
    epochs = {path.split("/")[-2].split("-")[1] for path in objects(place)}
    assert epochs == {"10000", "10001"}


def test_any_damage_to_the_newest_is_noticed_and_the_one_before_is_taken(
    store: str, caplog: pytest.LogCaptureFixture, record_faults: Record
) -> None:
    place = store.format("damaged")
    checkpoints, generator = checkpoints_in(place), np.random.default_rng(20260751)
    checkpoints.save(1, jobs.numbered(1))
    checkpoints.save(2, jobs.numbered(2))
    tried = survived = 0
    for path, content in objects(place).items():
        if "epoch-00002" not in path:
            continue
        damaged: list[bytes | None] = [content[: int(generator.integers(len(content)))], None]
        for position in generator.integers(0, len(content), 3).tolist():
            damaged.append(content[:position] + bytes([content[position] ^ 1 << 6]) + content[position + 1 :])
        for each in damaged:
            put(place, path, each)
            caplog.clear()
            found = checkpoints.newest()
            put(place, path, content)
            tried += 1
            noticed = "epoch-00002" in caplog.text or (each is None and path.endswith(MANIFEST))
            survived += found is not None and found.state["epoch"] == 1 and noticed
        assert checkpoints.newest().state["epoch"] == 2  # pyright: ignore[reportOptionalMemberAccess]
    record_faults("training", "an object of a checkpoint on S3 damaged", tried=tried, survived=survived)
    assert survived == tried


@pytest.mark.slow
@pytest.mark.fault
def test_a_store_that_does_not_answer_is_not_an_empty_one(tmp_path: Path) -> None:
    with socket.socket() as probe:  # bound, and nobody listens
        probe.bind(("127.0.0.1", 0))
        address = f"s3://bucket/x?endpoint_override=127.0.0.1:{probe.getsockname()[1]}&scheme=http&region=us-east-1"
        patch = pytest.MonkeyPatch()
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints_in(address).newest()
        with pytest.raises(UserError, match="cannot write the checkpoint s3://bucket/x/run/test/epoch-00001"):
            checkpoints_in(address).save(1, jobs.numbered(1))
        patch.undo()


@pytest.mark.parametrize("place", ["/absolute/path", "http://bucket/x", "s3://key:secret@bucket/x", "s3://"])
def test_an_address_that_cannot_be_used_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run_checkpoints(place, tmp_path, "test")
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_any_kill_while_saving_leaves_the_old_checkpoint_or_the_new_one(
    store: str, tmp_path: Path, victims: Victims, record_faults: Record
) -> None:
    """SIGKILL before the n-th object is written, and at drawn times in between."""
    place, generator = store.format("killed"), np.random.default_rng(20260752)
    kills, survived, acknowledged = 12, 0, 0
    for number in range(kills):
        at = int(generator.integers(1, 20)) if number % 2 else None
        trigger = Trigger(folder=str(tmp_path))
        victim = victims.start(jobs.saving, place, str(tmp_path / "run"), at, trigger=trigger)
        if at is None:
            victim.heard(int(generator.integers(1, 4)))
            time.sleep(float(generator.random()) * 0.1)
        ended = victim.kill() if at is None else victim.wait()
        assert ended.killed, ended
        acknowledged = max([acknowledged, *ended.said])
        newest = checkpoints_in(place).newest()
        if newest is None:
            survived += not acknowledged
            continue
        whole = all((group["w"] == newest.state["epoch"]).all() for group in newest.tensors.values())
        survived += whole and newest.state["epoch"] >= acknowledged
    victims.run(jobs.saving, place, str(tmp_path / "run"), None, trigger=Trigger(folder=str(tmp_path)))
    folders = {path.split("/")[-2] for path in objects(place)}
    assert len(folders) == RemoteCheckpoints.KEEP  # what killed processes left is gone
    record_faults("training", "SIGKILL while saving to S3", tried=kills, survived=survived, kills=kills)
    assert survived == kills


@pytest.mark.slow
@pytest.mark.ray
def test_training_goes_on_from_a_checkpoint_in_the_store_with_the_same_bits(
    store: str, toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Record
) -> None:
    def job(name: str, checkpoints: str | None) -> dict[str, object]:
        settings = settings_for(toy_data, tmp_path, epochs=5, patience=5)
        return settings.model_copy(update={"name": name, "checkpoints": checkpoints}).model_dump(mode="json")

    counting = Trigger(folder=str(tmp_path))
    assert not victims.run(jobs.training, job("clean", None), trigger=counting).error
    victim = victims.start(jobs.training, job("remote", store.format("runs")), trigger=counting)
    assert victim.heard(3)
    assert victim.kill().killed
    again = victims.run(jobs.training, job("remote", store.format("runs")), trigger=counting)
    assert not again.error and again.said[-1] == 5 and len(again.said) < 5
    assert not (tmp_path / "remote" / "checkpoints").exists()
    assert recorded(tmp_path, "remote") == recorded(tmp_path, "clean")
    weights = [sha256(tmp_path / name / "model" / "model.safetensors") for name in ("remote", "clean")]
    assert weights[0] == weights[1]
    record_faults("training", "SIGKILL with checkpoints on S3", tried=1, survived=1, kills=1)
