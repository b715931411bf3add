"""The processes of packed trials: started once, given work, waited for, replaced where they are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from emolab.cluster import fitting, user_error
from emolab.names import UserError
from emolab.tuning.pack import ANSWER_SECONDS, Answers, PackSettings, SpoiledProcessError, TrialPack
from emolab.tuning.trials import Draw

_POLL_SECONDS = 1.0
"""How often hung processes are looked for, at the least."""
_LOAD_SECONDS = 1800.0
"""So long may a process read the data, or as long as an epoch may take where that is longer."""


class LostProcessError(Exception):
    """A process ended by itself, or has to end; the message says why."""


@dataclass(eq=False)
class Process:
    """An actor, what it is at, and since when."""

    actor: Any
    ready: Any
    """The call that is finished when the process runs; before, it may wait for room in the cluster."""
    call: Any
    """Its unfinished call; None: it is idle."""
    running: bool = False
    loaded: bool = False
    group: list[Draw] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def advance(self, group: list[Draw], until: int, told: int) -> None:
        """Begin or go on with these trials, as ``TrialPack.advance``."""
        self.group, self.since = group, time.monotonic()
        self.call = self.actor.advance.remote([(draw.number, draw.parameters) for draw in group], until, told)


def start_process(pack: PackSettings, resources: Mapping[str, float]) -> Any:
    """A ``TrialPack`` as a Ray actor that holds these resources."""
    needs = dict(resources)
    processors, accelerators = needs.pop("CPU", 0.0), needs.pop("GPU", 0.0)
    remote: Any = ray.remote(TrialPack)
    return remote.options(num_cpus=processors, num_gpus=accelerators, resources=needs).remote(pack)


def load_seconds(timeout_s: float | None) -> float:
    """How long a process may take to read the data, where an epoch may take so long."""
    return max(_LOAD_SECONDS, timeout_s or 0.0)


class Processes:
    """All of one search."""

    def __init__(
        self, pack: PackSettings, resources: Mapping[str, float], *, timeout_s: float | None, retries: int
    ) -> None:
        """
        Args:
            timeout_s: after so long without a finished epoch a process counts as hung.
            retries: how often one may be lost while it reads the data.
        """
        self._pack, self._resources, self._timeout_s, self._retries = pack, resources, timeout_s, retries
        self._all: list[Process] = []
        self._failed_starts = 0

    def __iter__(self) -> Iterator[Process]:
        return iter(self._all)

    def start(self, count: int) -> None:
        """Start so many more; they read the data before they are idle."""
        for _ in range(count):
            actor = start_process(self._pack, self._resources)
            self._all.append(Process(actor=actor, ready=actor.__ray_ready__.remote(), call=actor.load.remote()))

    def idle(self) -> list[Process]:
        """Those that wait for work."""
        return [process for process in self._all if process.loaded and process.call is None]

    def at_work(self) -> list[Draw]:
        """The trials that are trained now."""
        return [draw for process in self._all if process.call is not None for draw in process.group]

    def wait(self) -> list[Process]:
        """A process that has an answer; none where a second has passed without one."""
        calls = {process.call: process for process in self._all if process.call is not None}
        done, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_SECONDS)
        return [calls[call] for call in done]

    def answer(self, process: Process) -> Answers:
        """What an answered process says of its trials: nothing where it has just read the data.

        Raises:
            UserError: the data are of no use.
            LostProcessError: it died, or is of no use any more.
        """
        call, process.call = process.call, None
        try:
            answers: Any = ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, SpoiledProcessError):
                raise LostProcessError(str(error.cause)) from None
            raise user_error(error) from None
        except RayError as error:  # a killed process comes as more than one class: the memory monitor has its own
            why = "" if isinstance(error, RayActorError) else f" ({type(error).__name__})"
            raise LostProcessError(f"the trial's process died{why}") from None
        if process.loaded:
            return answers
        process.loaded = True
        return {}

    def hung(self) -> list[tuple[Process, str]]:
        """Those that have not answered for too long, and what to say of them."""
        late = [(process, reason) for process in self._all if (reason := self._late(process))]
        return [each for each in late if not ray.wait([each[0].call], timeout=0)[0]]  # one may wait to be taken

    def _late(self, process: Process) -> str:
        """What a process has been too slow for; nothing for one that waits for room in the cluster, which it may for
        long."""
        if process.call is None:
            return ""
        if not process.loaded and not process.running:
            if ray.wait([process.ready], timeout=0)[0]:
                process.running, process.since = True, time.monotonic()
            return ""
        waited = time.monotonic() - process.since
        if not process.loaded:
            limit = load_seconds(self._timeout_s)
            return f"timeout: no answer within {limit:g} s" if waited > limit else ""
        if self._timeout_s is None or waited <= self._timeout_s + ANSWER_SECONDS:  # it answers a little after an epoch
            return ""
        return f"timeout: no epoch within {self._timeout_s:g} s"

    def replace(self, lost: Process, reason: str) -> None:
        """Start another process where one was lost and the cluster has room for it.

        Raises:
            UserError: it has no room and no process is left, or processes are lost again and again while they start.
        """
        ray.kill(lost.actor)  # one that could only not be reached for a moment must not go on
        self._failed_starts += not lost.loaded
        if self._failed_starts > self._retries:
            raise UserError(f"{reason} while it read {self._pack.base['data']}, {self._failed_starts} times")
        self._all.remove(lost)
        if fitting(self._resources):
            self.start(1)
        elif not self._all:
            raise UserError(f"{reason}, and the cluster has no room for another; run the same command again")

    def end(self) -> None:
        """End all of them."""
        for process in self._all:
            ray.kill(process.actor)
