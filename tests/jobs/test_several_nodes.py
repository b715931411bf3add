"""What fits a cluster of several nodes: a process lies on one of them, whatever they hold together.

One cluster for all of it, in a process of its own, each node with a raylet of its own on this machine: a head without
CPUs, two nodes with three CPUs each, and one with a GPU and no CPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import pytest
import ray
from ray.cluster_utils import Cluster
from tests.conftest import REPOSITORY
from tests.training.test_loop import settings_for
from tests.tuning.test_search import tune_settings

from emolab.cluster import ClusterSettings, cluster_gpus, connected, room
from emolab.names import UserError
from emolab.robustness.sweep import run_sweep
from emolab.robustness.sweep_plan import SweepPlan, Unit
from emolab.studies.comparison import plan_comparison
from emolab.studies.comparison_settings import CompareSettings
from emolab.training.distributed import fit_distributed
from emolab.training.readiness import check_room
from emolab.training.recipe import TrainSettings, WorkerSettings
from emolab.tuning.plan import plan_search
from emolab.tuning.settings import TuneSettings

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.scenario, pytest.mark.timeout(600)]
SECONDS = 60


def train_settings(data: Path, folder: Path, **workers: Any) -> TrainSettings:
    settings = settings_for(data, folder, epochs=1)
    return settings.model_copy(update={"workers": WorkerSettings.model_validate(workers)})


def search_settings(data: Path, folder: Path, *, cpus: float, **tuning: Any) -> TuneSettings:
    workers = WorkerSettings.model_validate({"cpus": cpus})
    return tune_settings(data, folder, **tuning).model_copy(update={"workers": workers})


def a_final_that_fits_the_sum_alone(data: Path, folder: Path) -> object:
    return plan_search(search_settings(data, folder, cpus=2.0, final_workers=3)).final_workers


def a_final_of_as_many_workers_as_fit(data: Path, folder: Path) -> object:
    return plan_search(search_settings(data, folder, cpus=2.0, final_workers=None)).final_workers


def a_training_that_fits_the_sum_alone(data: Path, folder: Path) -> object:
    return fit_distributed(train_settings(data, folder, count=3, cpus=2.0), folder / "training")


def many_workers_of_a_fifth_of_a_processor(data: Path, folder: Path) -> object:
    """Thirty are six CPUs; 3 // 0.2 is 14."""
    plan = search_settings(data, folder, cpus=0.2, final_workers=30, concurrency=None, trials=64)
    return plan_search(plan).concurrency


def a_comparison_on_a_node_without_processors(data: Path, folder: Path) -> object:
    return plan_comparison(CompareSettings.model_validate({"data": str(data), "output": str(folder), "gpus": 0.25}))


def a_sweep_on_a_node_without_processors(data: Path, folder: Path) -> object:
    unit = Unit(model=0, sessions=range(1), cells=range(0), file="unit")
    plan = SweepPlan(models=(folder,), data=data, split="test", cells=(), units=(unit,), gpus=0.25)
    return run_sweep(plan, folder / "sweep", report=print, stall_seconds=5)


def a_training(data: Path, folder: Path) -> object:
    return check_room(WorkerSettings(count=2), count=2, purpose="training with 2 workers")


def processes_of_two_processors(data: Path, folder: Path) -> object:
    return room({"CPU": 2.0}, purpose="a process")


def a_process_larger_than_any_node(data: Path, folder: Path) -> object:
    return room({"CPU": 4.0}, purpose="a process")


def more_processors_than_it_grows_to(data: Path, folder: Path) -> object:
    return room({"CPU": 1.0}, purpose="a process", count=7)


def gpus(data: Path, folder: Path) -> object:
    return cluster_gpus()


ON_A_GROWING_CLUSTER = (
    a_training,
    processes_of_two_processors,
    a_process_larger_than_any_node,
    more_processors_than_it_grows_to,
    gpus,
)
CASES = (
    a_final_that_fits_the_sum_alone,
    a_final_of_as_many_workers_as_fit,
    many_workers_of_a_fifth_of_a_processor,
    a_comparison_on_a_node_without_processors,
    a_sweep_on_a_node_without_processors,
    a_training_that_fits_the_sum_alone,
)


def answer(case: Callable[[], object]) -> str:
    """What comes of a case, or its refusal; a case that waits for what never comes is interrupted."""

    def interrupt(*_: object) -> NoReturn:
        raise TimeoutError

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    try:
        return str(case())
    except UserError as error:
        return f"UserError: {error}"
    except TimeoutError:
        return "waits for ever"
    finally:
        signal.alarm(0)


def a_search_over_data_that_a_node_does_not_see(data: Path, folder: Path) -> object:
    return plan_search(search_settings(data, folder, cpus=1.0)).concurrency


OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def may_hide() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode


