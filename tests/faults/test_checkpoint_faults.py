"""Whatever happens to the files of a checkpoint, what is loaded is what was saved."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emolab import checkpoint
from emolab.checkpoint import MANIFEST, Checkpoint, CheckpointFolder
from emolab.names import UserError

pytestmark = pytest.mark.fault
OFFSETS = 20


def numbered(epoch: int) -> Checkpoint:
    tensors = {name: {"w": torch.full((60, 9), float(epoch))} for name in ("model", "best", "optimizer")}
    return Checkpoint(tensors=tensors, state={"epoch": epoch, "reports": [{"a": 1.5, "b": None}]})


def test_every_file_flipped_cut_or_deleted_anywhere_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record_faults: Callable[..., None]
) -> None:
    folder, generator = CheckpointFolder(tmp_path), np.random.default_rng(20260761)
    folder.save(1, numbered(1))
    folder.save(2, numbered(2))
    tried = survived = 0
    for path in sorted((tmp_path / "epoch-00002").iterdir()):
        content = path.read_bytes()
        offsets = sorted({0, len(content) - 1, *generator.integers(0, len(content), OFFSETS - 2).tolist()})
        damaged: list[bytes | None] = [None]
        for offset in offsets:
            flipped = bytes([content[offset] ^ 1 << int(generator.integers(8))])
            damaged += [content[:offset] + flipped + content[offset + 1 :], content[:offset]]
        for each in damaged:
            path.unlink() if each is None else path.write_bytes(each)
            caplog.clear()
            newest = folder.newest()
            path.write_bytes(content)
            tried += 1
            # A flip in the manifest's white space, or in nothing that says anything, leaves it what it was.
            harmless = path.name == MANIFEST and newest is not None and newest.state["epoch"] == 2
            skipped = newest is not None and newest.state["epoch"] == 1 and "epoch-00002" in caplog.text
            survived += (harmless or skipped) and bool((newest.tensors["model"]["w"] == newest.state["epoch"]).all())  # pyright: ignore[reportOptionalMemberAccess]
    record_faults("training", "a file of a checkpoint flipped, cut or deleted", tried=tried, survived=survived)
    assert survived == tried > OFFSETS * 5


class CheckpointsUnderAttack(RuleBasedStateMachine):
    """Saves, kills in the middle of a save, damage and loads in any order; a model says what must be found."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folder = CheckpointFolder(self.root)
        self.epoch = 0
        self.sound: set[int] = set()
        """Epochs whose checkpoints nobody has touched."""

    @rule()
    def save(self) -> None:
        self.epoch += 1
        self.folder.save(self.epoch, numbered(self.epoch))
        self.sound.add(self.epoch)
        there = sorted(int(path.name[6:]) for path in self.root.glob("epoch-*"))
        self.sound &= set(there)
        assert there[-1] == self.epoch and len(there) <= CheckpointFolder.KEEP

    @rule(files=st.integers(0, 5))
    def die_while_saving(self, files: int) -> None:
        """What a process leaves that is killed before it renames: some files, the last of them half written."""
        partial = self.root / f".epoch-{self.epoch + 1:05d}.99.partial"
        shutil.rmtree(partial, ignore_errors=True)
        checkpoint.save(self.root / "whole", numbered(self.epoch + 1))
        partial.mkdir()
        for path in sorted((self.root / "whole").iterdir())[:files]:
            (partial / path.name).write_bytes(path.read_bytes()[: -1 if path.name == MANIFEST else None])
        shutil.rmtree(self.root / "whole")

    @rule()
    def die_while_deleting(self) -> None:
        """What a process leaves that is killed while it deletes an old checkpoint: a part of it."""
        for old in sorted(self.root.glob("epoch-*"))[:-1]:
            for first in sorted(old.iterdir())[:1]:
                first.unlink()
            self.sound.discard(int(old.name[6:]))

    @precondition(lambda self: self.sound)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.sound)))
        files = [p for p in sorted((self.root / f"epoch-{epoch:05d}").iterdir()) if p.name != MANIFEST]
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        self.sound.discard(epoch)

    @invariant()
    def the_newest_sound_one_is_found(self) -> None:
        newest = self.folder.newest()
        if not self.sound:
            assert newest is None
            return
        assert newest is not None
        assert newest.state["epoch"] == max(self.sound)
        assert all((group["w"] == max(self.sound)).all() for group in newest.tensors.values())

    def teardown(self) -> None:
        shutil.rmtree(self.root)


TestCheckpointsUnderAttack = CheckpointsUnderAttack.TestCase
TestCheckpointsUnderAttack.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def test_a_checkpoint_is_read_from_inside_its_folder_alone(tmp_path: Path) -> None:
    """A manifest cannot name a file elsewhere, neither by a path nor by a link."""
    checkpoint.save(tmp_path / "c", numbered(1))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(tmp_path / "c" / "model.safetensors", outside)
    manifest = (tmp_path / "c" / MANIFEST).read_text()
    (tmp_path / "c" / MANIFEST).write_text(manifest.replace('"model.safetensors"', '"../outside.safetensors"'))
    with pytest.raises(UserError, match="does not list exactly the files"):
        checkpoint.load(tmp_path / "c")
