"""The page of a data set: what is in it, what is missing from it, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emolab.reports.data_figures import class_shares, gap_curves, lengths_and_speakers, observed_shares
from emolab.reports.page import Section, TableData, page
from emolab.sessions.inventory import Entry, read_inventory
from emolab.sessions.manifest import Manifest, read_manifest

_LISTED = {"quarantined": 200, "dropped": 25}
"""So many sessions that were left out are listed; sessions.csv has them all."""


def data_page(folder: Path) -> bytes:
    """One self-contained HTML file, from the manifest and sessions.csv of a finished data set.

    Raises:
        UserError: the folder holds no data set, or its tables cannot be read.
    """
    manifest = read_manifest(folder)
    entries = read_inventory(folder, manifest)
    kept = [entry for entry in entries if entry.outcome == "kept"]
    sections = [
        Section(title="Splits", text=_split_text(manifest), table=_splits(manifest, kept)),
        Section(
            title="Classes",
            text=_class_text(manifest, kept),
            table=_classes(manifest, kept),
            figure=class_shares(manifest),
        ),
        Section(title="Lengths and speakers", text=_length_text(kept), figure=lengths_and_speakers(kept)),
        Section(
            title="What is missing",
            text="The columns train, validation and test give the share of steps at which a modality was observed. The "
            "last figure says how many of all sessions a limit on gaps (protocol.max_gap_seconds) would drop.",
            table=_missing(manifest, kept),
            figures=[observed_shares(manifest, kept), gap_curves(manifest, entries)],
        ),
        _left_out(entries),
        *_annotation(manifest.annotation),
        Section(title="Where it comes from", table=_origin(manifest)),
    ]
    return page(f"Data set {folder.resolve().name}", _lines(manifest, entries, kept), sections)


def _lines(manifest: Manifest, entries: Sequence[Entry], kept: Sequence[Entry]) -> list[str]:
    hours = sum(entry.facts.seconds for entry in kept if entry.facts) / 3600
    speakers = len({entry.speaker_id for entry in kept})
    out = Counter(entry.outcome for entry in entries)
    lines = [
        f"{len(kept)} sessions of {speakers} speakers, {hours:.1f} hours in steps of {manifest.step_seconds:g} s; "
        f"corpus {manifest.corpus}, classes {', '.join(manifest.classes)}.",
        f"{len(entries)} sessions were listed; {out['dropped']} were dropped by the protocol and {out['quarantined']} "
        "could not be read."
        if len(kept) < len(entries)
        else "Every session that the corpus lists is in it.",
        f"Digest {manifest.digest[:16]}, seed {manifest.seed}.",
    ]
    if manifest.corpus == "edusim":
        lines.append("Simulated: nothing here says anything about real learners.")
    return lines


def _split_text(manifest: Manifest) -> str:
    speakers = [set(split.speakers) for split in manifest.splits.values()]
    shared = any(a & b for i, a in enumerate(speakers) for b in speakers[i + 1 :])
    return "Some speakers are in two splits." if shared else "No speaker is in two splits."


def _splits(manifest: Manifest, kept: Sequence[Entry]) -> TableData:
    rows = []
    for name, split in manifest.splits.items():
        members = [entry.facts for entry in kept if entry.split == name and entry.facts]
        rows.append(
            [
                name,
                split.sessions,
                len(split.speakers),
                split.steps,
                round(sum(facts.seconds for facts in members) / 3600, 2),
                split.steps and sum(split.label_counts) / split.steps,
                sum(facts.labelled == 0 for facts in members),
            ]
        )
    columns = ["split", "sessions", "speakers", "steps", "hours", "labelled share", "sessions without label"]
    return TableData(columns=columns, rows=rows)


def _class_text(manifest: Manifest, kept: Sequence[Entry]) -> str:
    text = "Sessions are counted at their dominant class."
    if sum(manifest.splits["validation"].label_counts):
        text += f" Always answering training's most frequent class: accuracy {manifest.class_prior:.3f} on validation."
    sessions = Counter(entry.facts.dominant for entry in kept if entry.facts)
    counts = [sessions[label] for label in range(len(manifest.classes))]
    if max(counts) > 3 * min(counts):
        rare = manifest.classes[counts.index(min(counts))]
        text += f" {rare!r} dominates {min(counts)} sessions only, the most frequent class {max(counts)}."
    return text


def _classes(manifest: Manifest, kept: Sequence[Entry]) -> TableData:
    sessions = Counter((entry.split, entry.facts.dominant) for entry in kept if entry.facts)
    names = list(manifest.splits)
    rows = [
        [
            name,
            *(manifest.splits[split].label_counts[label] for split in names),
            *(sessions[split, label] for split in names),
        ]
        for label, name in enumerate(manifest.classes)
    ]
    columns = ["class", *(f"{name} steps" for name in names), *(f"{name} sessions" for name in names)]
    return TableData(columns=columns, rows=rows)


def _length_text(kept: Sequence[Entry]) -> str:
    steps = np.array([entry.facts.steps for entry in kept if entry.facts])
    waste = 1 - steps.mean() / steps.max()
    text = (
        f"{steps.min()} to {steps.max()} steps, median {np.median(steps):g}. Padded to the longest session, "
        f"{waste:.0%} of every batch would be empty"
    )
    return text + ("; training.length_buckets avoids most of that." if waste > 0.25 else ".")


def _missing(manifest: Manifest, kept: Sequence[Entry]) -> TableData:
    known = [entry.facts for entry in kept if entry.facts]
    rows = []
    for name, width in manifest.dimensions.items():
        gaps = [facts.longest_gap[name] * facts.step_seconds for facts in known if facts.present[name]]
        rows.append(
            [
                name,
                width,
                *(split.present.get(name) for split in manifest.splits.values()),
                sum(facts.present[name] == 0 for facts in known),
                float(np.median(gaps)) if gaps else None,
                float(max(gaps)) if gaps else None,
            ]
        )
    columns = [
        "modality",
        "features",
        *manifest.splits,
        "sessions without",
        "median longest gap, s",
        "longest, s",
    ]
    return TableData(columns=columns, rows=rows)


def _left_out(entries: Sequence[Entry]) -> Section:
    out = [entry for entry in entries if entry.outcome != "kept"]
    if not out:
        return Section(title="Left out", text="Nothing.")
    counts = Counter(entry.rule or "could not be read" for entry in out)
    text = "; ".join(
        f"{count} for {rule}" if rule != "could not be read" else f"{count} could not be read"
        for rule, count in counts.most_common()
    )
    shown = [entry for outcome, most in _LISTED.items() for entry in [e for e in out if e.outcome == outcome][:most]]
    more = f" {len(shown)} of them are listed; sessions.csv has all." if len(out) > len(shown) else ""
    rows = [[entry.session_id[:60], entry.speaker_id[:60], entry.outcome, entry.reason] for entry in shown]
    columns = ["session", "speaker", "outcome", "why"]
    return Section(title="Left out", text=f"{text}.{more}", table=TableData(columns=columns, rows=rows))


def _annotation(annotation: Mapping[str, Any]) -> list[Section]:
    if not annotation:
        return []
    text = (
        "Agreement of the annotators beyond chance (kappa: 0 is chance, 1 is perfect), and labels that no table maps "
        "to a class: their steps carry no label."
    )
    table = TableData(columns=["what", "value"], rows=[[key, value] for key, value in flat(annotation)])
    return [Section(title="Annotation", text=text, table=table)]


def _origin(manifest: Manifest) -> TableData:
    rows: list[list[Any]] = [["command", manifest.command]]
    for part in ("options", "protocol", "provenance"):
        rows += [[f"{part}: {key}", value] for key, value in flat(getattr(manifest, part))]
    return TableData(columns=["what", "value"], rows=rows)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested JSON values as (dotted key, plain value) pairs; lists of plain values stay together."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            pairs += flat({str(place): each for place, each in enumerate(value, start=1)}, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            pairs.append((prefix + str(key), ", ".join(map(str, value))))
        else:
            pairs.append((prefix + str(key), value))
    return pairs
