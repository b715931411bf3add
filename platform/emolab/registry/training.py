"""jobs/train.py: train, report, and register where asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emolab.registry.versions import register
from emolab.sessions.manifest import read_manifest
from emolab.tracking.runs import open_tracker
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
    if trained.best_macro_f1 is not None:
        report(
            f"best validation macro-F1 {trained.best_macro_f1:.4f} (class prior accuracy {manifest.class_prior:.4f})"
        )
    report(f"model   {trained.folder / 'model'}\nrun     {trained.run_id}\nlook    {tracker.instructions()}")
    if settings.register_as and tracker.uri:
        version = register(
            trained.folder / "model", settings.register_as, run_id=trained.run_id, tracking_uri=tracker.uri
        )
        report(f"version {version.uri} (alias challenger)")
    return trained


def progress_line(epoch: EpochReport, settings: TrainSettings) -> str:
    """One epoch in one line."""
    score = "" if epoch.validation_macro_f1 is None else f"  validation macro-F1 {epoch.validation_macro_f1:.4f}"
    return (
        f"epoch {epoch.epoch:3d}/{settings.training.epochs}  loss {epoch.train_loss:.4f}{score}  "
        f"{epoch.sessions_per_second:.0f} sessions/s"
    )
