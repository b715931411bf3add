"""A cluster of several nodes that loses one half-way: what comes out is what an undisturbed cluster gives.

Every node is a raylet of its own on this machine. A lost one is killed with everything that runs below it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults import victims as jobs
from tests.faults.killing import Ended, Trigger, Victim, Victims
from tests.faults.test_preparation_kills import Recordings, recordings  # noqa: F401  # a fixture
from tests.faults.test_sweep_kills import Sweep, planned  # noqa: F401  # a fixture
from tests.faults.test_training_kills import recorded
from tests.faults.test_tuning_kills import job as search_job
from tests.robustness.test_sweep import contents
from tests.training.test_loop import settings_for

from emolab.checkpoint import CheckpointFolder
from emolab.sessions.shards import sha256
from emolab.tracking.tracker import NoTracker
from emolab.training.recipe import WorkerSettings
from emolab.tuning.search import search

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]


class Nodes:
    """A cluster whose head holds no CPU, and its nodes of one CPU each."""

    def __init__(self, victims: Victims, root: Path) -> None:
        receiver, self._orders = multiprocessing.Pipe(duplex=False)
        self._host = victims.start(jobs.hosting, receiver, trigger=Trigger(folder=str(root)))
        assert self._host.heard(1)
        self.address = self._host.said[0]
        self._names: list[str] = []

    def add(self, name: str) -> None:
        self._order(("add", name))
        self._names.append(name)

    def lose(self, name: str) -> None:
        self._order(("lose", name))
        self._names.remove(name)

    def are(self, *names: str) -> None:
        """Exactly these nodes."""
        for name in set(self._names) - set(names):
            self.lose(name)
        for name in sorted(set(names) - set(self._names)):
            self.add(name)

    def _order(self, order: tuple[str, str]) -> None:
        heard = len(self._host.said)
        self._orders.send(order)
        assert self._host.heard(heard + 1)

    def close(self) -> None:
        self._orders.send(None)
        self._host.wait()


@pytest.fixture(scope="module")
def nodes(ray_cluster: None, victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster = Nodes(victims, tmp_path_factory.mktemp("nodes"))
    yield cluster
    cluster.close()


Record = Callable[..., None]


def ended(victim: Victim) -> Ended:
    result = victim.wait()
    assert not result.killed and not result.error, result
    return result


def test_a_search_that_loses_a_node_ends_with_the_same_table(
    nodes: Nodes, toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Record
) -> None:
    """Two processes on two nodes, then one: trials are drawn in order, so who runs them changes nothing."""

    def table(folder: Path) -> list[Any]:
        """The study's table; a search that is over already runs nothing."""
        records = search(search_job(toy_data, folder, concurrency=2), NoTracker()).records
        return [(r.number, r.state, r.parameters, r.value, r.epochs, r.curve, r.reason) for r in records]

    expected = table(tmp_path / "clean")
    nodes.are("a", "b")
    settings = search_job(toy_data, tmp_path / "lost", concurrency=2).model_dump(mode="json")
    victim = victims.start(jobs.searching, settings, nodes.address, trigger=Trigger(folder=str(tmp_path)))
    assert victim.heard(3)
    nodes.lose("b")
    said = ended(victim).said
    assert sum(str(line).startswith("trial ") for line in said) == len(expected)
    assert table(tmp_path / "lost") == expected
    record_faults("tuning", "a node lost half-way", tried=1, survived=1)


def test_a_sweep_that_loses_a_node_ends_with_the_same_tables(
    nodes: Nodes,
    planned: Sweep,  # noqa: F811
    tmp_path: Path,
    victims: Victims,
    record_faults: Record,
) -> None:
    """Two actors on two nodes; the lost one's unit is done again on what is left, with no spare node to go to."""
    nodes.are("a", "b")
    victim = victims.start(
        jobs.sweeping, planned.plan, str(tmp_path / "units"), nodes.address, trigger=Trigger(folder=str(tmp_path))
    )
    assert victim.heard(4)
    nodes.lose("a")
    said = ended(victim).said
    assert len(said) == len(planned.plan.units)
    assert contents(tmp_path / "units") == contents(planned.unbroken)
    record_faults("sweeps", "a node lost half-way", tried=1, survived=1)


