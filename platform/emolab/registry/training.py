"""jobs/train.py: train, report, and register where asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emolab.registry.lookup import ModelVersion
from emolab.registry.versions import register
from emolab.sessions.manifest import read_manifest
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import Tracker
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.training.train import TrainedModel, train


def train_and_register(settings: TrainSettings, *, dry_run: bool, report: Callable[[str], None]) -> TrainedModel | None:
    """Train the configured model; with ``register_as`` it becomes a version with the alias challenger.

    Raises:
        UserError: as ``train`` and ``register``.
    """
    manifest = read_manifest(Path(settings.data))
    report(
        f"{settings.run_name(manifest.digest)}: {settings.model.name} on {settings.data} "
        f"({manifest.splits['train'].sessions} sessions), at most {settings.training.epochs} epochs, "
        f"{settings.workers.count} worker(s)"
    )
    if dry_run:
        return None
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    trained = train(settings, tracker=tracker, report=lambda epoch: report(progress_line(epoch, settings)))
    if trained.resumed_finished:
        report(f"finished before, after {trained.progress.epoch} epochs: nothing was left to train")
    if trained.best_macro_f1 is not None:
        prior = manifest.class_prior_macro_f1
        report(f"best validation macro-F1 {trained.best_macro_f1:.4f} (class prior {prior:.4f})")
    report(f"model   {trained.folder / 'model'}\nrun     {trained.run_id}\nlook    {tracker.instructions()}")
    if settings.register_as and tracker.uri:
        version = register_where_reached(trained, settings.register_as, tracker)
        report(f"version {version.uri} (alias challenger)" if version else f"version {UNREACHED}")
    return trained


UNREACHED = "not registered: the tracker cannot be reached; run the same command again when it can"


def register_where_reached(trained: TrainedModel, name: str, tracker: Tracker) -> ModelVersion | None:
    """Register a trained model; None where its run has not reached the tracker, which costs nobody the training.

    Raises:
        UserError: as ``register``.
    """
    run_id = tracker.settle(trained.run_id)
    if run_id is None:
        return None
    return register(trained.folder / "model", name, run_id=run_id, tracking_uri=tracker.uri)


def progress_line(epoch: EpochReport, settings: TrainSettings) -> str:
    """One epoch in one line."""
    score = "" if epoch.validation_macro_f1 is None else f"  validation macro-F1 {epoch.validation_macro_f1:.4f}"
    return (
        f"epoch {epoch.epoch:3d}/{settings.training.epochs}  loss {epoch.train_loss:.4f}{score}  "
        f"{epoch.sessions_per_second:.0f} sessions/s"
    )
