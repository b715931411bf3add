"""Checkpoints: safetensors for tensors, JSON for the rest, SHA-256 over both. Nothing is ever pickled.

A checkpoint folder appears under its name only when it is complete, and is read only when its digests match; the
newest folder that passes is the one to resume from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from emolab.names import UserError
from emolab.sessions.shards import sha256

LOGGER = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Named groups of tensors and a JSON state."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Group -> name -> tensor; each group is one safetensors file."""
    state: Mapping[str, Any]

    def digest(self) -> bytes:
        """SHA-256 over all of it, by which processes tell whether they have read the same."""
        found = hashlib.sha256(json.dumps(self.state, sort_keys=True).encode())
        for group, tensors in sorted(self.tensors.items()):
            found.update(group.encode() + to_bytes({name: t.cpu().contiguous() for name, t in tensors.items()}))
        return found.digest()


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for group, tensors in checkpoint.tensors.items():
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                temporary / f"{group}.safetensors",
            )
        (temporary / STATE).write_text(json.dumps(checkpoint.state, allow_nan=False, indent=1))
        digests = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=1))
        for path in temporary.iterdir():
            _synchronise(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        _synchronise(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the checkpoint {folder}: {_reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: a file is missing, damaged, or not listed in the manifest.
    """
    digests = _digests(folder)
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise UserError(f"checkpoint {folder}: {name} is missing or damaged (SHA-256 differs)")
    try:
        return Checkpoint(
            tensors={
                name.removesuffix(".safetensors"): load_file(folder / name)
                for name in digests
                if name.endswith(".safetensors")
            },
            state=json.loads((folder / STATE).read_text()),
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {_reason(error)}") from None


class Checkpoints(ABC):
    """The checkpoints of one run, one an epoch, wherever they are kept."""

    KEEP = 2
    """How many of the newest ones stay."""
    place: str = ""
    """Where they are, for people."""

    @abstractmethod
    def save(self, epoch: int, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, whole or not at all, and delete those that are too old.

        Raises:
            UserError: it cannot be written; what was there before is untouched.
        """

    @abstractmethod
    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose digests match; damaged ones are skipped with a warning."""

    @abstractmethod
    def discard(self) -> None:
        """Delete all of them; what cannot be deleted only costs space."""


class CheckpointFolder(Checkpoints):
    """In a folder, one folder an epoch."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, str(root)

    def save(self, epoch: int, checkpoint: Checkpoint) -> None:
        save(self.root / f"epoch-{epoch:05d}", checkpoint)
        for old in self._folders()[: -self.KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        for folder in reversed(self._folders()):
            try:
                return load(folder)
            except UserError as error:
                LOGGER.warning("%s; trying the one before it", error)
        return None

    def discard(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.root.glob("epoch-*") if path.is_dir())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's per-parameter state as flat names ``index.key``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value) for index, values in state.items() for key, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _digests(folder: Path) -> dict[str, str]:
    try:
        digests = json.loads((folder / MANIFEST).read_text())["sha256"]
        names = {path.name for path in folder.iterdir()} - {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):  # ValueError: neither JSON nor even text
        raise UserError(f"checkpoint {folder}: {MANIFEST} is missing or damaged") from None
    if not isinstance(digests, dict) or set(digests) != names or STATE not in names:
        raise UserError(f"checkpoint {folder}: {MANIFEST} does not list exactly the files that are there")
    return digests


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
