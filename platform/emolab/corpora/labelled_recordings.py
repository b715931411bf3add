"""Published corpora of recordings: utterances with labels of the corpus's own, media beside them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emolab.corpora.corpus import SessionReference
from emolab.corpora.labels import LabelledCorpus
from emolab.corpora.recordings import PAPER_CLASSES, LabelledSpan, RecordedCorpus, Recording
from emolab.names import UserError

_C1_CONTROLS = re.compile("[\x80-\x9f]")
_LARGEST_LIST = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class UnusableRecording(Recording):
    """A session whose annotation or list entry is damaged: it is set aside when its turn comes."""

    reason: str


class LabelledRecordings(LabelledCorpus, RecordedCorpus):
    """Base of IEMOCAP, MELD and DAiSEE. ``label_table`` gives the classes, so ``class_names`` stays as it is."""

    def __post_init__(self) -> None:
        if self.class_names != PAPER_CLASSES:
            raise UserError(f"class_names: the classes of {self.name} come from label_table")
        super().__post_init__()

    def references(self) -> Sequence[SessionReference]:
        if not Path(self.source).is_dir():
            raise UserError(f"{self.name} folder {self.source} does not exist: pass the corpus's folder as source")
        self.check_table()
        return super().references()

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options().items() if name != "class_names"}

    def recording(self, reference: SessionReference) -> Recording:
        """The recording of a reference.

        Raises:
            RefusedSessionError: its annotation or list entry is damaged.
            UserError: the reference is not one of this corpus.
        """
        found = super().recording(reference)
        if isinstance(found, UnusableRecording):
            raise found.refused(found.reason)
        return found

    def span(self, start: float, end: float, utterance: str, label: str | None) -> tuple[LabelledSpan, ...]:
        """The utterance's span with its class; none where it stays unlabelled."""
        name = self.table.class_name(utterance, label)
        return () if name is None else (LabelledSpan(start, end, name),)

    def undocumented(self, labels: Iterable[str]) -> str:
        """What is wrong with the first label that the corpus does not document; empty where all are known."""
        unknown = next((label for label in labels if label not in self.tabled_labels), None)
        return "" if unknown is None else f"unknown label {unknown[:60]!r} (labels: {', '.join(self.tabled_labels)})"


def read_text(path: Path) -> str:
    """A text file of a corpus: UTF-8, or Windows-1252 where it is not.

    Typographic quotes and dashes that went through one conversion too many and came out as control characters
    (U+0080 to U+009F) are put right.

    Raises:
        UserError: it cannot be read, is absurdly large, or is not text.
    """
    try:
        if path.stat().st_size > _LARGEST_LIST:
            raise UserError(f"{path} is larger than {_LARGEST_LIST >> 20} MB: not a list of utterances")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    if "\0" in text:
        raise UserError(f"{path} is not a text file")
    return _C1_CONTROLS.sub(lambda found: found[0].encode("latin1").decode("cp1252", errors="replace"), text)


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line, column -> cell) of a CSV file with at least these columns; spaces around names and cells are dropped.

    Raises:
        UserError: it cannot be read, a column is missing, or a row has another number of cells.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from None
    header = rows[0][1] if rows else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path}, line 1: column {missing[0]!r} is missing (expected {', '.join(columns)})")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: {len(row)} cells, expected {len(header)}")
    return [(line, dict(zip(header, row, strict=True))) for line, row in rows[1:]]