@contextmanager
def blind_node(address: str, data: Path) -> Iterator[None]:
    """A node with a mount table of its own, in which the folder of the data set is empty."""
    start = f"{Path(sys.executable).parent / 'ray'} start --address={address} --num-cpus=1 --node-name=blind --block"
    hide = [*OWN_MOUNTS, "sh", "-c", f'mount -t tmpfs none "$0" && exec {start}']
    before = len(ray.nodes())
    node = subprocess.Popen([*hide, str(data)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while len(ray.nodes()) == before and node.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        yield
    finally:
        node.terminate()
        node.wait()


@contextmanager
def growing(address: str) -> Iterator[None]:
    """The cluster is said to have an autoscaler that may add what is added later."""
    os.environ["EMOLAB_GROWS_TO"] = "[{nodes: 2, cpus: 3}, {nodes: 1, cpus: 0, gpus: 1}]"
    try:
        with connected(ClusterSettings(address=address)):
            yield
    finally:
        del os.environ["EMOLAB_GROWS_TO"]


def ask_all(data: str, folder: str) -> None:
    """The process: every case on one cluster, and the answers into a file."""
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    said: dict[str, str] = {}

    def ask(when: str, cases: Iterable[Callable[[Path, Path], object]]) -> None:
        said.update({when + case.__name__: answer(partial(case, Path(data), Path(folder))) for case in cases})

    try:
        with connected(ClusterSettings(address=cluster.address)):
            ask("idle: ", [a_training])
            with growing(cluster.address):
                ask("growing: ", ON_A_GROWING_CLUSTER)
                settings, place = train_settings(Path(data), Path(folder), count=2), Path(folder) / "waiting"
                training = Thread(target=copy_context().run, args=(fit_distributed, settings, place), daemon=True)
                training.start()
                time.sleep(3)
                for resources in ({"num_cpus": 3}, {"num_cpus": 3}, {"num_cpus": 0, "num_gpus": 1}):
                    cluster.add_node(**resources)
                training.join(timeout=200)
                said["waiting"] = str(len(list((place / "checkpoints").glob("epoch-*"))))
                ask("grown: ", ON_A_GROWING_CLUSTER)
            ask("", CASES)
            if may_hide():
                with blind_node(cluster.address, Path(data)):
                    ask("", [a_search_over_data_that_a_node_does_not_see])
    finally:
        cluster.shutdown()
    (Path(folder) / "said.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def said(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("nodes")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(REPOSITORY / p) for p in ("platform", "model", ""))}
    script = f"from tests.jobs.test_several_nodes import ask_all; ask_all({str(toy_data)!r}, {str(folder)!r})"
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=REPOSITORY, check=True, timeout=500)
    return json.loads((folder / "said.json").read_text())


def test_workers_that_fit_the_sum_of_the_nodes_alone_are_refused(said: dict[str, str]) -> None:
    reason = "a worker needs 2 CPU and 0 GPU of one node, and the nodes together have room for 2 of 3"
    purpose = "training the best configuration with 3 workers"
    assert said["a_final_that_fits_the_sum_alone"] == f"UserError: {purpose} cannot run here: {reason}"
    assert said["a_final_of_as_many_workers_as_fit"] == "2"
    assert said["a_training_that_fits_the_sum_alone"] == f"UserError: training with 3 workers cannot run here: {reason}"


def test_small_shares_of_processors_are_counted_as_ray_counts_them(said: dict[str, str]) -> None:
    assert said["many_workers_of_a_fifth_of_a_processor"] == "30"


@pytest.mark.parametrize(
    ("case", "purpose"),
    [
        ("a_comparison_on_a_node_without_processors", "a cell of the comparison"),
        ("a_sweep_on_a_node_without_processors", "a robustness sweep"),
    ],
)
def test_processors_of_one_node_and_the_gpu_of_another_are_no_room(
    said: dict[str, str], case: str, purpose: str
) -> None:
    assert said[case] == (
        f"UserError: {purpose} cannot run here: a worker needs 1 CPU and 0.25 GPU of one node, and the largest node "
        "has 0 CPU and 1 GPU"
    )


def test_an_idle_cluster_is_too_small_unless_it_is_said_to_grow(said: dict[str, str]) -> None:
    refused = "UserError: training with 2 workers cannot run here: 2 CPU needed, 0 in the cluster"
    assert said["idle: a_training"] == refused
    for when in ("growing: ", "grown: "):  # a node that has come is not counted twice
        assert said[when + "a_training"] == "None"
        assert said[when + "processes_of_two_processors"] == "2"
        assert said[when + "gpus"] == "1"
        assert "the largest node has 3 CPU and 0 GPU" in said[when + "a_process_larger_than_any_node"]
        assert "7 CPU needed, 6 in the cluster at its largest" in said[when + "more_processors_than_it_grows_to"]


def test_a_training_waits_for_the_nodes_that_its_cluster_grows_by(said: dict[str, str]) -> None:
    assert said["waiting"] == "1"


@pytest.mark.skipif(not may_hide(), reason="a process may not have a mount table of its own here")
def test_a_node_that_does_not_see_the_data_is_named_before_anything_starts(
    said: dict[str, str], toy_data: Path
) -> None:
    assert said["a_search_over_data_that_a_node_does_not_see"] == (
        f"UserError: {toy_data} is not to be seen from node blind: put it on storage that all nodes share, at one path"
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [("8", "a list"), ("[{nodes: 8}]", "0.cpus: is missing"), ("[{nodes: 8, cpus: x}]", "0.cpus: "), ("[", "no YAML")],
)
def test_a_growth_that_cannot_be_read_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., None], said: str, reason: str
) -> None:
    monkeypatch.setenv("EMOLAB_GROWS_TO", said)
    with pytest.raises(UserError) as error, connected(ClusterSettings(address="127.0.0.1:1")):
        pytest.fail()
    one_line(error, f"EMOLAB_GROWS_TO={said}: ", reason, "use a list such as [{nodes: 8, cpus: 4}]")
