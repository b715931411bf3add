"""jobs/serve.py: live sessions over WebSockets, and a page that replays a recorded one.

One Ray actor of the job's own holds the model, listens and answers (``web.py``). It is not Ray Serve, whose proxy reads
ahead of a session without bound and whose one instance a cluster's users share.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emolab.cluster import connected, free, require, user_error, worker_environment
from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving.live import Limits
from emolab.serving.models import find_model, load
from emolab.serving.recordings import recordings
from emolab.serving.settings import ServeSettings
from emolab.serving.web import LiveService

_RESOURCES = {"CPU": 1.0}
_SLOW_START_SECONDS = 30.0
"""After which a server that has not started yet is explained."""
_STOP_SECONDS = 15.0
"""How long a server may take to say goodbye to its sessions."""


def serve_live(settings: ServeSettings, *, dry_run: bool, report: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UserError: no such model, one that cannot stream, a demo that does not fit, a port that is taken, or a server
            that did not start or was lost.
    """
    kept = find_model(settings.model, output=Path(settings.output), tracking=settings.tracking)
    loaded = load(kept)
    live = loaded.live(settings.window)
    shown = recordings(settings.demo, loaded)
    bound(settings.host, settings.port).close()
    report(
        f"{kept.name} ({kept.digest[:16]}), {', '.join(f'{name} {size}' for name, size in loaded.dimensions.items())} "
        f"-> {', '.join(loaded.classes)}; at most {settings.sessions} sessions; {len(shown)} recordings to replay"
    )
    if live.recomputes:
        report(f"{kept.name} has no streaming form: every step runs the whole session so far again")
    for line in loaded.warnings():
        report(line)
    if dry_run:
        return
    if settings.demo is not None:  # a cluster's processes run in another folder
        settings = settings.model_copy(update={"demo": str(Path(settings.demo).resolve())})
    stopped = threading.Event()
    _stop_on_signals(stopped)
    with connected(settings.cluster):
        _stop_on_signals(stopped)  # once more: Ray has put handlers of its own in their place
        require(_RESOURCES, purpose="live inference")
        _serve(settings, kept.folder, stopped, report)
    report("stopped")


def _stop_on_signals(stopped: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())


def _serve(settings: ServeSettings, folder: Path, stopped: threading.Event, report: Callable[[str], None]) -> None:
    """Start a server and wait for its end; it never outlives this process."""
    server = _start(settings, folder)
    try:
        place = _wait(server.place.remote(), stopped, lambda: report(f"still starting: {free(_RESOURCES)}"))
        if place is None:
            return
        node, port = place
        address = url_host(settings.host, node)
        report(f"page    http://{address}:{port}/\nsession ws://{address}:{port}/session")
        if node != ray.util.get_node_ip_address():
            report(f"node    {node}: it listens there, not here")
        running = server.run.remote()
        _wait(running, stopped)
        if not stopped.is_set():
            raise UserError("the server ended by itself: run the same command again")
        with suppress(RayError):
            ray.get(server.stop.remote(), timeout=_STOP_SECONDS)
            ray.wait([running], timeout=_STOP_SECONDS)
    except RayError as error:
        cause = user_error(error)
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"the server failed: {_reason(error)}") from None
    finally:
        ray.kill(server)


def _start(settings: ServeSettings, folder: Path) -> Any:
    # Where it is started it is looked for, so there it listens; a node without CPUs, such as a cluster's head, leaves
    # that to another.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    environment = {"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}}
    actor: Any = ray.remote(LiveServer)  # two calls at a time: one runs, the other stops it
    return actor.options(
        num_cpus=_RESOURCES["CPU"], max_concurrency=2, scheduling_strategy=here, runtime_env=environment
    ).remote(settings, folder)


def _wait(reference: Any, stopped: threading.Event, explain: Callable[[], None] | None = None) -> Any:
    """The result of a call, or None where the server is to stop first."""
    waited = 0.0
    while not stopped.wait(0.1):
        if ray.wait([reference], timeout=0.4)[0]:
            return None if stopped.wait(0.5) else ray.get(reference)  # Ctrl-C may have reached the server first
        waited += 0.5
        if explain is not None and waited >= _SLOW_START_SECONDS:
            explain()
            waited = 0.0
    return None


def _reason(error: RayError) -> str:
    """The last line of what a process said: the error itself, without its traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


class LiveServer:
    """The process that listens; a Ray actor."""

    def __init__(self, settings: ServeSettings, folder: Path) -> None:
        torch.set_num_threads(1)
        self._socket = bound(settings.host, settings.port)
        loaded = load(kept_model(folder))
        service = LiveService(
            loaded,
            loaded.live(settings.window),
            Limits(
                message_bytes=settings.message_bytes,
                steps=settings.steps,
                mistakes=settings.mistakes,
                unanswered=settings.unanswered,
                idle_seconds=settings.idle_seconds,
            ),
            sessions=settings.sessions,
            recordings=recordings(settings.demo, loaded),
        )
        hosts = known_hosts(settings.host, ray.util.get_node_ip_address()) | set(settings.names)
        self._server = service.server(hosts)
        self._socket.listen()  # who connects from now on is answered as soon as it runs

    def place(self) -> tuple[str, int]:
        """Address of the node, and the port."""
        return ray.util.get_node_ip_address(), int(self._socket.getsockname()[1])

    def run(self) -> None:
        """Until ``stop`` is called."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Sessions are told that the service restarts (close code 1012)."""
        self._server.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet.

    Raises:
        UserError: the address is not this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"cannot listen on {in_brackets(host)}:{port}: {reason or error}") from None
    return found


def in_brackets(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def url_host(host: str, node: str) -> str:
    """What to call a server that listens on a host of a node; of one that listens everywhere, the node's address.

    A local Ray's node has only a loopback address; the machine's name says more then.
    """
    if not _is_everywhere(host):
        return in_brackets(host)
    return socket.gethostname() if ipaddress.ip_address(node).is_loopback else in_brackets(node)


def known_hosts(host: str, node: str) -> set[str]:
    """Names by which a browser may know a server that listens on a host of this node, as they stand in a URL."""
    known = {host, "localhost", "127.0.0.1", "::1"}
    if _is_everywhere(host):
        name = socket.gethostname()
        known |= {node, name}
        with suppress(OSError):
            known |= {str(each[4][0]) for each in socket.getaddrinfo(name, None)}
    return {in_brackets(each) for each in known}


def _is_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False
