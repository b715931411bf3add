"""sessions.csv: what became of every session of a corpus; quarantine.csv: those that could not be read."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from emolab.corpora.corpus import SPLITS, SessionReference, Split
from emolab.limits import TABLE_BYTES, read_bytes
from emolab.names import UserError
from emolab.sessions.facts import SessionFacts
from emolab.sessions.manifest import Manifest, write_atomically
from emolab.sessions.protocol import Dropped

FILE_NAME = "sessions.csv"
QUARANTINE = "quarantine.csv"

Outcome = Literal["kept", "dropped", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A session that could not be used, and why."""

    session_id: str
    speaker_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One session of the corpus."""

    session_id: str
    speaker_id: str
    outcome: Outcome
    split: Split | None = None
    """Of a session that was kept."""
    rule: str = ""
    """Of the protocol, where that dropped the session."""
    reason: str = ""
    facts: SessionFacts | None = None
    """None where the session could not be read."""


def inventory(
    splits: Mapping[Split, Sequence[SessionReference]],
    facts: Iterable[SessionFacts],
    dropped: Iterable[Dropped] = (),
    refused: Iterable[Refusal] = (),
) -> list[Entry]:
    """Every session with what became of it, by session id."""
    split_of: dict[str, Split] = {
        reference.session_id: split for split, members in splits.items() for reference in members
    }
    left_out = {each.session_id: each for each in dropped}
    entries = [
        Entry(session_id=each.session_id, speaker_id=each.speaker_id, outcome="quarantined", reason=each.reason)
        for each in refused
    ]
    for each in facts:
        gone = left_out.get(each.session_id)
        split: Split | None = None if gone else split_of[each.session_id]
        entries.append(
            Entry(
                session_id=each.session_id,
                speaker_id=each.speaker_id,
                outcome="dropped" if gone else "kept",
                split=split,
                rule=gone.rule if gone else "",
                reason=gone.reason if gone else "",
                facts=each,
            )
        )
    return sorted(entries, key=lambda entry: (entry.session_id, entry.reason))


def write_inventory(entries: Sequence[Entry], manifest: Manifest, folder: Path) -> None:
    """Write both tables beside the manifest; the quarantine only where there is one."""
    columns = _columns(manifest)
    write_atomically(folder / FILE_NAME, _csv(columns, [_row(entry, manifest) for entry in entries]))
    write_quarantine([Refusal(**_named(e)) for e in entries if e.outcome == "quarantined"], folder)


def write_quarantine(refused: Sequence[Refusal], folder: Path) -> None:
    """Write quarantine.csv, or remove an earlier one where nothing is refused any more."""
    if not refused:
        (folder / QUARANTINE).unlink(missing_ok=True)
        return
    rows = [(each.session_id, each.speaker_id, each.reason) for each in refused]
    write_atomically(folder / QUARANTINE, _csv(["session_id", "speaker_id", "reason"], rows))


def read_inventory(folder: Path, manifest: Manifest) -> list[Entry]:
    """The table of a finished data set.

    Raises:
        UserError: it is missing or was changed by hand into something else.
    """
    path = folder / FILE_NAME
    try:
        text = read_bytes(path, most=TABLE_BYTES, what="a list of sessions").decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        return [_entry(row, manifest) for row in rows]
    except OSError:
        raise UserError(f"{path} is missing: the data set was made by an earlier release, prepare it again") from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): delete the folder and prepare it again") from None


def summary(entries: Sequence[Entry]) -> list[str]:
    """What was left out, in a few lines; empty where nothing was."""
    rules = Counter(entry.rule for entry in entries if entry.outcome == "dropped")
    lines = [f"dropped by the protocol: {count} for {rule}" for rule, count in sorted(rules.items())]
    refused = [entry for entry in entries if entry.outcome == "quarantined"]
    if refused:
        lines.append(f"quarantined: {len(refused)} of {len(entries)} sessions, listed in {QUARANTINE}, such as")
        lines += [f"  {entry.session_id[:60]}: {entry.reason}" for entry in refused[:5]]
    return lines


def _columns(manifest: Manifest) -> list[str]:
    return [
        *("session_id", "speaker_id", "outcome", "split", "rule", "reason", "steps", "step_seconds", "dominant_class"),
        *(f"labels.{name}" for name in manifest.classes),
        *(f"present.{name}" for name in manifest.dimensions),
        *(f"longest_gap.{name}" for name in manifest.dimensions),
    ]


def _row(entry: Entry, manifest: Manifest) -> list[Any]:
    head = [entry.session_id, entry.speaker_id, entry.outcome, entry.split or "", entry.rule, entry.reason]
    facts = entry.facts
    if facts is None:
        return [*head, *("" for _ in range(3 + len(manifest.classes) + 2 * len(manifest.dimensions)))]
    dominant = "" if facts.dominant is None else manifest.classes[facts.dominant]
    return [
        *head,
        *(facts.steps, repr(facts.step_seconds), dominant),
        *facts.label_counts,
        *(facts.present[name] for name in manifest.dimensions),
        *(facts.longest_gap[name] for name in manifest.dimensions),
    ]


def _entry(row: Mapping[str, str], manifest: Manifest) -> Entry:
    facts = None
    if row["steps"]:
        facts = SessionFacts(
            session_id=row["session_id"],
            speaker_id=row["speaker_id"],
            steps=int(row["steps"]),
            step_seconds=float(row["step_seconds"]),
            label_counts=tuple(int(row[f"labels.{name}"]) for name in manifest.classes),
            present={name: int(row[f"present.{name}"]) for name in manifest.dimensions},
            longest_gap={name: int(row[f"longest_gap.{name}"]) for name in manifest.dimensions},
        )
    outcome, split = row["outcome"], row["split"]
    if outcome not in get_args(Outcome) or split not in ("", *SPLITS):
        raise ValueError(f"outcome {outcome!r} in split {split!r}")
    return Entry(
        session_id=row["session_id"],
        speaker_id=row["speaker_id"],
        outcome=cast(Outcome, outcome),
        split=cast(Split, split) if split else None,
        rule=row["rule"],
        reason=row["reason"],
        facts=facts,
    )


def _named(entry: Entry) -> dict[str, str]:
    return {"session_id": entry.session_id, "speaker_id": entry.speaker_id, "reason": entry.reason}


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue().encode()
