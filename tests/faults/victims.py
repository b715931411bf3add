"""What the victims do: the jobs themselves, with real trackers, studies and files. Imported once, then forked."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Imported here, once, and not in every victim: PyTorch's optimizers and MLflow's store come to these when first used.
import matplotlib.pyplot  # noqa: F401
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import ray.train
import torch
import torch._dynamo
from mlflow import MlflowClient
from tests.faults.killing import below
from tests.robustness.test_sweep import opened
from tests.sessions.staged_corpus import StagedCorpus

import emolab.reports.figures  # noqa: F401
from emolab.checkpoint import Checkpoint
from emolab.cluster import ClusterSettings, connected
from emolab.remote_checkpoints import RemoteCheckpoints, run_checkpoints
from emolab.robustness import sweep
from emolab.robustness.evaluator import Evaluator
from emolab.robustness.sweep_plan import SweepPlan
from emolab.sessions.manifest import read_manifest
from emolab.sessions.preparation import prepare
from emolab.sessions.work import WorkFolder
from emolab.studies.comparison import _parent_run as begin_comparison
from emolab.studies.comparison_settings import CompareSettings
from emolab.studies.preparation import _record as record_preparation
from emolab.studies.robustness import RobustnessSettings
from emolab.studies.robustness import _run as begin_sweep
from emolab.tracking.runs import open_tracker
from emolab.training.recipe import TrainSettings
from emolab.training.train import _claim as claim
from emolab.training.train import train
from emolab.tuning.search import _parent_run as begin_search
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import read_space

Say = Callable[[Any], None]


def training(settings: dict[str, Any], say: Say) -> None:
    """Train in this process, with checkpoints and an SQLite tracker; says every epoch that was recorded."""
    parsed = TrainSettings.model_validate(settings)
    tracker = open_tracker(**parsed.tracking.model_dump(), output=Path(parsed.output))
    say("began")
    train(parsed, tracker=tracker, report=lambda report: say(report.epoch))


def saving(place: str, folder: str, at: int | None, say: Say) -> None:
    """Save twenty checkpoints into a store, after those that are there; dies before the n-th object is written."""
    checkpoints = run_checkpoints(place, Path(folder), "test")
    put, counter = RemoteCheckpoints._put, itertools.count(1)

    def count(self: RemoteCheckpoints, path: str, content: bytes) -> None:
        if next(counter) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, path, content)

    RemoteCheckpoints._put = count
    newest = checkpoints.newest()
    first = newest.state["epoch"] + 1 if newest else 1
    for epoch in range(first, first + 20):
        checkpoints.save(epoch, numbered(epoch))
        say(epoch)


def numbered(epoch: int) -> Checkpoint:
    """A checkpoint all of which tells its epoch."""
    tensors = {name: {"w": torch.full((20_000,), float(epoch))} for name in ("model", "best")}
    return Checkpoint(tensors=tensors, state={"epoch": epoch})


def training_together(settings: dict[str, Any], address: str, say: Say) -> None:
    """Train with several workers on a cluster that is there already."""
    with _on(address):
        training(settings, say)


def beginning(job: str, data: str, output: str, uri: str, at: str, say: Say) -> None:
    """Begin the tracked run of a job's folder, as the job itself does, and say its id; dies at the instant given.

    ``answered``: the tracker has begun the run, and nobody here knows yet. Otherwise the beginning of a file's name:
    the process dies when it is about to open that file.
    """
    folder = Path(output) / job
    tracker: Any = open_tracker(enabled=True, uri=uri, experiment=Path(output).name, output=Path(output))
    manifest, create = read_manifest(Path(data)), MlflowClient.create_run
    folder.mkdir(parents=True, exist_ok=True)

    def die_answered(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        create(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_opening(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and Path(str(arguments[0])).name.startswith(at):
            os.kill(os.getpid(), signal.SIGKILL)

    if at == "answered":
        MlflowClient.create_run = die_answered
    elif at:
        sys.addaudithook(die_opening)
    plan = SimpleNamespace(folder=folder, manifest=manifest, cells=())
    match job:
        case "training":
            settings: Any = TrainSettings.model_validate({"data": data, "output": output})
            run = claim(folder, settings, manifest, tracker, parent=None, tags={})
        case "search":
            settings = TuneSettings.model_validate({"data": data, "output": output})
            plan.space = read_space(Path(settings.tuning.space), settings.base())
            run = begin_search(settings, plan, tracker, computes=True)
        case "comparison":
            run = begin_comparison(CompareSettings.model_validate({"data": data, "output": output}), plan, tracker)
        case "sweep":
            plan.plan, plan.models = SweepPlan(models=(), data=Path(data), split="test", cells=(), units=()), ()
            settings = RobustnessSettings.model_validate({"data": data, "output": output})
            run = begin_sweep(settings, plan, tracker, computes=True)
        case _:
            record_preparation(tracker, Path(data), manifest)
            run = tracker.resume(tracker.find("emolab.kind", "data")[0])
    say(run.run_id)
    tracker.close()


def training_elastically(settings: dict[str, Any], address: str, say: Say) -> None:
    """The same, where Ray looks for room to grow every second instead of every minute."""
    ray.train.ScalingConfig = partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1.0)
    training_together(settings, address, say)


def searching(settings: dict[str, Any], address: str, say: Say) -> None:
    """Search on a cluster that is there already; says every line of its report."""
    parsed = TuneSettings.model_validate(settings)
    with _on(address):
        search(parsed, open_tracker(**parsed.tracking.model_dump(), output=Path(parsed.output)), report=say)


def reading(source: str, output: str, say: Say) -> None:
    """Read recordings into the work folder one after another, as a preparation's workers do."""
    corpus, work = StagedCorpus(source=source, staged=False), WorkFolder(Path(output))
    work.claim(corpus)
    references = corpus.references()
    finished = work.finished(corpus, references)
    say(sorted(finished))
    for reference in references:
        if reference.session_id not in finished:
            work.add(corpus, reference, corpus.load(reference))
            say(reference.session_id)


