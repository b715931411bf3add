"""Corpus -> session shards, with Ray Data: shards are planned first and written in parallel."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import ray.data
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from ray.exceptions import RayTaskError

from emolab.cluster import user_error
from emolab.configuration import Settings
from emolab.corpora.catalog import corpus_class
from emolab.corpora.corpus import SPLITS, Corpus, SessionReference, Split
from emolab.names import UserError, nearest
from emolab.sessions.manifest import (
    FILE_NAME,
    Manifest,
    Shard,
    SplitSummary,
    Statistics,
    read_manifest,
    write_manifest,
)
from emolab.sessions.schema import Session, arrow_schema
from emolab.sessions.shards import claim_session, sha256, write_shard
from emolab.sessions.splits import split_by_speaker


class PrepareSettings(Settings):
    """A data set to make (jobs/prepare.py)."""

    corpus: str = Field(default="edusim", description="edusim, mosi, ...")
    source: str | None = Field(default=None, description="folder or file of a corpus that is not generated")
    output: str = Field(default="data/edusim", description="folder to write")
    seed: int = Field(default=0, ge=0, description="of the simulator and of the split by speakers")
    shard_sessions: int = Field(default=256, ge=1, description="sessions per Parquet file")
    options: dict[str, Any] = Field(default={}, description="the corpus's own options, as options.key=value")

    preset_section: ClassVar[str] = "prepare"

    def build(self) -> Corpus:
        """The corpus, with its options checked.

        Raises:
            UserError: unknown corpus or option, or a value it refuses.
        """
        corpus = corpus_class(self.corpus)
        known = [name for name in corpus.__annotations__ if name != "name"]
        values = dict(self.options)
        for name, value in (("source", self.source), ("seed", self.seed)):
            if name in known and value is not None:
                values.setdefault(name, value)
        for key in values:
            if key not in known:
                raise UserError(
                    f"options.{key}: unknown option of {self.corpus}{nearest(key, known)} (options: {', '.join(known)})"
                )
        if "source" in known and not values.get("source"):
            raise UserError(f"corpus {self.corpus} needs --source, the folder it lies in")
        try:
            return TypeAdapter(corpus).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"options.{key}: {first['msg'].removeprefix('Value error, ')}" if key else first["msg"]
            ) from None


class ShardPlan(NamedTuple):
    """Which sessions one file will hold. The plan does not depend on the cluster, hence neither do the bytes."""

    name: str
    references: list[SessionReference]


def prepare(
    corpus: Corpus, output: Path, *, seed: int, shard_sessions: int, report: Callable[[str], None] = print
) -> Manifest:
    """Write a corpus as a data set folder and return its manifest.

    The manifest is written last, so a folder without one is unfinished; running again keeps the shards whose bytes
    were recorded and writes the rest.

    Raises:
        UserError: a session breaks the contract, ids repeat, or the folder holds another data set.
    """
    splits = assign_splits(corpus.references(), seed=seed)
    plans = plan_shards(splits, shard_sessions)
    existing = _existing(output, corpus)
    if existing is not None:
        return existing
    _clear_partial(output)
    report(f"writing {len(plans)} shards with {sum(len(p.references) for p in plans)} sessions to {output}")
    rows = _write_shards(corpus, output, plans)
    manifest = _manifest(corpus, splits, rows, seed=seed)
    write_manifest(manifest, output)
    return manifest


def assign_splits(references: Sequence[SessionReference], *, seed: int) -> dict[Split, list[SessionReference]]:
    """Published splits where the corpus has them, otherwise 70/10/20 % of the speakers.

    Raises:
        UserError: a session id twice, or a speaker in two splits.
    """
    published = all(reference.published_split is not None for reference in references)
    chosen = {} if published else split_by_speaker([r.speaker_id for r in references], seed=seed)
    seen: dict[str, str] = {}
    speakers: dict[str, str] = {}
    splits: dict[Split, list[SessionReference]] = {split: [] for split in SPLITS}
    for reference in references:
        split = reference.published_split or chosen[reference.speaker_id]
        claim_session(reference.session_id, reference.speaker_id, split, seen, speakers)
        splits[split].append(reference)
    return splits


def plan_shards(splits: dict[Split, list[SessionReference]], shard_sessions: int) -> list[ShardPlan]:
    """Cut every split into files of at most ``shard_sessions`` sessions."""
    return [
        ShardPlan(f"{split}/part-{start // shard_sessions:05d}.parquet", references[start : start + shard_sessions])
        for split, references in splits.items()
        for start in range(0, len(references), shard_sessions)
    ]


def _write_shards(corpus: Corpus, output: Path, plans: list[ShardPlan]) -> list[dict[str, Any]]:
    data = ray.data.from_items([{"plan": index} for index in range(len(plans))], override_num_blocks=len(plans))
    try:
        rows = data.map(_ShardWriter(corpus, output.resolve(), plans)).take_all()
    except RayTaskError as error:
        raise user_error(error) from None
    return sorted(rows, key=lambda row: row["plan"])


class _ShardWriter:
    """Ray Data stage: writes one planned shard, returns its entry and its part of the statistics."""

    def __init__(self, corpus: Corpus, output: Path, plans: list[ShardPlan]) -> None:
        self.corpus, self.output, self.plans = corpus, output, plans
        self.schema = arrow_schema(corpus.dimensions, quality=corpus.has_quality)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        plan = self.plans[row["plan"]]
        sessions = []
        for reference in plan.references:
            session = self.corpus.load(reference)
            session.check(classes=len(self.corpus.classes))
            if session.session_id != reference.session_id or session.speaker_id != reference.speaker_id:
                raise UserError(
                    f"corpus {self.corpus.name} returned {session.session_id!r} for {reference.session_id!r}"
                )
            sessions.append(session)
        shard = write_shard(self.output, plan.name, sessions, self.schema)
        return {"plan": row["plan"], "shard": shard.model_dump()} | _sums(sessions, self.corpus)


def _sums(sessions: Sequence[Session], corpus: Corpus) -> dict[str, Any]:
    """Sums over the observed steps, in float64; added in shard order they do not depend on the schedule."""
    labels = np.concatenate([session.labels for session in sessions])
    sums: dict[str, Any] = {
        "labels": np.bincount(labels[labels >= 0], minlength=len(corpus.classes)).tolist(),
        "step_seconds": sessions[0].step_seconds,
    }
    for name in corpus.dimensions:
        observed = np.concatenate([s.features[name][s.present[name]] for s in sessions]).astype(np.float64)
        sums[name] = {
            "count": len(observed),
            "sum": observed.sum(axis=0).tolist(),
            "squares": np.square(observed).sum(axis=0).tolist(),
        }
    return sums


def _manifest(
    corpus: Corpus, splits: dict[Split, list[SessionReference]], rows: list[dict[str, Any]], *, seed: int
) -> Manifest:
    shards = [Shard(**row["shard"]) for row in rows]
    by_split: dict[Split, list[dict[str, Any]]] = {
        split: [r for r in rows if r["shard"]["path"].startswith(f"{split}/")] for split in SPLITS
    }
    return Manifest(
        corpus=corpus.name,
        classes=list(corpus.classes),
        dimensions=dict(corpus.dimensions),
        step_seconds=rows[0]["step_seconds"],
        seed=seed,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        options=corpus.options(),
        provenance=dict(corpus.provenance()),
        statistics=_statistics(corpus, by_split["train"]),
        splits={split: _summary(corpus, split, splits[split], by_split[split]) for split in SPLITS},
        shards=shards,
    )


def _statistics(corpus: Corpus, rows: list[dict[str, Any]]) -> Statistics:
    mean, std = {}, {}
    for name, size in corpus.dimensions.items():
        count = sum(row[name]["count"] for row in rows)
        total = _total(rows, name, "sum", size)
        mean_values = total / max(1, count)
        variance = _total(rows, name, "squares", size) / max(1, count) - mean_values**2
        deviation = np.sqrt(np.clip(variance, 0.0, None))
        mean[name] = mean_values.tolist()
        std[name] = np.where(deviation > 1e-6, deviation, 1.0).tolist()  # a constant feature is left as it is
    return Statistics(mean=mean, std=std)


def _total(rows: list[dict[str, Any]], name: str, key: str, size: int) -> NDArray[np.float64]:
    return np.sum([row[name][key] for row in rows], axis=0) if rows else np.zeros(size)


def _summary(
    corpus: Corpus, split: Split, references: list[SessionReference], rows: list[dict[str, Any]]
) -> SplitSummary:
    steps = sum(row["shard"]["steps"] for row in rows)
    return SplitSummary(
        sessions=len(references),
        steps=steps,
        speakers=sorted({reference.speaker_id for reference in references}),
        label_counts=np.sum([row["labels"] for row in rows] or [[0] * len(corpus.classes)], axis=0).tolist(),
        present={name: sum(row[name]["count"] for row in rows) / max(1, steps) for name in corpus.dimensions},
        reference_scores=dict(corpus.reference_scores(split, references)) if references else {},
    )


def _existing(output: Path, corpus: Corpus) -> Manifest | None:
    """A finished data set at the output: returned if it is this one and undamaged, refused if it is another."""
    if not (output / FILE_NAME).exists():
        if output.exists() and any(p for p in output.iterdir() if p.name not in (*SPLITS, ".gitignore")):
            raise UserError(f"{output} is not empty and holds no data set: choose another --output")
        return None
    manifest = read_manifest(output)
    if (manifest.corpus, manifest.options) != (corpus.name, corpus.options()):
        raise UserError(
            f"{output} already holds another data set ({manifest.corpus} {manifest.options}): choose another --output"
        )
    for shard in manifest.shards:
        path = output / shard.path
        if not path.exists() or sha256(path) != shard.sha256:
            raise UserError(f"shard {path} is missing or damaged: delete {output} and prepare it again")
    return manifest


def _clear_partial(output: Path) -> None:
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
