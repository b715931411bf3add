"""The same loop under Ray Train: DDP workers fed by Ray Data. The only module that knows Ray Train."""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model

from emolab.checkpoint import CheckpointFolder
from emolab.cluster import API_SERVER, user_error, worker_environment
from emolab.remote_checkpoints import run_checkpoints
from emolab.sessions.manifest import read_manifest
from emolab.training.datasets import from_datasets, shared_datasets
from emolab.training.loop import NonFiniteLossError, fit, run_to_end
from emolab.training.metrics import EpochReport
from emolab.training.processes import Workers
from emolab.training.readiness import check_room
from emolab.training.recipe import TrainSettings


def fit_distributed(
    settings: TrainSettings,
    folder: Path,
    *,
    callbacks: Sequence[ray.train.UserCallback] = (),
    report: Callable[[EpochReport], None] | None = None,
) -> None:
    """Train with ``settings.workers.count`` processes; the result is the newest checkpoint in ``folder``.

    Args:
        report: told of every epoch, in this process: no worker writes to the tracker, which several hosts must not do
            where it is a file.

    Raises:
        UserError: the cluster is too small, or the data are unusable.
        NonFiniteLossError: as in the loop.
    """
    plan = settings.workers
    fewest = plan.minimum or plan.count
    check_room(plan, count=fewest, purpose=f"training with {fewest} workers")
    _tell_controller()
    # Ray Train takes one report per poll, and by default polls every two seconds: short epochs would wait for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    data = Path(settings.data).resolve()
    datasets: dict[str, Any] = dict(shared_datasets(data, read_manifest(data)))
    trainer = _Trainer(
        _worker,
        train_loop_config={
            "settings": settings.model_dump(mode="json") | {"data": str(data)},
            "folder": str(folder.resolve()),
        },
        torch_config=TorchConfig(backend="nccl" if plan.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.count if fewest == plan.count else (fewest, plan.count),
            use_gpu=bool(plan.gpus),
            resources_per_worker=plan.resources(1),
        ),
        run_config=ray.train.RunConfig(
            name=f"{folder.name}-{os.urandom(3).hex()}",  # Ray Train's own records; what resumes is our checkpoint
            storage_path=str(folder.resolve() / "ray"),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=plan.max_failures),
            worker_runtime_env={"env_vars": worker_environment() | {"OMP_NUM_THREADS": str(max(1, int(plan.cpus)))}},
        ),
        datasets=datasets,
        # Not split here: batches are planned over all sessions, so that they do not depend on the number of workers.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    told = _followed(folder / EPOCHS, report) if report is not None else nullcontext()
    try:
        with told:
            trainer.fit()
    except Exception as error:
        raise _cause(error) from error


def _tell_controller() -> None:
    """Hand the dashboard's address on to Ray Train's controller, and so to its helper that frees what the workers of a
    stopped trial held. Where several Rays run on a machine the helper finds its own by nothing else, and ends: the CPUs
    stay taken, and the next trial waits for ever."""
    constants: Any = importlib.import_module("ray.train.v2._internal.constants")
    constants.ENV_VARS_TO_PROPAGATE.add(API_SERVER)


class _Trainer(TorchTrainer):
    """Ray Train's, which leaves Ctrl-C to the job.

    Its own handler waits for a controller that may have ended, begins a second Ray to ask for it, and stays in force
    after the training. A job that is interrupted disconnects from Ray, and that ends controller and workers.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        """Nothing: the interrupt reaches whoever waits for the training."""


EPOCHS = "ray/epochs.jsonl"
"""In a run's folder, beside Ray Train's own records: what the workers tell the process that waits for them."""
_LOOK_SECONDS = 0.5


@contextmanager
def _followed(file: Path, report: Callable[[EpochReport], None]) -> Iterator[None]:
    """Report every epoch that is added to the file in this block, while Ray Train holds the calling thread.

    Ray Train tells results to its controller, another process, and to the caller only at the end.
    """
    begin, ended = file.stat().st_size if file.exists() else 0, threading.Event()
    failures: list[Exception] = []

    def follow() -> None:
        place, last = begin, False
        try:
            while not last:
                last = ended.wait(_LOOK_SECONDS)  # once more after the end: the last epoch is told as well
                lines = _lines_after(file, place)
                place += sum(map(len, lines))
                for line in lines:
                    report(EpochReport(**json.loads(line)))
        except Exception as error:  # raised where the training's caller is, when it has ended
            failures.append(error)

    thread = threading.Thread(target=follow, name="epochs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]


def _tell(epoch: EpochReport, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(epoch)) + "\n")


def trained_epochs(folder: Path) -> list[EpochReport]:
    """All epochs that a training in this folder has come through, whatever became of their reports."""
    newest = CheckpointFolder(folder / "checkpoints").newest()
    return [] if newest is None else [EpochReport(**report) for report in newest.state["reports"]]


def _lines_after(file: Path, place: int) -> list[bytes]:
    """Whole lines from a place on; what is still being written is left for the next look."""
    if not file.exists():
        return []
    with file.open("rb") as content:
        content.seek(place)
        return [line for line in content.readlines() if line.endswith(b"\n")]


def _worker(config: dict[str, Any]) -> None:
    """What every worker runs."""
    settings = TrainSettings.model_validate(config["settings"])
    context = ray.train.get_context()
    workers = Workers(rank=context.get_world_rank(), count=context.get_world_size(), device=get_device())
    manifest = read_manifest(Path(settings.data))
    data = from_datasets(
        manifest,
        {
            split: ray.train.get_dataset_shard(split)
            for split in ("train", "validation")
            if manifest.split_shards(split)
        },
    )
    torch.manual_seed(settings.training.seed)
    model = settings.model.build(manifest).to(workers.device)
    epochs = fit(
        model,
        prepare_model(model),
        data,
        settings.training,
        workers=workers,
        checkpoints=run_checkpoints(settings.checkpoints, Path(config["folder"]), settings.key(manifest.digest)),
    )

    def report(epoch: EpochReport) -> None:
        if workers.rank == 0:
            _tell(epoch, Path(config["folder"]) / EPOCHS)
        ray.train.report({**epoch.metrics(), "finished": epoch.finished})

    run_to_end(epochs, report)


def _cause(error: BaseException) -> BaseException:
    """The loop's own error out of what Ray Train wraps around it."""
    found = _NON_FINITE.search(str(error))
    return NonFiniteLossError(found[1]) if found else user_error(error)


_NON_FINITE = re.compile(rf"{NonFiniteLossError.__name__}: (.*)")