def preparing(source: str, output: str, address: str, seconds: float, stall_seconds: float, say: Say) -> None:
    """Prepare recordings, each of which takes so many seconds, on a cluster that is there already."""
    corpus = StagedCorpus(source=source, seconds=seconds)
    with _on(address):
        prepare(corpus, Path(output), seed=0, shard_sessions=16, stall_seconds=stall_seconds, report=say)


def evaluating(plan: SweepPlan, folder: str, say: Say) -> None:
    """Compute the units of a sweep that are missing, as one of its actors does; says every unit that is written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(plan.data, plan.split, Path(folder), opened(), "cpu")
    for unit in sweep.missing_units(plan, Path(folder), report=lambda _: None):
        cells = [plan.cells[index] for index in unit.cells]
        evaluator.work(unit, plan.models[unit.model], cells, bfloat16=plan.bfloat16)
        say(unit.file)


def sweeping(plan: SweepPlan, folder: str, address: str, say: Say) -> None:
    """A whole sweep on a cluster that is there already."""
    with _on(address):
        sweep.run_sweep(plan, Path(folder), report=say, actors=2, opening=opened)


def hosting(orders: Connection, say: Say) -> None:
    """Hold a cluster of several nodes, each with one CPU and a raylet of its own, and add or lose nodes as told."""
    from ray.cluster_utils import Cluster

    # Quick to notice that a node is gone, and patient with one that is only slow.
    checks = {"health_check_period_ms": 500, "health_check_timeout_ms": 20_000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    say(cluster.address)
    try:
        while (order := orders.recv()) is not None:
            action, name = order
            if action == "add":
                nodes[name] = cluster.add_node(num_cpus=1)
            else:
                name = name if action == "lose" else host_of(int(name), nodes)
                lose(cluster, nodes.pop(name))
            say(name)
    finally:
        cluster.shutdown()


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def host_of(process: int, nodes: Mapping[str, Any]) -> str:
    return next(name for name, node in nodes.items() if process in below(raylet(node)))


def lose(cluster: Any, node: Any) -> None:
    """A machine that is gone: its raylet and all that runs below it, by SIGKILL. Returns when the cluster has missed
    it, since what starts next must not count on it."""
    for process in [raylet(node), *below(raylet(node))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while node.plasma_store_socket_name in alive(cluster):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(cluster: Any) -> set[str]:
    """The nodes that a cluster takes for alive, by the name of their object store's socket."""
    return {node["ObjectStoreSocketName"] for node in cluster.global_state.node_table() if node["Alive"]}


@contextlib.contextmanager
def _on(address: str) -> Any:
    with contextlib.redirect_stderr(io.StringIO()), connected(ClusterSettings(address=address)):
        yield
