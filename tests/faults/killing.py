"""Victims: jobs in processes of their own that are killed at a drawn moment, without paying for the imports each time.

One helper process imports everything once and is forked for every victim (multiprocessing's fork server). A victim is
killed at its n-th operation on a file below a folder, or a drawn time after something it has said, by SIGKILL alone:
nothing of its own runs any more.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = ("tests.faults.victims",)
_OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "os.utime",
    "os.scandir",
    "shutil.rmtree",
}


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Kills its own process when it is about to begin its n-th operation on a file below a folder."""

    folder: str
    at: int | None = None
    """None: the operations are only counted."""


@dataclass
class Ended:
    """What became of a victim."""

    killed: bool
    said: list[Any] = field(default_factory=list)
    """What it sent before it ended, in order."""
    operations: int = 0
    """Where it came to its end: the file operations it took."""
    error: str = ""


class Counter:
    """The hook behind ``Trigger``: Python tells it of every file operation before that happens."""

    def __init__(self, trigger: Trigger) -> None:
        self.trigger, self.count = trigger, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(self.trigger.folder):
            return
        self.count += 1
        if self.count == self.trigger.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _run(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    trigger: Trigger,
    channel: Connection,
) -> None:
    os.environ.update(environment)  # what the tests have set since the helper was started
    counter = Counter(trigger)
    sys.addaudithook(counter)
    try:
        work(*arguments, channel.send)
        channel.send(("ended", counter.count, ""))
    except BaseException as error:
        channel.send(("ended", counter.count, f"{type(error).__name__}: {error}"))
        raise


class Victims:
    """Starts victims; one helper process for all of them."""

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: of the repository, from which the helper imports.
        """
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._path = os.pathsep.join(str(root / part) for part in ("platform", "model", ""))

    def start(self, work: Callable[..., None], *arguments: Any, trigger: Trigger) -> Victim:
        """Fork a victim that calls ``work(*arguments, say)``."""
        receiver, sender = self._context.Pipe(duplex=False)
        environment, before = dict(os.environ), os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = self._path  # the helper is told nothing of sys.path
        try:
            process = self._context.Process(
                target=_run, args=(work, arguments, environment, trigger, sender), daemon=True
            )
            process.start()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        sender.close()
        return Victim(process, receiver)

    def run(self, work: Callable[..., None], *arguments: Any, trigger: Trigger) -> Ended:
        """A victim from beginning to end."""
        return self.start(work, *arguments, trigger=trigger).wait()


class Victim:
    """A process that may be killed from outside, too."""

    def __init__(self, process: Any, channel: Connection) -> None:
        self._process, self._channel = process, channel
        self.said: list[Any] = []
        """What it has said, as far as somebody has listened."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def heard(self, count: int, *, timeout: float = 120.0) -> bool:
        """Wait until it has said so many things; False where it ended before."""
        deadline = time.monotonic() + timeout
        while len(self.said) < count and self._receive(deadline):
            pass
        return len(self.said) >= count and not self._over

    def kill(self) -> Ended:
        """SIGKILL, unless it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, *, timeout: float = 200.0) -> Ended:
        """Until it has ended, in one way or the other."""
        deadline = time.monotonic() + timeout
        while self._receive(deadline):
            pass
        self._process.join(max(0.0, deadline - time.monotonic()))
        assert self._process.exitcode is not None, "the victim never ended"
        ended = next((said for said in self.said if isinstance(said, tuple) and said[0] == "ended"), None)
        said = [each for each in self.said if each is not ended]
        if ended is None:
            assert self._process.exitcode == -signal.SIGKILL, f"it died with {self._process.exitcode}"
            return Ended(killed=True, said=said)
        return Ended(killed=False, said=said, operations=ended[1], error=ended[2])

    @property
    def _over(self) -> bool:
        return any(isinstance(said, tuple) and said[0] == "ended" for said in self.said)

    def _receive(self, deadline: float) -> bool:
        """Take one thing it says; False where nothing more will come."""
        try:
            if not self._channel.poll(max(0.0, deadline - time.monotonic())):
                raise AssertionError("the victim says nothing and does not end")
            self.said.append(self._channel.recv())
        except (EOFError, OSError):
            return False
        return True


def below(process: int) -> list[int]:
    """Ids of the processes that a process has started, and of those that they have started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for known in found:  # it grows while it is gone through
        found += children.get(known, [])
    return found[1:]


def processes(title: str, *, root: int | None = None) -> list[int]:
    """Ids of the processes below one, this one by default, whose command line begins so, as ``ray::TrialPack``."""
    found = []
    for process in below(root or os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(title.encode()):
                found.append(process)
    return sorted(found)


def silence(title: str, *, timeout: float = 60.0) -> None:
    """Wait until no such process is left: Ray ends the actors of a driver that was killed, a moment later."""
    deadline = time.monotonic() + timeout
    while processes(title):
        assert time.monotonic() < deadline, f"{title} goes on"
        time.sleep(0.05)
