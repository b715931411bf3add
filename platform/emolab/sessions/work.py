"""The work folder of an unfinished data set: every finished session in a file of its own, with its digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from emolab.corpora.corpus import Corpus, SessionReference
from emolab.names import UserError, contained
from emolab.sessions.facts import SessionFacts, facts_of
from emolab.sessions.manifest import canonical_json, write_atomically
from emolab.sessions.schema import SCHEMA_VERSION, Session, arrow_schema, from_table
from emolab.sessions.shards import read_rows, sha256, write_rows

FOLDER = ".unfinished"
"""Inside the output folder, until the manifest is written."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A session that needs no more reading."""

    sha256: str
    input_key: str
    facts: SessionFacts


class WorkFolder:
    """Finished sessions of one corpus with one set of options. Small enough to send to every worker."""

    def __init__(self, output: Path) -> None:
        self.root = output.resolve() / FOLDER

    def claim(self, corpus: Corpus) -> None:
        """Make the folder this corpus's own.

        Raises:
            UserError: it holds sessions of another corpus, other options or other extractors.
        """
        identity = canonical_json(
            {
                "schema_version": SCHEMA_VERSION,
                "corpus": corpus.name,
                "classes": list(corpus.classes),
                "dimensions": dict(corpus.dimensions),
                "options": corpus.reading_options(),
                "provenance": dict(corpus.provenance()),
            }
        )
        record = self.root / "identity.json"
        if not record.exists():
            write_atomically(record, identity.encode())
        elif record.read_text(encoding="utf-8") != identity:
            raise UserError(
                f"{self.root} holds unfinished work of another corpus, options or extractors: "
                "delete it or choose another --output"
            )

    def add(self, corpus: Corpus, reference: SessionReference, session: Session) -> None:
        """Keep a checked session; its record is written last."""
        digest = write_rows(self._rows(session.session_id), [session], session_schema(corpus))
        facts = facts_of(session, classes=len(corpus.classes))
        record = Finished(sha256=digest, input_key=corpus.input_key(reference), facts=facts)
        write_atomically(self._record(session.session_id), json.dumps(asdict(record)).encode())

    def finished(self, corpus: Corpus, references: Iterable[SessionReference]) -> dict[str, Finished]:
        """Those of the sessions whose files are whole and whose inputs are as they were, by id."""
        found = {}
        for reference in references:
            session_id = reference.session_id
            record = self._read(session_id)
            if (
                record is not None
                and sha256(self._rows(session_id)) == record.sha256
                and corpus.input_key(reference) == record.input_key
            ):
                found[session_id] = record
        return found

    def load(self, session_id: str, digest: str) -> Session:
        """A finished session.

        Raises:
            UserError: its bytes are not those that were written.
        """
        return from_table(read_rows(self._rows(session_id), digest), 0)

    def remove(self) -> None:
        """Delete the folder, once the data set is finished."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _read(self, session_id: str) -> Finished | None:
        try:
            record: dict[str, Any] = json.loads(self._record(session_id).read_bytes())
            facts = SessionFacts(**(record["facts"] | {"label_counts": tuple(record["facts"]["label_counts"])}))
            whole = facts.session_id == session_id and self._rows(session_id).is_file()
            return Finished(sha256=record["sha256"], input_key=record["input_key"], facts=facts) if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _rows(self, session_id: str) -> Path:
        return contained(self.root / "sessions", session_id, what="session id")

    def _record(self, session_id: str) -> Path:
        return contained(self.root / "records", session_id, what="session id")


def session_schema(corpus: Corpus) -> pa.Schema:
    """Columns of a corpus's sessions."""
    return arrow_schema(corpus.dimensions, quality=corpus.has_quality)
