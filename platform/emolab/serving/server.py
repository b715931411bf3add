"""jobs/serve.py: live sessions over WebSockets on Ray Serve, and a page that replays a recorded one.

``/session`` is a WebSocket: one connection is one session (``live.py`` says what is spoken). ``/`` is the page,
``/recordings`` lists the sessions it can replay.
"""

# Annotations are real classes here: Serve ships the routes without the names that only a string would mention.

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import HTMLResponse
from ray import serve
from starlette.websockets import WebSocketDisconnect

from emolab.cluster import connected, require, worker_environment
from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving.live import POLICY, TOO_BUSY, Limits, LiveSession, refusal
from emolab.serving.models import find_model, load
from emolab.serving.recordings import recordings
from emolab.serving.settings import ServeSettings

APPLICATION = "emolab-live"
SPARE_REQUESTS = 32
"""Requests beside the sessions that a replica takes at once: the page, and connections to be turned away."""


def is_foreign(origin: str | None, host: str | None) -> bool:
    """Whether a browser says that a page from elsewhere wants to connect; clients that are no browser say nothing."""
    if not origin:
        return False
    try:
        return urlsplit(origin).netloc != host
    except ValueError:  # no address at all
        return True


app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
# `ingress` copies the routes, and with them the names that the class below may use: those above it, and no later ones.


@serve.deployment(num_replicas=1)
@serve.ingress(app)
class LiveService:
    """Holds the model and follows the sessions."""

    def __init__(self, settings: ServeSettings, folder: str) -> None:
        torch.set_num_threads(1)
        self._settings = settings
        self._loaded = load(kept_model(Path(folder)))
        self._live = self._loaded.live(settings.window)
        self._limits = Limits(message_bytes=settings.message_bytes, steps=settings.steps, mistakes=settings.mistakes)
        self._recordings = recordings(settings.demo, self._loaded)
        self._open = 0
        # One thread computes for all: a step takes a core anyway, and the event loop stays free to answer.
        self._worker = ThreadPoolExecutor(max_workers=1)

    @app.get("/")
    def page(self) -> HTMLResponse:
        content = resources.files("emolab.serving").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(content, headers={"Content-Security-Policy": policy})

    @app.get("/recordings")
    def list_recordings(self) -> list[dict[str, Any]]:
        return [{"session_id": r["session_id"], "steps": len(r["labels"])} for r in self._recordings]

    @app.get("/recordings/{number}")
    def recording(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self._recordings):
            raise HTTPException(404, f"there are {len(self._recordings)} recordings")
        return self._recordings[number]

    @app.websocket("/session")
    async def session(self, socket: WebSocket) -> None:
        if is_foreign(socket.headers.get("origin"), socket.headers.get("host")):
            await socket.close(POLICY)  # a stranger's page in somebody's browser
            return
        await socket.accept()
        if self._open >= self._settings.sessions:
            message = f"all {self._settings.sessions} sessions are taken: try again later"
            await socket.send_json(refusal("too_many_sessions", message))
            await socket.close(TOO_BUSY)
            return
        self._open += 1
        try:
            with suppress(WebSocketDisconnect):
                await self._converse(socket)
        finally:
            self._open -= 1

    async def _converse(self, socket: WebSocket) -> None:
        session = LiveSession(self._loaded, self._live, self._limits)
        await socket.send_json(session.greeting())
        while True:
            try:
                received = await asyncio.wait_for(socket.receive(), self._settings.idle_seconds)
            except TimeoutError:
                message = f"nothing was heard for {self._settings.idle_seconds:g} s"
                await socket.send_json(refusal("idle", message))
                await socket.close(POLICY)
                return
            if received["type"] == "websocket.disconnect":
                return
            said = received.get("text") if received.get("text") is not None else received.get("bytes")
            reply = await asyncio.get_running_loop().run_in_executor(self._worker, session.answer, said)
            await socket.send_text(reply.text())
            if reply.close is not None:
                await socket.close(reply.close)
                return


def serve_live(settings: ServeSettings, *, dry_run: bool, report: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UserError: no such model, one that cannot stream, a demo that does not fit, or a port that is taken.
    """
    kept = find_model(settings.model, output=Path(settings.output), tracking=settings.tracking)
    loaded = load(kept)
    live = loaded.live(settings.window)
    shown = recordings(settings.demo, loaded)
    port = _free_port(settings.host, settings.port)
    report(
        f"{kept.name} ({kept.digest[:16]}), {', '.join(f'{name} {size}' for name, size in loaded.dimensions.items())} "
        f"-> {', '.join(loaded.classes)}; at most {settings.sessions} sessions; {len(shown)} recordings to replay"
    )
    if live.recomputes:
        report(f"{kept.name} has no streaming form: every step runs the whole session so far again")
    if dry_run:
        return
    stopped = threading.Event()
    _stop_on_signals(stopped)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with connected(settings.cluster):
        require({"CPU": 1.0}, purpose="live inference")
        _deploy(settings, kept.folder, port)
        _stop_on_signals(stopped)  # once more: Ray has put handlers of its own in their place
        try:
            report(f"page    http://{settings.host}:{port}/\nsession ws://{settings.host}:{port}/session")
            stopped.wait()
        finally:
            serve.shutdown()
    report("stopped")


def _stop_on_signals(stopped: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())


def _deploy(settings: ServeSettings, folder: Path, port: int) -> None:
    serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": port})
    environment = {"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}}
    service = LiveService.options(
        max_ongoing_requests=settings.sessions + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": 1, "runtime_env": environment},
    )
    serve.run(service.bind(settings, str(folder)), name=APPLICATION, route_prefix="/")


def _free_port(host: str, port: int) -> int:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
