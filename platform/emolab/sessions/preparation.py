"""Corpus -> session shards, with Ray Data.

A generated corpus is written shard by shard as it is computed. A recorded one is first read session by session into
a work folder, where the protocol can look at all of it before anything is split, scaled and written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emolab.corpora.corpus import SPLITS, Corpus, SessionReference, Split
from emolab.locks import holding
from emolab.names import UserError
from emolab.sessions.assembly import build_manifest, plan_shards, write_shards
from emolab.sessions.facts import SessionFacts
from emolab.sessions.ingestion import checked, ingest, screen
from emolab.sessions.inventory import FILE_NAME as INVENTORY
from emolab.sessions.inventory import QUARANTINE, Refusal, inventory, summary, write_inventory, write_quarantine
from emolab.sessions.manifest import FILE_NAME, Manifest, canonical_json, read_manifest, write_manifest
from emolab.sessions.protocol import Dropped, Protocol, normalised, select
from emolab.sessions.schema import Session
from emolab.sessions.settings import PrepareSettings
from emolab.sessions.shards import sha256
from emolab.sessions.splits import assign_splits
from emolab.sessions.work import FOLDER as WORK
from emolab.sessions.work import Finished, WorkFolder

REPORT = "report.html"
"""The data report, which jobs/prepare.py writes beside the manifest."""


def make_data_set(settings: PrepareSettings, *, report: Callable[[str], None] = print) -> Manifest:
    """Make the data set that is configured; Ray must be connected.

    Raises:
        UserError: as ``PrepareSettings.build`` and ``prepare``.
    """
    return prepare(
        settings.build(),
        Path(settings.output),
        seed=settings.seed,
        shard_sessions=settings.shard_sessions,
        protocol=settings.protocol,
        max_refused=settings.max_refused,
        stall_seconds=settings.stall_seconds,
        report=report,
    )


def prepare(
    corpus: Corpus,
    output: Path,
    *,
    seed: int,
    shard_sessions: int,
    protocol: Protocol | None = None,
    max_refused: float = 0.1,
    stall_seconds: float = 3600.0,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Write a corpus as a data set folder and return its manifest.

    The manifest is written last, so a folder without one is unfinished. Running again keeps every recorded session
    that was read, and ends with the bytes of an unbroken run.

    Raises:
        UserError: more sessions than ``max_refused`` allows had to be set aside, ids repeat, a speaker is in two
            splits, nothing is left, or the folder holds another data set or is held by another preparation.
    """
    protocol = protocol or Protocol()
    existing = _existing(output, corpus, protocol, seed=seed)
    if existing is not None:
        return existing
    references = listed(corpus)
    work = WorkFolder(output)
    screened = screen(corpus, references)
    at_once = corpus.generated and protocol == Protocol()
    splits = assign_splits(references, seed=seed) if at_once else None
    with holding(work.root, what="preparation"):
        existing = _existing(output, corpus, protocol, seed=seed)  # another driver may just have ended
        if existing is not None:
            return existing
        if splits is not None:
            chosen, load = _Selection(splits), _CorpusLoader(corpus)
        else:
            finished, refused = read_recordings(
                corpus, screened, work, output, max_refused=max_refused, stall_seconds=stall_seconds, report=report
            )
            chosen = _choose(corpus, references, finished, refused, protocol, seed=seed)
            load = _WorkLoader(work, finished, protocol)
        manifest = _write(corpus, load, output, chosen, shard_sessions, seed, protocol, report)
        work.remove()
    return manifest


def listed(corpus: Corpus) -> Sequence[SessionReference]:
    """The sessions of a corpus, of which there are some.

    Raises:
        UserError: there is none, or where they lie cannot be read.
    """
    references = corpus.references()
    if not references:
        raise UserError(f"corpus {corpus.name} lists no session")
    return references


@dataclass(frozen=True)
class _Selection:
    """What goes into the data set, and what does not."""

    splits: Mapping[Split, list[SessionReference]]
    finished: Mapping[str, Finished] | None = None
    """Of a recorded corpus: every session that could be read."""
    dropped: Sequence[Dropped] = ()
    refused: Sequence[Refusal] = ()


