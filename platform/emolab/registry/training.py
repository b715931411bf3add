"""jobs/train.py: train, report, and register where asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from emolab.cluster import connected
from emolab.registry.destinations import check_destinations
from emolab.registry.lookup import ModelVersion
from emolab.registry.versions import register
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.visibility import check_visible
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import Tracker
from emolab.training.metrics import EpochReport
from emolab.training.readiness import check_data, check_memory, check_room
from emolab.training.recipe import ModelSettings, TrainSettings
from emolab.training.train import TrainedModel, finished_before, run_folder, train


def train_and_register(settings: TrainSettings, *, dry_run: bool, report: Callable[[str], None]) -> TrainedModel | None:
    """Train the configured model; with ``register_as`` it becomes a version with the alias challenger.

    Everything that can be known before is checked before; a run that is finished needs neither data nor workers.

    Raises:
        UserError: as ``train`` and ``register``.
    """
    manifest = read_manifest(Path(settings.data))
    check_destinations(settings)
    finished = finished_before(run_folder(settings, manifest))
    with connected() if settings.workers.count > 1 and not finished else nullcontext():
        if not finished:
            _check_work(settings, manifest)
        report(
            f"{settings.run_name(manifest.digest)}: {settings.model.name} on {settings.data} "
            f"({manifest.splits['train'].sessions} sessions), at most {settings.training.epochs} epochs, "
            f"{settings.workers.count} worker(s)"
        )
        if not finished and _is_slow_here(settings):
            sys.stderr.write(
                "the paper's size, without a GPU: this takes long; --preset small is sized for CPU cores\n"
            )
        if dry_run:
            if finished:
                report(f"finished before: {_NOTHING_LEFT}")
            return None
        return _train_and_register(settings, manifest, report)


_NOTHING_LEFT = "nothing is left to train, and the data are not read again"


def _is_slow_here(settings: TrainSettings) -> bool:
    """Whether the model is of the size that it has where nobody chooses one, and only CPUs are there for it."""
    return settings.model == ModelSettings() and not settings.workers.gpus and not torch.cuda.is_available()


def _check_work(settings: TrainSettings, manifest: Manifest) -> None:
    if settings.workers.count > 1:
        fewest = settings.workers.minimum or settings.workers.count
        check_room(settings.workers, count=fewest, purpose=f"training with {fewest} workers")
        check_visible(Path(settings.data))
    else:  # here, where else only its workers are
        check_memory(settings, manifest)
    check_data(settings, manifest)


def _train_and_register(settings: TrainSettings, manifest: Manifest, report: Callable[[str], None]) -> TrainedModel:
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    trained = train(
        settings,
        tracker=tracker,
        report=lambda epoch: report(progress_line(epoch, settings)),
        resuming=lambda epoch: report(resuming_line(epoch, settings)),
    )
    if trained.resumed_finished:
        report(f"finished before, after {trained.progress.epoch} epochs: {_NOTHING_LEFT}")
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


def resuming_line(epoch: int, settings: TrainSettings) -> str:
    """From where a training that was broken off goes on."""
    return f"resuming after epoch {epoch} of {settings.training.epochs}"


def progress_line(epoch: EpochReport, settings: TrainSettings) -> str:
    """One epoch in one line."""
    score = "" if epoch.validation_macro_f1 is None else f"  validation macro-F1 {epoch.validation_macro_f1:.4f}"
    return (
        f"epoch {epoch.epoch:3d}/{settings.training.epochs}  loss {epoch.train_loss:.4f}{score}  "
        f"{epoch.sessions_per_second:.0f} sessions/s"
    )
