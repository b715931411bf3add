"""Successive halving (Jamieson & Talwalkar, 2016) without barriers that are not needed: who goes on from which rung.

All trials run to the first rung and pause there; the best of them run to the second, and so on. A trial goes on as soon
as nothing that may still arrive can take its place, and ends as soon as it can never go on, so the decisions are those
of a search with one process whatever the number of processes and the order in which they answer.
"""

from __future__ import annotations

from collections.abc import Sequence


def places(trials: int, *, rungs: int, factor: int) -> list[int]:
    """How many trials may go on from each rung: one in ``factor`` of those that reach it, and at least one."""
    found: list[int] = []
    for _ in range(rungs):
        found.append(max(1, (found[-1] if found else trials) // factor))
    return found


def halving_epochs(trials: int, rungs: Sequence[int], *, factor: int, epochs: int) -> int:
    """Epochs that a search takes when no trial ends before its turn."""
    running = [trials, *places(trials, rungs=len(rungs), factor=factor)]
    legs = zip([0, *rungs], [*rungs, epochs], strict=True)
    return sum(count * (end - start) for count, (start, end) in zip(running, legs, strict=True))


class Halving:
    """The trials of one search that have begun and not ended, by the rung they pause at or run to."""

    def __init__(self, rungs: Sequence[int], *, factor: int, trials: int) -> None:
        """
        Args:
            rungs: epochs after which trials pause, rising.
            trials: in the search when it is over.
        """
        self.rungs = list(rungs)
        self.places = places(trials, rungs=len(rungs), factor=factor)
        self._gone_on = [0] * len(self.rungs)
        self._running: dict[int, int] = {}
        self._paused: dict[int, tuple[int, float]] = {}

    def count_ended(self, epochs: int, *, failed: bool = False) -> None:
        """A trial of an earlier call that had ended after so many epochs: it has taken the places that it passed.

        Args:
            failed: it was training when it ended, so that it had gone on from a rung if it was at one.
        """
        for rung, epoch in enumerate(self.rungs):
            self._gone_on[rung] += epochs > epoch or (failed and epochs == epoch)

    def begin(self, number: int) -> None:
        """A trial runs to the first rung."""
        self._running[number] = 0

    def pause(self, number: int, epoch: int, value: float) -> None:
        """A trial has reached a rung; also one of an earlier call, which then has passed the rungs before.

        Args:
            value: the higher the better.
        """
        rung = self.rungs.index(epoch)
        if number not in self._running:
            self.count_ended(epoch)
        self._running.pop(number, None)
        self._paused[number] = (rung, value)

    def end(self, number: int) -> None:
        """A trial has ended, wherever it was."""
        self._running.pop(number, None)
        self._paused.pop(number, None)

    def go_on(self, unstarted: int) -> int | None:
        """A paused trial that runs to its next rung from now on; None where that is not decided yet.

        The best one that pauses at a rung goes on when fewer trials may still arrive there than there are places
        free: even if all of these are better, one place is left for it. As many may arrive at the next rung as run
        to it, and as can go on from this one. Of 12 trials and 4 places at the first rung, 9 of which pause there
        and 3 of which run: the best goes on (3 < 4); then 3 places are free, and the second waits (3 < 3 is false)
        until one of the three has arrived.

        Args:
            unstarted: trials that have still to begin.
        """
        arriving = unstarted
        for rung in range(len(self.rungs)):
            ranked, free = self._ranked(rung), self._free(rung)
            arriving += sum(target == rung for target in self._running.values())
            if ranked and arriving < free:
                self._paused.pop(ranked[0])
                self._gone_on[rung] += 1
                self._running[ranked[0]] = rung + 1
                return ranked[0]
            arriving = min(free, len(ranked) + arriving)
        return None

    def hopeless(self) -> list[int]:
        """Paused trials that can never go on, since better ones take all the places that are left."""
        return [number for rung in range(len(self.rungs)) for number in self._ranked(rung)[self._free(rung) :]]

    def paused(self) -> list[int]:
        """Trials that wait."""
        return list(self._paused)

    def _ranked(self, rung: int) -> list[int]:
        """Trials that pause at a rung, best first."""
        here = [(-value, number) for number, (at, value) in self._paused.items() if at == rung]
        return [number for _, number in sorted(here)]

    def _free(self, rung: int) -> int:
        return max(0, self.places[rung] - self._gone_on[rung])
