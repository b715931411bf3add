"""One tracked training run from configuration to kept weights; what jobs/train.py, tuning and comparisons call."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emolab import checkpoint
from emolab.checkpoint import Checkpoint, Checkpoints
from emolab.cluster import ClusterSettings, connected
from emolab.configuration import to_yaml
from emolab.locks import HOLDER, LOCK, holding
from emolab.names import UserError, contained
from emolab.redaction import redacted
from emolab.remote_checkpoints import run_checkpoints
from emolab.sessions.manifest import Manifest, manifest_text, read_manifest, write_atomically
from emolab.tracking.beginning import CODE, CONFIGURATION, KEY_FILE, folder_run, own_record, read_record, write_record
from emolab.tracking.tracker import Run, Tracker
from emolab.training.data import load_training_data
from emolab.training.loop import NonFiniteLossError, Outcome, Progress, fit, run_to_end
from emolab.training.metrics import EpochReport
from emolab.training.processes import Workers
from emolab.training.recipe import TrainSettings, check_selection

_ANOTHER_RUN = "a run with another configuration"
_OWN = {LOCK, HOLDER, CODE, CONFIGURATION, "checkpoints", "model", "ray", "curves.svg"}
"""What lies in a run's folder beside its record and its key, which may have been taken away."""
TOLD = "told"
"""Key of a run's record that is true once the tracker has all of a finished run."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A finished run."""

    folder: Path
    """Holds config.yaml, checkpoints/, and model/ with the kept weights."""
    run_id: str
    manifest: Manifest
    progress: Progress
    resumed_finished: bool = False
    """Whether all of it had been done by an earlier call."""

    @property
    def best_macro_f1(self) -> float | None:
        return self.progress.best_macro_f1 if self.progress.best_macro_f1 >= 0 else None


def train(
    settings: TrainSettings,
    *,
    tracker: Tracker | None = None,
    parent: str | None = None,
    tags: dict[str, str] | None = None,
    report: Callable[[EpochReport], None] = lambda _: None,
    resuming: Callable[[int], None] | None = None,
    cluster: ClusterSettings | None = None,
    patience: float = 0.0,
) -> TrainedModel:
    """Train, or go on with, the run that the settings name.

    Args:
        report: told of every epoch, in this process, whoever trains.
        resuming: told of the epoch after which a training that was broken off goes on.
        patience: seconds to wait where another process, which is expected to end, trains this run.

    Raises:
        UserError: unusable data, configuration or cluster; another process trains this run; its folder is another's.
        NonFiniteLossError: the loss became NaN; the run is marked FAILED with epoch and step.
    """
    manifest = read_manifest(Path(settings.data))
    check_selection(settings.training, manifest, data=settings.data)
    output = Path(settings.output)
    if tracker is None:
        from emolab.tracking.runs import open_tracker  # a second of MLflow that workers and trials never need

        tracker = open_tracker(**settings.tracking.model_dump(), output=output)
    folder = run_folder(settings, manifest)
    with holding(folder, what="run", patience=patience):
        checkpoints = run_checkpoints(settings.checkpoints, folder, settings.key(manifest.digest))
        run = _claim(folder, settings, manifest, tracker, parent=parent, tags=tags or {})
        finished = _finished(folder, checkpoints)
        if finished is not None:
            return TrainedModel(
                folder=folder, run_id=run.run_id, manifest=manifest, progress=finished, resumed_finished=True
            )
        return _train(settings, manifest, folder, checkpoints, run, report=report, resuming=resuming, cluster=cluster)


def run_folder(settings: TrainSettings, manifest: Manifest) -> Path:
    """The folder of the run that the settings name, there already or not.

    Raises:
        UserError: the name is none, or the folder holds something else.
    """
    folder = contained(Path(settings.output), settings.run_name(manifest.digest), what="run name")
    known = own_record(folder, _identity(settings, manifest), holds=_ANOTHER_RUN)
    if known is not None or (folder / KEY_FILE).exists() or not folder.exists():
        return folder
    strangers = sorted({entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} - _OWN)
    if strangers:
        raise UserError(f"{folder} is not empty and holds no run ({strangers[0][:60]}): choose another name")
    return folder


def finished_before(folder: Path) -> bool:
    """Whether the run of a folder has its kept weights, and its tracker everything about it."""
    return (folder / "model" / checkpoint.MANIFEST).exists() and bool((read_record(folder) or {}).get(TOLD))


def _train(
    settings: TrainSettings,
    manifest: Manifest,
    folder: Path,
    checkpoints: Checkpoints,
    run: Run,
    *,
    report: Callable[[EpochReport], None],
    resuming: Callable[[int], None] | None,
    cluster: ClusterSettings | None,
) -> TrainedModel:
    def record(epoch: EpochReport) -> None:
        run.log_metrics(epoch.metrics(), step=epoch.epoch)
        report(epoch)

    try:
        if resuming is not None and (newest := checkpoints.newest()) is not None:
            resuming(Progress.from_state(newest.state).epoch)
        if settings.workers.count > 1:
            from emolab.training.distributed import fit_distributed

            with connected(cluster):
                fit_distributed(settings, folder, report=record)
            outcome = _newest(folder, checkpoints)
        else:
            outcome = run_to_end(epochs_in_process(settings, checkpoints=checkpoints), record)
    except NonFiniteLossError as error:
        run.set_tags({"failure": str(error)})
        run.finish("FAILED")
        raise
    except BaseException:
        run.finish("KILLED")
        raise
    for past in outcome.progress.reports:  # also of epochs that were saved by a process that died before it told them
        run.log_metrics(EpochReport(**past).metrics(), step=int(past["epoch"] or 0))  # pyright: ignore[reportArgumentType]
    _keep(outcome, folder, settings, manifest, run)
    run.finish()
    _note_told(folder)
    return TrainedModel(folder=folder, run_id=run.run_id, manifest=manifest, progress=outcome.progress)


