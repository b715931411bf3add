"""A cluster of several nodes that loses one half-way: what comes out is what an undisturbed cluster gives.

Every node is a raylet of its own on this machine. A lost one is killed with everything that runs below it. Training
has a file of its own beside this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victim, Victims
from tests.faults.nodes import Nodes, ended
from tests.faults.test_tuning_kills import job as search_job
from tests.faults.undisturbed import Recordings, Sweep, written
from tests.robustness.test_sweep import contents

from emolab.tracking.tracker import NoTracker
from emolab.tuning.search import search

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]
Record = Callable[..., None]
STALL = 20.0
"""Seconds: longer than a session takes, also on a busy machine."""


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
    planned: Sweep,
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


def preparing(
    nodes: Nodes, media: Path, output: Path, victims: Victims, *, seconds: float = 0.1, stall_seconds: float = 3600.0
) -> tuple[Victim, int]:
    """A preparation that has read some of its sessions, and the process of its first stage. Either stage takes a node
    for itself: where one is lost, there is no room for its stage beside the other."""
    nodes.are("a", "b")
    arguments = (str(media), str(output), nodes.address, seconds, stall_seconds)
    victim = victims.start(jobs.preparing, *arguments, trigger=Trigger(folder=str(output)))
    deadline = time.monotonic() + 120
    while len(list((output / ".unfinished" / "records").glob("s*"))) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return victim, int((media.parent / "decoder").read_text())


def test_a_preparation_that_loses_a_node_goes_on_when_another_comes_and_writes_the_same_bytes(
    nodes: Nodes,
    recordings: Recordings,
    tmp_path: Path,
    victims: Victims,
    record_faults: Record,
) -> None:
    victim, decoder = preparing(nodes, recordings.media, tmp_path, victims)
    nodes.add("another")
    nodes.lose_host_of(decoder)
    ended(victim)
    assert written(tmp_path) == recordings.shards
    record_faults("preparation", "a node lost, another one comes", tried=1, survived=1)


def test_a_preparation_that_never_gets_another_node_ends_and_goes_on_with_what_is_left_when_run_again(
    nodes: Nodes,
    recordings: Recordings,
    tmp_path: Path,
    victims: Victims,
    record_faults: Record,
) -> None:
    victim, decoder = preparing(nodes, recordings.media, tmp_path, victims, seconds=0.5, stall_seconds=STALL)
    nodes.lose_host_of(decoder)
    stopped = victim.wait()
    assert stopped.error.startswith(f"UserError: no session was finished for {STALL:g} s; ")
    assert "run again to continue" in stopped.error and "\n" not in stopped.error
    again = victims.run(
        jobs.preparing, str(recordings.media), str(tmp_path), nodes.address, 0.0, 3600.0, trigger=Trigger(folder="none")
    )
    assert not again.error and "sessions are finished already" in again.said[0], again
    assert written(tmp_path) == recordings.shards
    record_faults("preparation", "a node lost, no other one comes", tried=1, survived=1)
