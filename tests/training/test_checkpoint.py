"""A checkpoint is found whole or not at all, and never read when a byte of it changed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emolab import checkpoint
from emolab.checkpoint import Checkpoint, CheckpointFolder
from emolab.names import UserError


def some_checkpoint(value: float = 1.0) -> Checkpoint:
    tensors = {
        "model": {"w": torch.full((50, 7), value), "b": torch.arange(3)},
        "optimizer": {"0.step": torch.tensor(2.0)},
    }
    return Checkpoint(tensors=tensors, state={"epoch": int(value), "reports": [{"a": 1.5, "b": None}]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", some_checkpoint())
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.state == some_checkpoint().state
    for group, tensors in some_checkpoint().tensors.items():
        for name, value in tensors.items():
            assert torch.equal(loaded.tensors[group][name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.fault
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flip_truncation_or_loss_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "c"
    checkpoint.save(folder, some_checkpoint())
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["flip", "truncate", "remove", "add"])):
        case "flip":
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(bytes(content))
        case "truncate":
            path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content) - 1))]))
        case "remove":
            path.unlink()
        case _:
            (folder / "stranger.safetensors").write_bytes(b"")
    if path.name == checkpoint.MANIFEST and (folder / "stranger.safetensors").exists() is False:
        # A flip inside the manifest may only change white space; then the checkpoint is still what was written.
        try:
            assert checkpoint.load(folder).state == some_checkpoint().state
        except UserError:
            return
    else:
        with pytest.raises(UserError):
            checkpoint.load(folder)


@pytest.mark.fault
def test_a_damaged_newest_checkpoint_is_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = CheckpointFolder(tmp_path)
    for epoch in (1, 2, 3):
        folder.save(epoch, some_checkpoint(epoch))
    assert len(list(tmp_path.iterdir())) == CheckpointFolder.KEEP
    victim = tmp_path / "epoch-00003" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    newest = folder.newest()
    assert newest is not None
    assert newest.state["epoch"] == 2
    assert "epoch-00003" in caplog.text


@pytest.mark.fault
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_where(tmp_path: Path) -> None:
    code = f"""
import resource, signal, torch
from pathlib import Path
from emolab import checkpoint
from emolab.checkpoint import Checkpoint
folder = Path({str(tmp_path)!r}) / "c"
checkpoint.save(folder, Checkpoint(tensors={{"model": {{"w": torch.ones(10)}}}}, state={{"epoch": 1}}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoint.save(folder, Checkpoint(tensors={{"model": {{"w": torch.ones(1_000_000)}}}}, state={{"epoch": 2}}))
except ValueError as error:
    print("refused:", error)
print("epoch", checkpoint.load(folder).state["epoch"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused: cannot write the checkpoint" in result.stdout, result.stderr
    assert "epoch 1" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.fault
def test_a_kill_while_saving_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from emolab.checkpoint import Checkpoint, CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]))
for epoch in range(1, 100_000):
    tensors = {"model": {"w": torch.full((200_000,), float(epoch))}}
    folder.save(epoch, Checkpoint(tensors=tensors, state={"epoch": epoch}))
    print(epoch, flush=True)
"""
    for delay in (0.0, 0.013, 0.031):
        root = tmp_path / str(delay)  # what an earlier child left would be newer than what this one saves
        child = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(3):
            acknowledged = int(child.stdout.readline())
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        newest = CheckpointFolder(root).newest()
        assert newest is not None
        assert newest.state["epoch"] >= acknowledged
        assert (newest.tensors["model"]["w"] == newest.state["epoch"]).all()
