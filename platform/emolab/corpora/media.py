"""Your own recordings: a manifest names the video, sound, transcript and labels of every session.

The manifest is a CSV table with the columns ``session_id``, ``speaker_id``, ``video``, ``audio``, ``transcript`` and
``labels``. Paths are relative to the manifest and stay below its folder. A cell may be empty: the session lacks that
modality (or its labels), except that without ``audio`` the video's sound track is heard. Transcripts are JSON words
with times, WebVTT or SubRip; labels are CSV tables with the columns ``start``, ``end`` (seconds) and ``label``.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emolab.corpora.catalog import register
from emolab.corpora.recordings import Clip, RecordedCorpus, Recording
from emolab.limits import TABLE_BYTES, read_bytes
from emolab.names import UserError, nearest

_IDS = ("session_id", "speaker_id")
_FILES = ("video", "audio", "transcript", "labels")


@register
@dataclass(frozen=True, kw_only=True)
class Media(RecordedCorpus):
    """Sessions listed in a manifest."""

    name = "media"

    manifest: str
    """The CSV table, on a file system that every worker sees."""

    def recordings(self) -> Sequence[Recording]:
        """One recording per row.

        Raises:
            UserError: the manifest cannot be read, or a cell is wrong; names the row and the column.
        """
        path = Path(self.manifest)
        return [_recording(row, path.parent, f"{path.name}, row {number}") for number, row in _rows(path)]

    def options(self) -> dict[str, Any]:
        """Another list of sessions is another data set."""
        return super().options() | {"manifest_sha256": hashlib.sha256(_content(Path(self.manifest))).hexdigest()}

    def reading_options(self) -> dict[str, Any]:
        """A mended list leaves the sessions that it still lists as before."""
        return super().options()


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(row of the table, column -> cell) after the header was checked; empty rows are left out."""
    try:
        text = _content(path).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"manifest {path} is not a CSV table of UTF-8 text: {error}") from None
    header = [cell.strip() for cell in lines[0]] if lines else []
    _check_header(header, path)
    if not any(lines[1:]):
        raise UserError(f"manifest {path} lists no session")
    for number, cells in enumerate(lines[1:], start=2):
        if cells and len(cells) != len(header):
            raise UserError(f"{path.name}, row {number} has {len(cells)} cells, the header has {len(header)}")
        if cells:
            yield number, dict(zip(header, (cell.strip() for cell in cells), strict=True))


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path, most=TABLE_BYTES, what="a list of sessions")
    except OSError as error:
        raise UserError(f"manifest {path} cannot be read: {error.strerror}") from None


def _check_header(header: Sequence[str], path: Path) -> None:
    known = (*_IDS, *_FILES)
    for name in header:
        if name not in known or header.count(name) > 1:
            what = "stands twice" if name in known else f"is unknown{nearest(name, known)}"
            raise UserError(f"{path.name}, row 1: column {name[:40]!r} {what} (columns: {', '.join(known)})")
    for name in _IDS:
        if name not in header:
            raise UserError(f"{path.name}, row 1: column {name!r} is missing (columns: {', '.join(known)})")


def _recording(row: Mapping[str, str], folder: Path, where: str) -> Recording:
    for name in _IDS:
        if not row[name]:
            raise UserError(f"{where}, column {name}: is empty")
    files = {name: _below(folder, row[name], f"{where}, column {name}") for name in _FILES if row.get(name)}
    if not set(files) - {"labels"}:
        raise UserError(f"{where}: names no video, audio or transcript")
    video = (Clip(path=files["video"]),) if "video" in files else ()
    return Recording(
        session_id=row["session_id"],
        speaker_id=row["speaker_id"],
        video=video,
        audio=(Clip(path=files["audio"]),) if "audio" in files else video,
        words=files.get("transcript"),
        spans=files.get("labels", ()),
        listed=where,
    )


def _below(folder: Path, cell: str, where: str) -> Path:
    """The file that a cell names, which lies below the manifest's folder also after links are resolved.

    It may be missing: that is one session's trouble, not the manifest's.
    """
    try:
        path = (folder / cell).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{where}: {cell[:60]!r} is not a path ({error})") from None
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {cell[:60]!r} leaves the manifest's folder; put the files below it")
    return path
