"""The test split, which a trained model meets once, and a sweep of corruptions by leave of this module alone.

Training and tuning cannot reach this module. A comparison calls it when every one of its models is frozen, hands
it the digests they were frozen with, and each opening is written to the model's own run *before* the first shard
is read: an opening can fail, it cannot go unrecorded. A robustness study calls it before its sweep reads anything,
and the opening is written to the study's run in the same words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import MODALITIES
from emolab import checkpoint
from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.scores import accuracy, class_f1, macro_f1
from emolab.sessions.loading import SessionStore, load_split, ordered_batches
from emolab.sessions.manifest import Manifest, read_manifest, write_atomically
from emolab.sessions.selection import SplitLoader
from emolab.studies.session_results import SessionResults, padded, to_parquet
from emolab.tracking.runs import MLflowTracker
from emolab.tracking.tracker import Run
from emolab.training.train import load_model

FILE_NAME = "test_sessions.parquet"
OPENINGS = "emolab.test_openings"
"""Tag: how often the test split was opened for this run; more than 1 only after an interruption."""
FIRST_OPENED = "emolab.test_first_opened"
"""Tag: when it was opened for the first time, UTC."""
OPENED = "emolab.test_opened"
"""Tag: when it was last opened, UTC."""
OPENED_BY = "emolab.test_opened_by"
"""Tag: run id of the comparison or of the robustness study."""
DATASET = "emolab.test_dataset"
"""Tag: digest of the data set."""
CHECKPOINT = "emolab.test_checkpoint"
"""Tag: digest of the weights that were tested."""
RECORDED = "emolab.test_recorded"
"""Tag: `true` once scores and session results are stored."""


def checkpoint_digest(folder: Path) -> str:
    """Digest of a kept model: SHA-256 over its manifest, which holds the SHA-256 of every file.

    Raises:
        UserError: a file is missing or damaged.
    """
    checkpoint.load(folder)
    return hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()


def score_on_test_split(
    folder: Path,
    data: Path,
    *,
    run_id: str,
    tracker: MLflowTracker,
    opened_by: str,
    frozen: Collection[str],
    training_seconds: float,
) -> bool:
    """Test a trained run and record the result in it; a run whose result is recorded is left alone.

    Args:
        folder: of the run; ``folder/model`` holds the kept weights.
        data: folder of the data set that the model was trained on.
        run_id: the run, in the tracker.
        opened_by: run id of the comparison.
        frozen: checkpoint digests of all models of the comparison.
        training_seconds: recorded beside the scores.

    Returns:
        Whether the split was opened.

    Raises:
        UserError: the model is not frozen, was trained on other data, or is not the one that was tested before.
    """
    digest = checkpoint_digest(folder / "model")
    if digest not in frozen:
        raise UserError(f"{folder}: the model is not among those frozen for testing")
    tags = tracker.read(run_id).tags
    if tags.get(RECORDED) == "true":
        if tags.get(CHECKPOINT) != digest:
            raise UserError(f"{folder}: the model has changed since it was tested (run {run_id}): choose another name")
        return False
    model, saved = load_model(folder / "model")
    manifest = read_manifest(data)
    if saved.state["dataset_digest"] != manifest.digest:
        raise UserError(f"{folder}: the model was trained on another data set than {data}")
    run = tracker.resume(run_id)
    run.set_tags(_opening(tags, manifest, opened_by=opened_by) | {CHECKPOINT: digest})
    results = session_results(
        model, _load(data, manifest, "test"), manifest, batch_size=saved.state["training"]["batch_size"]
    )
    _record(run, results, folder, model=model, training_seconds=training_seconds)
    return True


def open_for_sweep(manifest: Manifest, *, run_id: str, tracker: MLflowTracker) -> SplitLoader:
    """Record in a robustness study's run that its sweep is about to read the test split; returns what reads it."""
    tracker.resume(run_id).set_tags(_opening(tracker.read(run_id).tags, manifest, opened_by=run_id))
    return _load


def openings(tracker: MLflowTracker, dataset: str) -> dict[str, int]:
    """How often a tracker saw a data set's test split opened, in any experiment: for `models` in comparisons, and for
    `sweeps`."""
    counted = {"models": 0, "sweeps": 0}
    for run_id in tracker.find_anywhere(DATASET, dataset):
        tags = tracker.read(run_id).tags
        counted["sweeps" if tags.get(OPENED_BY) == run_id else "models"] += int(tags.get(OPENINGS, "0"))
    return counted


def _opening(tags: Mapping[str, str], manifest: Manifest, *, opened_by: str) -> dict[str, str]:
    """Tags of one more opening of a run."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {
        OPENINGS: str(int(tags.get(OPENINGS, "0")) + 1),
        FIRST_OPENED: first_opening(tags) or now,
        OPENED: now,
        OPENED_BY: opened_by,
        DATASET: manifest.digest,
    }


def first_opening(tags: Mapping[str, str]) -> str:
    """When the split was opened for a run for the first time, UTC; empty where it never was. For runs that do not say
    so, when it was last opened."""
    return tags.get(FIRST_OPENED) or tags.get(OPENED, "")


def _load(folder: Path, manifest: Manifest, split: Split) -> SessionStore:
    assert split == "test"
    return load_split(folder, manifest, "test")


@torch.no_grad()
def session_results(model: nn.Module, store: SessionStore, manifest: Manifest, *, batch_size: int) -> SessionResults:
    """Run a model in evaluation mode over every session of a split."""
    confusion: list[NDArray[np.int64]] = []
    weights: list[list[float]] = []
    modalities = tuple(name for name in MODALITIES if name in manifest.dimensions)
    for indices in ordered_batches(len(store), batch_size):
        batch = store.batch(indices)
        predictions = model(batch)
        confusion.append(session_confusion(predictions.log_probabilities, batch).numpy())
        if predictions.confidence is not None:
            rows = zip(predictions.confidence, batch.lengths.tolist(), strict=True)
            weights += [row[:length].flatten().tolist() for row, length in rows]
    return SessionResults(
        classes=tuple(manifest.classes),
        modalities=modalities,
        session_ids=tuple(store.session_ids),
        speaker_ids=tuple(store.speaker_ids),
        steps=store.lengths,
        confusion=np.concatenate(confusion),
        confidence=padded(weights, len(modalities)) if weights else None,
    )


def session_confusion(log_probabilities: Tensor, batch: SessionBatch) -> Tensor:
    """(B, K, K) int64 counts over the labelled steps of each session, rows true, columns predicted."""
    sessions, _, classes = log_probabilities.shape
    place = torch.arange(sessions)[:, None] * classes + batch.labels
    index = place * classes + log_probabilities.argmax(-1)
    return torch.bincount(index[batch.labelled], minlength=sessions * classes**2).view(sessions, classes, classes)


def _record(run: Run, results: SessionResults, folder: Path, *, model: nn.Module, training_seconds: float) -> None:
    counts = results.confusion.sum(axis=0)
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in results.classes]
    scores = {"test_accuracy": float(accuracy(counts)), "test_macro_f1": float(macro_f1(counts))}
    scores |= {f"test_f1.{name}": float(score) for name, score in zip(names, class_f1(counts), strict=True)}
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    run.log_metrics(scores | {"trainable_parameters": trainable, "training_seconds": training_seconds}, step=0)
    path = folder / FILE_NAME
    write_atomically(path, to_parquet(results))
    run.log_file(path)
    run.set_tags({RECORDED: "true"})