EPOCHS = 8


def training(data: Path, output: Path, name: str, **workers: Any) -> dict[str, Any]:
    settings = settings_for(data, output, model={"dropout": 0.0}, epochs=EPOCHS, patience=EPOCHS)
    plan = WorkerSettings.model_validate({"count": 2, "max_failures": 2} | workers)
    return settings.model_copy(update={"name": name, "workers": plan}).model_dump(mode="json")


def saved(folder: Path, epoch: int) -> None:
    """Wait until an epoch has its checkpoint."""
    deadline = time.monotonic() + 150
    while not (folder / "checkpoints" / f"epoch-{epoch:05d}" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, toy_data: Path, victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training with two workers that nothing happened to, under the name ``clean``."""
    output = tmp_path_factory.mktemp("undisturbed")
    nodes.are("a", "b")
    arguments = (training(toy_data, output, "clean"), nodes.address)
    ended(victims.start(jobs.training_together, *arguments, trigger=Trigger(folder=str(output))))
    return output


def test_training_that_loses_a_node_goes_on_with_the_spare_one_and_ends_with_the_same_bits(
    nodes: Nodes, undisturbed: Path, toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Record
) -> None:
    nodes.are("a", "b")
    arguments = (training(toy_data, tmp_path, "lost"), nodes.address)
    victim = victims.start(jobs.training_together, *arguments, trigger=Trigger(folder=str(tmp_path)))
    saved(tmp_path / "lost", 3)
    nodes.add("spare")
    nodes.lose("b")
    ended(victim)
    assert recorded(tmp_path, "lost") == recorded(undisturbed, "clean")
    weights = [sha256(output / "model" / "model.safetensors") for output in (tmp_path / "lost", undisturbed / "clean")]
    assert weights[0] == weights[1]
    record_faults("training", "a node lost, a spare one there", tried=1, survived=1)


def test_elastic_training_that_loses_a_node_goes_on_with_fewer_workers_and_the_same_batches(
    nodes: Nodes, undisturbed: Path, toy_data: Path, tmp_path: Path, victims: Victims, record_faults: Record
) -> None:
    nodes.are("a", "b")
    arguments = (training(toy_data, tmp_path, "elastic", minimum=1), nodes.address)
    victim = victims.start(jobs.training_together, *arguments, trigger=Trigger(folder=str(tmp_path)))
    saved(tmp_path / "elastic", 3)
    nodes.lose("b")
    ended(victim)
    newest = CheckpointFolder(tmp_path / "elastic" / "checkpoints").newest()
    assert newest is not None
    counts = [report["workers"] for report in newest.state["reports"]]
    assert counts[0] == 2 and counts[-1] == 1
    ours, theirs = recorded(tmp_path, "elastic"), recorded(undisturbed, "clean")
    assert ours.keys() == theirs.keys()
    for name in ("train_loss", "validation_loss"):  # the loss curve goes on as if nothing had happened
        assert [step for step, _ in ours[name]] == list(range(1, EPOCHS + 1))
        for (_, one), (_, other) in zip(ours[name], theirs[name], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    record_faults("training", "a node lost, no spare, elastic", tried=1, survived=1)


def test_a_preparation_that_loses_a_node_goes_on_when_another_comes_and_writes_the_same_bytes(
    nodes: Nodes,
    recordings: Recordings,  # noqa: F811
    tmp_path: Path,
    victims: Victims,
    record_faults: Record,
) -> None:
    nodes.are("a", "b")
    output = tmp_path / "data"
    arguments = (str(recordings.media), str(output), nodes.address)
    victim = victims.start(jobs.preparing, *arguments, trigger=Trigger(folder=str(output)))
    deadline = time.monotonic() + 120
    while len(list((output / ".unfinished" / "records").glob("s*"))) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    nodes.add("c")
    nodes.lose("b")
    ended(victim)
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "dataset.json"]
    found = {str(path.relative_to(output)): path.read_bytes() for path in files}
    assert found == {name: content for name, content in recordings.expected.items() if name}
    record_faults("preparation", "a node lost, another one comes", tried=1, survived=1)