class _CorpusLoader:
    """Generates sessions in the workers that write them."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __call__(self, reference: SessionReference) -> Session:
        return checked(self.corpus, reference, self.corpus.load(reference))


class _WorkLoader:
    """Takes sessions from the work folder, scaled as the protocol says."""

    def __init__(self, work: WorkFolder, finished: Mapping[str, Finished], protocol: Protocol) -> None:
        self.work, self.normalise = work, protocol.normalise == "session"
        self.digests = {session_id: each.sha256 for session_id, each in finished.items()}

    def __call__(self, reference: SessionReference) -> Session:
        session = self.work.load(reference.session_id, self.digests[reference.session_id])
        return normalised(session) if self.normalise else session


def _choose(
    corpus: Corpus,
    references: Sequence[SessionReference],
    finished: Mapping[str, Finished],
    refused: Sequence[Refusal],
    protocol: Protocol,
    *,
    seed: int,
) -> _Selection:
    """Apply the protocol to what could be read, in the order of the references."""
    facts = [finished[each.session_id].facts for each in references if each.session_id in finished]
    lengths = sorted({each.step_seconds for each in facts})
    if len(lengths) > 1:
        raise UserError(f"corpus {corpus.name} has steps of {lengths[0]:g} s and of {lengths[-1]:g} s: one is needed")
    kept, dropped = select(facts, protocol, corpus.classes, seed=seed)
    stay = {each.session_id for each in kept}
    splits = assign_splits([each for each in references if each.session_id in stay], seed=seed, protocol=protocol)
    return _Selection(splits, finished, dropped, refused)


def _write(
    corpus: Corpus,
    load: Callable[[SessionReference], Session],
    output: Path,
    chosen: _Selection,
    shard_sessions: int,
    seed: int,
    protocol: Protocol,
    report: Callable[[str], None],
) -> Manifest:
    """Shards, tables, and last of all the manifest."""
    sizes = None
    if chosen.finished is not None:
        width = 4 * sum(corpus.dimensions.values())
        sizes = {name: width * each.facts.steps for name, each in chosen.finished.items()}
    plans = plan_shards(chosen.splits, shard_sessions, sizes=sizes)
    _clear_partial(output)
    report(f"writing {len(plans)} shards with {sum(len(p.references) for p in plans)} sessions to {output}")
    written = write_shards(corpus, load, output, plans)
    rules = [each.rule for each in chosen.dropped]
    facts = _all_facts(chosen, written)
    manifest = build_manifest(
        corpus,
        chosen.splits,
        written,
        seed=seed,
        step_seconds=facts[0].step_seconds,
        protocol=protocol.identity(),
        dropped={rule: rules.count(rule) for rule in sorted(set(rules))},
        quarantined=len(chosen.refused),
    )
    entries = inventory(chosen.splits, facts, chosen.dropped, chosen.refused)
    write_inventory(entries, manifest, output)
    write_manifest(manifest, output)
    for line in summary(entries):
        report(line)
    unlabelled = [name for name, split in manifest.splits.items() if split.sessions and not sum(split.label_counts)]
    if unlabelled:
        report(f"warning: no step of {', '.join(unlabelled)} has a label: good for predictions alone")
    return manifest


def _all_facts(chosen: _Selection, written: Sequence[Any]) -> list[SessionFacts]:
    if chosen.finished is not None:
        return [each.facts for each in chosen.finished.values()]
    return [facts for shard in written for facts in shard.facts]


def read_recordings(
    corpus: Corpus,
    screened: tuple[Sequence[SessionReference], Sequence[Refusal]],
    work: WorkFolder,
    output: Path,
    *,
    max_refused: float,
    stall_seconds: float,
    report: Callable[[str], None],
) -> tuple[dict[str, Finished], list[Refusal]]:
    """Bring every session that can be read into a work folder, which the caller holds; the others into a table.

    Args:
        screened: what ``screen`` made of the references, before the folder came to be.

    Returns:
        The finished sessions by id, and those that were set aside.

    Raises:
        UserError: as ``ingest``, or more than ``max_refused`` had to be set aside.
    """
    sound, repeated = screened
    work.claim(corpus)
    finished, unread = ingest(corpus, sound, work, stall_seconds=stall_seconds, report=report)
    refused = [*repeated, *unread]
    write_quarantine(refused, output)
    _check_refused(refused, len(sound) + len(repeated), max_refused, output)
    return finished, refused


def too_many(refused: int, total: int, max_refused: float) -> bool:
    """Whether so many sessions that cannot be used are more than are allowed."""
    return refused > max_refused * total


def _check_refused(refused: Sequence[Refusal], total: int, max_refused: float, output: Path) -> None:
    if too_many(len(refused), total, max_refused):
        raise UserError(
            f"{len(refused)} of {total} sessions cannot be used, more than max_refused={max_refused:g} allows "
            f"(first: {refused[0].session_id[:60]}: {refused[0].reason}); all reasons are in {output / QUARANTINE}. "
            "Mend them or raise max_refused and run again: what is finished is kept"
        )


def _existing(output: Path, corpus: Corpus, protocol: Protocol, *, seed: int) -> Manifest | None:
    """A finished data set at the output: returned if it is this one and undamaged, refused if it is another."""
    if not (output / FILE_NAME).exists():
        known = (*SPLITS, WORK, INVENTORY, QUARANTINE, REPORT, ".gitignore")
        if output.exists() and any(p for p in output.iterdir() if p.name not in known):
            raise UserError(f"{output} is not empty and holds no data set: choose another --output")
        return None
    manifest = read_manifest(output)
    wanted = {"corpus": corpus.name, "options": corpus.options(), "protocol": protocol.identity(), "seed": seed}
    if canonical_json(wanted) != canonical_json(manifest.model_dump(include=set(wanted))):
        raise UserError(
            f"{output} already holds another data set ({manifest.corpus} {manifest.options}, protocol "
            f"{manifest.protocol or 'none'}, seed {manifest.seed}): choose another --output"
        )
    for shard in manifest.shards:
        path = output / shard.path
        if not path.exists() or sha256(path) != shard.sha256:
            raise UserError(f"shard {path} is missing or damaged: delete {output} and prepare it again")
    WorkFolder(output).remove()
    return manifest


def _clear_partial(output: Path) -> None:
    """Remove what an earlier preparation left, also the report of a data set whose manifest somebody deleted."""
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    (output / REPORT).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
