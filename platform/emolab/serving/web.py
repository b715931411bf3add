"""What live inference says over HTTP and WebSockets, as an ASGI application: any server can carry it, any process.

``/session`` is a WebSocket: one connection is one session (``live.py`` says what is spoken). ``/`` is the page,
``/recordings`` lists the sessions it can replay.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from edu_emotionnet.streaming import StreamingModel
from emolab.serving.live import POLICY, TOO_BUSY, Limits, LiveSession, refusal
from emolab.serving.models import LoadedModel

OVERSIZE = 4 * 1024**2
"""Bytes by which a message may exceed its limit and still be told so; beyond, the connection is cut."""
SPARE_REQUESTS = 32
"""Connections beside the sessions at which pages are no longer answered."""
_CLOSING_SECONDS = 5


class LiveService:
    """The sessions that follow one model."""

    def __init__(
        self,
        loaded: LoadedModel,
        live: StreamingModel,
        limits: Limits,
        *,
        sessions: int,
        recordings: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._loaded, self._live, self._limits = loaded, live, limits
        self._sessions = sessions
        self._recordings = recordings
        self._open = 0
        # One thread computes for all: a step takes a core anyway, and the event loop stays free to answer.
        self._worker = ThreadPoolExecutor(max_workers=1)

    def page(self) -> HTMLResponse:
        content = resources.files("emolab.serving").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(content, headers={"Content-Security-Policy": policy})

    def list_recordings(self) -> list[dict[str, Any]]:
        return [{"session_id": r["session_id"], "steps": len(r["labels"])} for r in self._recordings]

    def recording(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self._recordings):
            raise HTTPException(404, f"there are {len(self._recordings)} recordings")
        return self._recordings[number]

    async def session(self, socket: WebSocket) -> None:
        if is_foreign(socket.headers.get("origin"), socket.headers.get("host")):
            await socket.close(POLICY)  # a stranger's page in somebody's browser
            return
        with suppress(WebSocketDisconnect):
            await socket.accept()
            if self._open >= self._sessions:
                message = f"all {self._sessions} sessions are taken: try again later"
                await socket.send_json(refusal("too_many_sessions", message))
                await socket.close(TOO_BUSY)
                return
            self._open += 1
            try:
                session = LiveSession(self._loaded, self._live, self._limits)
                await _Conversation(socket, session, self._limits, self._worker).hold()
            finally:
                self._open -= 1

    def application(self, hosts: Iterable[str]) -> FastAPI:
        """The routes, for requests to these hosts alone.

        A page from elsewhere whose name was made to lead here (DNS rebinding) is of the same origin as its requests:
        only the name tells it apart.

        Args:
            hosts: names and addresses without a port, IPv6 in brackets.
        """
        application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(hosts), www_redirect=False)
        application.add_api_route("/", self.page)
        application.add_api_route("/recordings", self.list_recordings)
        application.add_api_route("/recordings/{number}", self.recording)
        application.add_api_websocket_route("/session", self.session)
        return application

    def server(self, hosts: Iterable[str]) -> uvicorn.Server:
        """A server of the application that takes no more of anything than the limits say."""
        config = uvicorn.Config(
            self.application(hosts),
            loop="asyncio",
            http="h11",
            ws=_HeardConnection,
            ws_max_size=self._limits.message_bytes + OVERSIZE,
            ws_per_message_deflate=False,  # what is read at once, a few kilobytes, could become any number of messages
            limit_concurrency=self._sessions + SPARE_REQUESTS,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
            proxy_headers=False,
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        return uvicorn.Server(config)


def is_foreign(origin: str | None, host: str | None) -> bool:
    """Whether a browser says that a page from elsewhere wants to connect; clients that are no browser say nothing."""
    if not origin:
        return False
    try:
        return urlsplit(origin).netloc != host
    except ValueError:  # no address at all
        return True


class _HeardConnection(WebSocketsSansIOProtocol):
    """A WebSocket that is cut once its client no longer takes what it is sent: answers, and pongs, would pile up."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.abort()


class _Conversation:
    """One session over its socket.

    What the client sends is read as it comes and waits here, within limits, for its answer: an end of the connection
    is seen at once, and what then still waits is never computed.
    """

    def __init__(self, socket: WebSocket, session: LiveSession, limits: Limits, worker: ThreadPoolExecutor) -> None:
        self._socket, self._session, self._limits, self._worker = socket, session, limits, worker
        self._waiting: deque[str | bytes | None] = deque()
        self._waiting_bytes = 0

    async def hold(self) -> None:
        """Until either side ends it.

        Raises:
            WebSocketDisconnect: the client was gone when it was to be told something.
        """
        await self._socket.send_json(self._session.greeting())
        tasks: set[asyncio.Task[Any]] = set()
        try:
            await self._listen_and_answer(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen_and_answer(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Keeps in ``tasks`` what is under way."""
        hearing, answering = asyncio.create_task(self._socket.receive()), None
        tasks.add(hearing)
        while True:
            # Who waits for an answer is not silent.
            patience = None if answering else self._limits.idle_seconds
            done, _ = await asyncio.wait(tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                await self._refuse("idle", f"nothing was heard for {self._limits.idle_seconds:g} s")
                return
            if hearing in done:
                received = hearing.result()
                if received["type"] == "websocket.disconnect":
                    return
                if not self._keep(received):
                    most = f"{self._limits.unanswered} messages of {self._limits.message_bytes} bytes together"
                    await self._refuse("too_many_unanswered", f"at most {most} may wait for their answers")
                    return
                hearing = asyncio.create_task(self._socket.receive())
                tasks.add(hearing)
            if answering in done:
                if (code := answering.result()) is not None:
                    await self._socket.close(code)
                    return
                answering = None
            if answering is None and self._waiting:
                answering = asyncio.create_task(self._answer(self._next()))
                tasks.add(answering)
            tasks -= done

    def _keep(self, received: Mapping[str, Any]) -> bool:
        """Whether a message may wait; one always may."""
        message = received.get("text") if received.get("text") is not None else received.get("bytes")
        self._waiting.append(message)
        self._waiting_bytes += len(message or "")
        within = len(self._waiting) <= self._limits.unanswered and self._waiting_bytes <= self._limits.message_bytes
        return within or len(self._waiting) == 1

    def _next(self) -> str | bytes | None:
        message = self._waiting.popleft()
        self._waiting_bytes -= len(message or "")
        return message

    async def _answer(self, message: str | bytes | None) -> int | None:
        """The close code, if that was the last answer."""
        reply = await asyncio.get_running_loop().run_in_executor(self._worker, self._session.answer, message)
        await self._socket.send_text(reply.text())
        return reply.close

    async def _refuse(self, code: str, message: str) -> None:
        await self._socket.send_json(refusal(code, message))
        await self._socket.close(POLICY)
