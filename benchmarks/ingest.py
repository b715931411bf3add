"""How fast padded batches come out of session shards, from the second epoch on, against reading them every epoch.

    python benchmarks/ingest.py            # about two minutes
    python benchmarks/ingest.py --quick    # half a minute: fewer sessions

Variants: `plain`, the way Ray Data is used by the book: `ray.data.read_parquet(...).iter_batches(...)` in every
epoch, each batch padded with the same code as ours; `materialised`, the same over a data set that was materialised
once, which is the fast way that Ray Data offers; `ours`, what every training worker does after the shards were read
and verified once: batches planned from seed and epoch, gathered from the object store's memory. Features are as wide
as MFCC, ResNet-18 and BERT make them; lengths are uniform from 30 to 300 steps.

Bytes are those of the sessions (features, masks, labels), not of the padding. Wall time of whole epochs, since Ray
Data works in other processes; CPU time of this process beside it. Interleaved A B C C B A. Before anything is timed,
every batch of `plain` must equal, bit by bit, the batch of the same sessions from `ours`. Makes its own data set in a
temporary folder, and a local Ray of its own with two CPUs. Writes JSON with versions and hardware, by default
benchmarks/results/ingest.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import ray.data
import torch
from measurement import arguments, environment, write_record

from edu_emotionnet.batch import SessionBatch
from emolab.cluster import ClusterSettings, connected
from emolab.corpora.corpus import Corpus, SessionReference
from emolab.sessions.loading import Block, SessionStore, epoch_batches
from emolab.sessions.manifest import Manifest
from emolab.sessions.preparation import prepare
from emolab.sessions.schema import Session
from emolab.training.datasets import from_datasets, shared_datasets

TARGET_RATE, TARGET_RATIO = 1.1e9, 5.0
"""Bytes a second, and the ratio over `plain`, that are claimed (performance targets of the project)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the experiment."""

    sessions: int = 400
    batch_size: int = 32
    bucket_batches: int = 0
    rounds: int = 3
    """Each times every variant twice."""


FULL = (Case(), Case(bucket_batches=50))
QUICK = (Case(sessions=60, batch_size=8, rounds=1),)


@dataclass(frozen=True, kw_only=True)
class WideSessions(Corpus):
    """Random features as wide as real extractors make them."""

    name = "wide"
    generated = True
    sessions: int

    @property
    def classes(self) -> tuple[str, ...]:
        return ("a", "b", "c", "d")

    @property
    def dimensions(self) -> dict[str, int]:
        return {"audio": 40, "visual": 512, "text": 768}

    def references(self) -> list[SessionReference]:
        return [SessionReference(session_id=f"s{i:05d}", speaker_id=f"p{i % 20}") for i in range(self.sessions)]

    def load(self, reference: SessionReference) -> Session:
        generator = np.random.default_rng(int(reference.session_id[1:]))
        steps = int(generator.integers(30, 301))
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.speaker_id,
            corpus=self.name,
            step_seconds=1.0,
            features={name: generator.standard_normal((steps, w), np.float32) for name, w in self.dimensions.items()},
            present={name: generator.random(steps) > 0.1 for name in self.dimensions},
            labels=generator.integers(0, 4, steps),
        )


def collated(tables: Iterator[pa.Table]) -> Iterator[tuple[list[str], SessionBatch]]:
    for table in tables:
        store = SessionStore([Block.from_table(table)])
        yield store.session_ids, store.batch(range(len(store)))


def check_parity(store: SessionStore, batches: Iterator[tuple[list[str], SessionBatch]]) -> None:
    place = {name: index for index, name in enumerate(store.session_ids)}
    seen = 0
    for names, batch in batches:
        ours = store.batch([place[name] for name in names])
        for field in ("features", "present"):
            for name, values in getattr(batch, field).items():
                assert torch.equal(values, getattr(ours, field)[name]), f"{field} of {name} differ"
        assert torch.equal(batch.labels, ours.labels)
        assert torch.equal(batch.lengths, ours.lengths)
        seen += len(names)
    assert seen == len(store)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    manifest = prepare(
        WideSessions(sessions=case.sessions),
        folder / f"data-{case.sessions}",
        seed=0,
        shard_sessions=32,
        report=lambda _: None,
    )
    return measured(case, folder / f"data-{case.sessions}", manifest)


def measured(case: Case, data: Path, manifest: Manifest) -> dict[str, Any]:
    started = time.perf_counter()
    datasets = shared_datasets(data, manifest)
    store = from_datasets(manifest, datasets).train
    first_seconds = time.perf_counter() - started
    reading: dict[str, Any] = {"batch_size": case.batch_size, "batch_format": "pyarrow"}

    def plain() -> Iterator[tuple[list[str], SessionBatch]]:
        return collated(ray.data.read_parquet(str(data / "train")).iter_batches(**reading))

    kept = ray.data.read_parquet(str(data / "train")).materialize()

    def materialised() -> Iterator[tuple[list[str], SessionBatch]]:
        return collated(kept.iter_batches(**reading))

    def ours(epoch: int) -> Iterator[SessionBatch]:
        plan = epoch_batches(store.lengths, case.batch_size, seed=0, epoch=epoch, bucket_batches=case.bucket_batches)
        return (store.batch(indices) for indices in plan)

    check_parity(store, plain())
    variants: dict[str, Callable[[int], Iterator[Any]]] = {
        "plain": lambda _: plain(),
        "materialised": lambda _: materialised(),
        "ours": ours,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for epoch in range(case.rounds):
        for name in (*variants, *reversed(variants)):
            seconds[name].append(timed(variants[name](epoch)))
    return report(case, store, seconds, first_seconds)


def timed(batches: Iterator[Any]) -> tuple[float, float]:
    """Wall and CPU seconds of going through all batches, each dropped when the next one comes."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in batches:
        pass
    return time.perf_counter() - wall, time.process_time() - cpu


