"""A data set, a kept model and a registered version, made without Ray and without training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tests.conftest import ToyCorpus

from emolab import checkpoint
from emolab.checkpoint import Checkpoint
from emolab.registry.versions import register
from emolab.sessions.manifest import Manifest, Shard, SplitSummary, Statistics, write_manifest
from emolab.sessions.schema import Session, arrow_schema
from emolab.sessions.shards import write_shard
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.recipe import ModelSettings, TrainingSettings

MODEL: dict[str, object] = {"name": "edu_emotionnet", "d_model": 16, "layers": 2, "heads": 2, "dropout": 0.0}
LATE_FUSION: dict[str, object] = {"name": "late_fusion", "d_model": 16, "layers": 1, "heads": 2}
"""A model without a streaming form."""
REGISTERED = "live-tests"


@dataclass(frozen=True, kw_only=True)
class World:
    """Where things are."""

    data: Path
    runs: Path
    model: Path
    """Kept weights."""
    tracker: MLflowTracker
    manifest: Manifest
    sessions: dict[str, list[Session]]

    @property
    def uri(self) -> str:
        return f"models:/{REGISTERED}@challenger"


def make_data(folder: Path) -> tuple[Manifest, dict[str, list[Session]]]:
    corpus = ToyCorpus(sessions=24)
    everything = [corpus.load(reference) for reference in corpus.references()]
    sessions = {"train": everything[:8], "validation": everything[8:18], "test": everything[18:]}
    schema = arrow_schema(corpus.dimensions, quality=False)
    shards: list[Shard] = []
    for split, some in sessions.items():
        for number, first in enumerate(range(0, len(some), 4)):
            shards.append(write_shard(folder, f"{split}/part-{number:05d}.parquet", some[first : first + 4], schema))
    manifest = Manifest(
        corpus="toy",
        classes=list(corpus.classes),
        dimensions=corpus.dimensions,
        step_seconds=1.0,
        seed=0,
        command="tests",
        statistics=Statistics(
            mean={name: [0.5] * size for name, size in corpus.dimensions.items()},
            std={name: [2.0] * size for name, size in corpus.dimensions.items()},
        ),
        splits={
            split: SplitSummary(  # pyright: ignore[reportArgumentType]
                sessions=len(some),
                steps=sum(s.num_steps for s in some),
                speakers=sorted({s.speaker_id for s in some}),
                label_counts=[int(sum((s.labels == k).sum() for s in some)) for k in range(3)],
                present={name: float(np.mean([s.present[name].mean() for s in some])) for name in corpus.dimensions},
            )
            for split, some in sessions.items()
        },
        shards=shards,
    )
    write_manifest(manifest, folder)
    return manifest, sessions


def keep_model(folder: Path, manifest: Manifest, model: dict[str, object], *, run_id: str) -> Path:
    """Kept weights, which are random; the folder."""
    torch.manual_seed(0)
    settings = ModelSettings.model_validate(model)
    state = {
        "model": settings.model_dump(mode="json"),
        "training": TrainingSettings().model_dump(mode="json"),
        "dataset": manifest.model_dump(mode="json"),
        "dataset_digest": manifest.digest,
        "run_id": run_id,
        "best_epoch": 0,
        "best_macro_f1": 0.0,
    }
    checkpoint.save(folder, Checkpoint(tensors={"model": settings.build(manifest).state_dict()}, state=state))
    return folder


def make_world(root: Path) -> World:
    """Everything below one folder."""
    data, runs = root / "data", root / "runs"
    manifest, sessions = make_data(data)
    tracker = open_tracker(enabled=True, uri=None, experiment="edu-emotionnet", output=runs)
    assert isinstance(tracker, MLflowTracker)
    run = tracker.start("live", tags={})
    folder = keep_model(runs / "live" / "model", manifest, MODEL, run_id=run.run_id)
    run.log_file(folder, folder="model")
    run.finish()
    register(folder, REGISTERED, run_id=run.run_id, tracking_uri=tracker.uri)
    return World(data=data, runs=runs, model=folder, tracker=tracker, manifest=manifest, sessions=sessions)


def clean_environment(**more: str) -> dict[str, str]:
    """Without what this process knows of its own cluster."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return known | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | more