def epochs_in_process(
    settings: TrainSettings, *, checkpoints: Checkpoints | None = None
) -> Generator[EpochReport, None, Outcome]:
    """The loop in this process, with one worker and no tracker: an iterator over its epochs."""
    data = load_training_data(Path(settings.data))
    check_selection(settings.training, data.manifest, data=settings.data)
    torch.manual_seed(settings.training.seed)
    device = training_device(settings)
    model = settings.model.build(data.manifest).to(device)
    return fit(
        model,
        model,
        data,
        settings.training,
        workers=Workers(device=device),
        checkpoints=checkpoints,
    )


def training_device(settings: TrainSettings) -> torch.device:
    """Where one worker trains."""
    return torch.device("cuda" if settings.workers.gpus and torch.cuda.is_available() else "cpu")


def load_model(folder: Path) -> tuple[torch.nn.Module, Checkpoint]:
    """A kept model (the ``model/`` folder of a run) with its description, in evaluation mode."""
    from emolab.training.recipe import ModelSettings

    saved = checkpoint.load(folder)
    manifest = Manifest.model_validate(saved.state["dataset"])
    model = ModelSettings.model_validate(saved.state["model"]).build(manifest)
    model.load_state_dict(saved.tensors["model"])
    return model.eval(), saved


def _claim(
    folder: Path,
    settings: TrainSettings,
    manifest: Manifest,
    tracker: Tracker,
    *,
    parent: str | None,
    tags: dict[str, str],
) -> Run:
    """Begin or resume the run of a folder; a folder belongs to one configuration for ever."""

    def describe(run: Run) -> None:
        parameters = flatten(settings.identity()) | {"data": settings.data, "workers": settings.workers.count}
        run.log_parameters(redacted(parameters))
        run.log_text(to_yaml(settings), CONFIGURATION)
        run.log_text(manifest_text(manifest), "dataset.json")
        write_atomically(folder / CONFIGURATION, to_yaml(settings).encode())

    return folder_run(
        tracker,
        folder,
        _identity(settings, manifest),
        holds=_ANOTHER_RUN,
        describe=describe,
        parent=parent,
        tags={"emolab.dataset": manifest.digest, "emolab.kind": "train"} | tags,
        computes=not finished_before(folder),
    )


def _identity(settings: TrainSettings, manifest: Manifest) -> dict[str, Any]:
    return settings.identity() | {"dataset": manifest.digest}


def _finished(folder: Path, checkpoints: Checkpoints) -> Progress | None:
    """How a run ended whose kept weights are there and undamaged; None where there is work left."""
    if not finished_before(folder):
        return None
    progress = _newest(folder, checkpoints).progress
    checkpoint.load(folder / "model")
    return progress if progress.finished else None


def _note_told(folder: Path) -> None:
    """Remember that the tracker was told everything: a run that is killed before that tells it again."""
    write_record(folder, (read_record(folder) or {}) | {TOLD: True})


def _newest(folder: Path, checkpoints: Checkpoints) -> Outcome:
    newest = checkpoints.newest()
    if newest is None:
        raise UserError(f"no valid checkpoint of {folder}: the run left none behind")
    return Outcome(weights=newest.tensors["best"], progress=Progress.from_state(newest.state))


def _keep(outcome: Outcome, folder: Path, settings: TrainSettings, manifest: Manifest, run: Run) -> None:
    """Write the kept weights with all that is needed to use them, and record them."""
    state = {
        "model": settings.model.model_dump(mode="json"),
        "training": settings.training.model_dump(mode="json"),
        "dataset": manifest.model_dump(mode="json"),
        "dataset_digest": manifest.digest,
        "run_id": run.run_id,
        "best_epoch": outcome.progress.best_epoch,
        "best_macro_f1": outcome.progress.best_macro_f1,
    }
    checkpoint.save(folder / "model", Checkpoint(tensors={"model": outcome.weights}, state=state))
    parameters = sum(value.numel() for value in outcome.weights.values())
    run.log_metrics(
        {
            "final_best_macro_f1": outcome.progress.best_macro_f1,
            "epochs_run": outcome.progress.epoch,
            "parameters": parameters,
        },
        step=outcome.progress.epoch,
    )
    run.log_file(folder / "model", folder="model")
    run.log_json(list(outcome.progress.reports), "history.json")
    from emolab.reports.figures import training_curves  # Matplotlib: only where a run ends, not in every worker

    write_atomically(folder / "curves.svg", training_curves(outcome.progress.reports))
    run.log_file(folder / "curves.svg")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``a.b`` keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
