"""Sessions -> shards and the manifest: planned first, written in parallel by Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from emolab.cluster import user_error
from emolab.corpora.corpus import SPLITS, Corpus, SessionReference, Split
from emolab.redaction import command_line
from emolab.sessions.facts import SessionFacts, facts_of
from emolab.sessions.manifest import Manifest, Shard, SplitSummary, Statistics
from emolab.sessions.schema import Session
from emolab.sessions.shards import write_shard
from emolab.sessions.work import session_schema

LARGEST_SHARD = 256 * 2**20
"""Bytes of features in one shard where lengths are known: a shard is held in memory when it is written and read."""

Load = Callable[[SessionReference], Session]


class ShardPlan(NamedTuple):
    """Which sessions one file will hold. The plan does not depend on the cluster, hence neither do the bytes."""

    name: str
    references: list[SessionReference]


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What is known of a shard after it was written."""

    shard: Shard
    sums: Mapping[str, Any]
    """Sums over the shard's observed steps."""
    facts: Sequence[SessionFacts]


def plan_shards(
    splits: Mapping[Split, Sequence[SessionReference]],
    shard_sessions: int,
    *,
    sizes: Mapping[str, int] | None = None,
) -> list[ShardPlan]:
    """Cut every split into files of at most ``shard_sessions`` sessions.

    Args:
        sizes: session id -> bytes; where given, a file also ends before it exceeds ``LARGEST_SHARD``.
    """
    plans = []
    for split, references in splits.items():
        parts: list[list[SessionReference]] = []
        filled = 0
        for reference in references:
            size = sizes[reference.session_id] if sizes else 0
            if not parts or len(parts[-1]) == shard_sessions or filled + size > LARGEST_SHARD:
                parts.append([])
                filled = 0
            parts[-1].append(reference)
            filled += size
        plans += [ShardPlan(f"{split}/part-{number:05d}.parquet", part) for number, part in enumerate(parts)]
    return plans


def write_shards(corpus: Corpus, load: Load, output: Path, plans: Sequence[ShardPlan]) -> list[WrittenShard]:
    """Write all planned shards and return them in the order of the plans.

    Args:
        load: sent to the workers; returns checked sessions.
    """
    data = ray.data.from_items([{"plan": index} for index in range(len(plans))], override_num_blocks=len(plans))
    try:
        rows = data.map(_ShardWriter(corpus, load, output.resolve(), plans)).take_all()
    except RayTaskError as error:
        raise user_error(error) from None
    return [
        WrittenShard(
            shard=Shard(**row["shard"]),
            sums=row["sums"],
            facts=[SessionFacts(**(each | {"label_counts": tuple(each["label_counts"])})) for each in row["facts"]],
        )
        for row in (json.loads(row["written"]) for row in sorted(rows, key=lambda row: row["plan"]))
    ]


class _ShardWriter:
    """Ray Data stage: writes one planned shard, returns its entry and its part of the statistics."""

    def __init__(self, corpus: Corpus, load: Load, output: Path, plans: Sequence[ShardPlan]) -> None:
        self.corpus, self.load, self.output, self.plans = corpus, load, output, plans

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        plan = self.plans[row["plan"]]
        sessions = [self.load(reference) for reference in plan.references]
        shard = write_shard(self.output, plan.name, sessions, session_schema(self.corpus))
        facts = [vars(facts_of(session, classes=len(self.corpus.classes))) for session in sessions]
        written = {"shard": shard.model_dump(), "sums": _sums(sessions, self.corpus), "facts": facts}
        return {"plan": row["plan"], "written": json.dumps(written)}


def _sums(sessions: Sequence[Session], corpus: Corpus) -> dict[str, Any]:
    """Sums over the observed steps, in float64; added in shard order they do not depend on the schedule."""
    labels = np.concatenate([session.labels for session in sessions])
    sums: dict[str, Any] = {"labels": np.bincount(labels[labels >= 0], minlength=len(corpus.classes)).tolist()}
    for name in corpus.dimensions:
        observed = np.concatenate([s.features[name][s.present[name]] for s in sessions]).astype(np.float64)
        sums[name] = {
            "count": len(observed),
            "sum": observed.sum(axis=0).tolist(),
            "squares": np.square(observed).sum(axis=0).tolist(),
        }
    return sums


def build_manifest(
    corpus: Corpus,
    splits: Mapping[Split, Sequence[SessionReference]],
    written: Sequence[WrittenShard],
    *,
    seed: int,
    step_seconds: float,
    **left_out: Any,
) -> Manifest:
    """The manifest of written shards.

    Args:
        step_seconds: as the corpus gives it: the shards round it to single precision, and an hour of steps of 0.2 s
            would end elsewhere.
        left_out: the manifest's fields on the protocol and what it or the quarantine left out.
    """
    by_split: dict[Split, list[WrittenShard]] = {
        split: [each for each in written if each.shard.path.startswith(f"{split}/")] for split in SPLITS
    }
    return Manifest(
        corpus=corpus.name,
        classes=list(corpus.classes),
        dimensions=dict(corpus.dimensions),
        step_seconds=step_seconds,
        seed=seed,
        command=command_line(),
        options=corpus.options(),
        provenance=dict(corpus.provenance()),
        annotation=dict(corpus.annotation_summary()),
        statistics=_statistics(corpus, by_split["train"]),
        splits={split: _summary(corpus, split, list(splits[split]), by_split[split]) for split in SPLITS},
        shards=[each.shard for each in written],
        **left_out,
    )


def _statistics(corpus: Corpus, written: Sequence[WrittenShard]) -> Statistics:
    mean, std = {}, {}
    for name, size in corpus.dimensions.items():
        count = sum(each.sums[name]["count"] for each in written)
        total = _total(written, name, "sum", size)
        mean_values = total / max(1, count)
        variance = _total(written, name, "squares", size) / max(1, count) - mean_values**2
        deviation = np.sqrt(np.clip(variance, 0.0, None))
        mean[name] = mean_values.tolist()
        std[name] = np.where(deviation > 1e-6, deviation, 1.0).tolist()  # a constant feature is left as it is
    return Statistics(mean=mean, std=std)


def _total(written: Sequence[WrittenShard], name: str, key: str, size: int) -> NDArray[np.float64]:
    return np.sum([each.sums[name][key] for each in written], axis=0) if written else np.zeros(size)


def _summary(
    corpus: Corpus, split: Split, references: list[SessionReference], written: Sequence[WrittenShard]
) -> SplitSummary:
    steps = sum(each.shard.steps for each in written)
    return SplitSummary(
        sessions=len(references),
        steps=steps,
        speakers=sorted({reference.speaker_id for reference in references}),
        label_counts=np.sum([each.sums["labels"] for each in written] or [[0] * len(corpus.classes)], axis=0).tolist(),
        present={name: sum(each.sums[name]["count"] for each in written) / max(1, steps) for name in corpus.dimensions},
        reference_scores=dict(corpus.reference_scores(split, references)) if references else {},
    )
