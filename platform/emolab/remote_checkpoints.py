"""Checkpoints on S3-compatible storage, and where the checkpoints of a run are.

Such a store cannot rename. So every checkpoint gets a prefix of its own that was never used before, and its manifest
is the last object to be written: a prefix without a manifest is what a killed process left, and is nothing. Credentials
come from the environment (AWS_ACCESS_KEY_ID and so on, or the machine's role), never from the address.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType
from safetensors import SafetensorError
from safetensors.torch import load, save

from emolab.checkpoint import MANIFEST, STATE, Checkpoint, CheckpointFolder, Checkpoints
from emolab.names import UserError

LOGGER = logging.getLogger(__name__)
SCHEME = "s3://"
_TENSORS = ".safetensors"


def run_checkpoints(place: str | None, folder: Path, identity: str) -> Checkpoints:
    """The checkpoints of the run in a folder.

    Args:
        place: ``s3://bucket/prefix``, or None for the folder itself.
        identity: of configuration and data. Runs of several output folders may share a place, and must not take
            each other's checkpoints for their own.

    Raises:
        UserError: the address cannot be used.
    """
    if place is None:
        return CheckpointFolder(folder / "checkpoints")
    if not place.startswith(SCHEME):
        raise UserError(f"checkpoints={place}: use {SCHEME}bucket/prefix, or null for the run's own folder")
    if "@" in place.partition("?")[0]:
        raise UserError("checkpoints: leave the credentials out of the address and set AWS_ACCESS_KEY_ID and so on")
    try:
        filesystem, root = FileSystem.from_uri(place)
        if not root:
            raise ValueError("it names no bucket")
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"checkpoints={place} is no usable address: {_line(error)}") from None
    return RemoteCheckpoints(filesystem, f"{root.rstrip('/')}/{folder.name}/{identity}")


class RemoteCheckpoints(Checkpoints):
    """Below one prefix of a bucket, one prefix a checkpoint."""

    def __init__(self, filesystem: FileSystem, root: str) -> None:
        """
        Args:
            root: bucket and prefix, without a scheme.
        """
        self._filesystem, self.root, self.place = filesystem, root, f"{SCHEME}{root}"

    def save(self, epoch: int, checkpoint: Checkpoint) -> None:
        place = f"{self.root}/epoch-{epoch:05d}-{os.urandom(4).hex()}"
        digests = {}
        try:
            for name, content in _files(checkpoint):
                self._put(f"{place}/{name}", content)
                digests[name] = hashlib.sha256(content).hexdigest()
            self._put(f"{place}/{MANIFEST}", json.dumps({"sha256": digests}, indent=1).encode())
        except OSError as error:
            raise UserError(f"cannot write the checkpoint {SCHEME}{place}: {_line(error)}") from None
        try:
            self._clear(up_to=epoch)
        except OSError as error:  # it only costs space, and the next epoch tries again
            LOGGER.warning("old checkpoints in %s%s cannot be deleted: %s", SCHEME, self.root, _line(error))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose digests match; damaged ones are skipped with a warning.

        Raises:
            UserError: the store does not answer. That is not the same as a store without checkpoints, from which a
                run would begin anew.
        """
        try:
            places = self._places()
            for place in sorted((place for place, files in places.items() if MANIFEST in files), reverse=True):
                try:
                    return self._load(place, places[place])
                except UserError as error:
                    LOGGER.warning("%s; trying the one before it", error)
        except OSError as error:
            raise UserError(f"the checkpoints in {SCHEME}{self.root} cannot be read: {_line(error)}") from None
        return None

    def discard(self) -> None:
        try:
            for place, files in self._places().items():
                self._delete(place, files)
        except OSError as error:
            LOGGER.warning("the checkpoints in %s%s cannot be deleted: %s", SCHEME, self.root, _line(error))

    def _places(self) -> dict[str, set[str]]:
        """Prefix of every checkpoint, whole or not -> names of its objects."""
        listing: Any = self._filesystem.get_file_info(FileSelector(self.root, recursive=True, allow_not_found=True))
        places: dict[str, set[str]] = {}
        for entry in listing:
            place, _, name = entry.path.rpartition("/")
            if entry.type == FileType.File and place.rpartition("/")[2].startswith("epoch-"):
                places.setdefault(place, set()).add(name)
        return places

    def _load(self, place: str, names: set[str]) -> Checkpoint:
        where = f"checkpoint {SCHEME}{place}"
        try:
            digests: Mapping[str, str] = json.loads(self._get(f"{place}/{MANIFEST}"))["sha256"]
            listed = set(digests)
        except (ValueError, KeyError, TypeError):  # ValueError: neither JSON nor even text
            raise UserError(f"{where}: {MANIFEST} is damaged") from None
        if STATE not in listed or listed != names - {MANIFEST}:
            raise UserError(f"{where}: {MANIFEST} does not list exactly the files that are there")
        contents = {name: self._get(f"{place}/{name}") for name in sorted(listed)}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != digests[name]:
                raise UserError(f"{where}: {name} is damaged (SHA-256 differs)")
        try:
            return Checkpoint(
                tensors={
                    name.removesuffix(_TENSORS): load(content)
                    for name, content in contents.items()
                    if name.endswith(_TENSORS)
                },
                state=json.loads(contents[STATE]),
            )
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{where} cannot be read: {_line(error)}") from None

    def _clear(self, *, up_to: int) -> None:
        """Delete all but the newest whole checkpoints, and what killed processes left; manifests go first."""
        places = self._places()
        whole = sorted(place for place, files in places.items() if MANIFEST in files)
        for place in sorted(set(places) - set(whole[-self.KEEP :])):
            if place > f"{self.root}/epoch-{up_to:05d}~":
                continue
            self._delete(place, places[place])

    def _delete(self, place: str, files: set[str]) -> None:
        if MANIFEST in files:
            self._filesystem.delete_file(f"{place}/{MANIFEST}")
        self._filesystem.delete_dir(place)

    def _put(self, path: str, content: bytes) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _get(self, path: str) -> bytes:
        with self._filesystem.open_input_stream(path) as stream:
            return stream.read()


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for group, tensors in checkpoint.tensors.items():
        yield f"{group}{_TENSORS}", save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    yield STATE, json.dumps(checkpoint.state, allow_nan=False, indent=1).encode()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