def report(
    case: Case, store: SessionStore, seconds: dict[str, list[tuple[float, float]]], first_seconds: float
) -> dict[str, Any]:
    block = store.blocks[0]
    per_step = sum(4 * values.shape[1] + 1 for values in block.features.values()) + 8
    size = int(store.lengths.sum()) * per_step
    wall = {name: [pair[0] for pair in pairs] for name, pairs in seconds.items()}
    median = {name: statistics.median(values) for name, values in wall.items()}
    ratios = {name: median[name] / median["ours"] for name in ("plain", "materialised")}
    return {
        **asdict(case),
        "training_sessions": len(store),
        "bytes": size,
        "first_read_seconds": first_seconds,
        "wall_seconds_per_epoch": wall,
        "bytes_per_second": {name: size / value for name, value in median.items()},
        "best_bytes_per_second": {name: size / min(values) for name, values in wall.items()},
        "bytes_per_cpu_second_of_ours": size / statistics.median(pair[1] for pair in seconds["ours"]),
        "ours_faster_than": ratios,
        "targets": {"bytes_per_second": TARGET_RATE, "over_plain": TARGET_RATIO},
        "met": size / median["ours"] >= TARGET_RATE and ratios["plain"] >= TARGET_RATIO,
    }


def main(given: list[str] | None = None) -> None:
    options = arguments(
        "Time padded batches from memory against reading them every epoch.",
        "ingest",
        "fewer sessions, one round",
        given,
    )
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory(prefix="ing-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=2)):
            for case in QUICK if options.quick else FULL:
                results.append(measure(case, Path(name)))
                rates = {key: f"{rate / 1e9:.2f}" for key, rate in results[-1]["bytes_per_second"].items()}
                ratios = {key: f"{found:.1f}x" for key, found in results[-1]["ours_faster_than"].items()}
                print(f"buckets {case.bucket_batches}: GB/s {rates}; ours faster by {ratios}", flush=True)
    versions = {"ray": ray.__version__, "pyarrow": pa.__version__}
    record = {"quick": options.quick, "environment": environment(**versions), "cases": results}
    write_record(options.output, record)


if __name__ == "__main__":
    main()
