"""Shards on disk: written whole, read only when their digest and page checksums match."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from emolab.corpora.corpus import SPLITS, Split
from emolab.names import UserError
from emolab.sessions.manifest import FILE_NAME, Manifest, Shard, read_manifest
from emolab.sessions.schema import Session, check_steps, from_table, to_row


def write_shard(folder: Path, name: str, sessions: Sequence[Session], schema: pa.Schema) -> Shard:
    """Write ``folder/name`` (``split/file.parquet``) and return its manifest entry."""
    digest = write_rows(folder / name, sessions, schema)
    return Shard(path=name, sha256=digest, rows=len(sessions), steps=sum(s.num_steps for s in sessions))


def write_rows(path: Path, sessions: Sequence[Session], schema: pa.Schema) -> str:
    """Write sessions as a Parquet file, found whole or not at all, and return its SHA-256."""
    table = pa.Table.from_pylist([to_row(session) for session in sessions], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        digest = sha256(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def read_shard(folder: Path, shard: Shard, *, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard's table, after its SHA-256 was compared with the manifest's.

    Raises:
        UserError: the shard is missing, or its bytes are not those that were written.
    """
    return read_rows(folder / shard.path, shard.sha256, columns=columns)


def read_rows(path: Path, digest: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file with this SHA-256.

    Raises:
        UserError: the file is missing, or its bytes are not those that were written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: the data set is incomplete, prepare it again") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"shard {path} is damaged: its SHA-256 differs from {FILE_NAME}, prepare it again")
    try:
        return pq.read_table(
            pa.BufferReader(content),
            columns=list(columns) if columns else None,
            page_checksum_verification=True,
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"shard {path} cannot be read ({' '.join(str(error).split())[:200]})") from None


def verify(folder: Path, *, splits: Sequence[Split] = SPLITS) -> Manifest:
    """Read every shard of the splits and check the whole contract.

    Checks digests and checksums, every session (finite features, labels, shapes), that session ids are unique
    across splits, and that no speaker is in two splits.

    Raises:
        UserError: the first violation, naming the shard, session or speaker.
    """
    manifest = read_manifest(folder)
    seen: dict[str, str] = {}
    speakers: dict[str, str] = {}
    for split in splits:
        for shard in manifest.split_shards(split):
            table = read_shard(folder, shard)
            if table.num_rows != shard.rows:
                raise UserError(f"shard {shard.path} has {table.num_rows} rows, {FILE_NAME} says {shard.rows}")
            try:
                check_steps(table)
            except UserError as error:
                raise UserError(f"shard {shard.path}: {error}") from None
            for index in range(table.num_rows):
                session = from_table(table, index)
                _check_session(session, manifest, shard)
                claim_session(session.session_id, session.speaker_id, split, seen, speakers)
    return manifest


def claim_session(session_id: str, speaker_id: str, split: str, seen: dict[str, str], speakers: dict[str, str]) -> None:
    """Note that a session and its speaker belong to a split.

    Raises:
        UserError: the session id was seen before, or the speaker is in another split.
    """
    if session_id in seen:
        raise UserError(f"session id {session_id!r} is duplicated (in {seen[session_id]} and {split})")
    seen[session_id] = split
    if speakers.setdefault(speaker_id, split) != split:
        raise UserError(f"speaker {speaker_id!r} is in two splits ({speakers[speaker_id]} and {split})")


def describe(manifest: Manifest) -> str:
    """A few lines for people."""
    lines = [
        f"corpus {manifest.corpus}, classes {', '.join(manifest.classes)}",
        "features " + ", ".join(f"{name} {size}" for name, size in manifest.dimensions.items()),
    ]
    for name, split in manifest.splits.items():
        balance = " ".join(
            f"{label} {count / max(1, sum(split.label_counts)):.2f}"
            for label, count in zip(manifest.classes, split.label_counts, strict=True)
        )
        lines.append(
            f"{name}: {split.sessions} sessions, {split.steps} steps, {len(split.speakers)} speakers; {balance}"
        )
    return "\n".join([*lines, f"digest {manifest.digest[:16]}"])


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_session(session: Session, manifest: Manifest, shard: Shard) -> None:
    try:
        session.check(classes=len(manifest.classes))
    except UserError as error:
        raise UserError(f"shard {shard.path}: {error}") from None
    widths = {name: values.shape[1] for name, values in session.features.items()}
    if widths != manifest.dimensions:
        raise UserError(
            f"shard {shard.path}: session {session.session_id!r} has widths {widths}, expected {manifest.dimensions}"
        )


class ShardReader:
    """Stage of a data pipeline: manifest entry -> verified rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        (entry,) = rows.to_pylist()
        return read_shard(self.folder, Shard(**entry))
