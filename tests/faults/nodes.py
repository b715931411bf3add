"""A cluster of several nodes on this machine, each a raylet of its own, that loses and gets nodes as a test says."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.faults import victims as jobs
from tests.faults.killing import Ended, Trigger, Victim, Victims


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

    def lose_host_of(self, process: int) -> None:
        """The node that a process runs on."""
        self._order(("lose host of", str(process)))
        self._names.remove(self._host.said[-1])

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


def ended(victim: Victim) -> Ended:
    result = victim.wait()
    assert not result.killed and not result.error, result
    return result
