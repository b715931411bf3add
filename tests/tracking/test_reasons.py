"""What people are told of a tracker in trouble: a few words, once, and what to do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port

from emolab.__main__ import deliver_outbox
from emolab.names import UserError
from emolab.tracking.buffered import BufferedTracker
from emolab.tracking.reasons import reason_of


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a server that answers everything with one status and a page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"page")

        do_POST = do_GET  # noqa: N815 - the name that the base class calls

        def log_message(self, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def dead() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def unknown() -> Iterator[str]:
    """A name that nobody knows, without asking a name server, which may take its time or answer with an address."""
    host, known = "tracker.invalid", socket.getaddrinfo

    def lookup(name: Any, *arguments: Any, **options: Any) -> Any:
        if name in (host, host.encode()):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(name, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lookup)
        yield f"http://{host}:5000"


@contextmanager
def insecure() -> Iterator[str]:
    with answering(200) as address:
        yield address.replace("http:", "https:")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (dead(), "connection refused"),
        (unknown(), "name not known"),
        (answering(500), "HTTP 500"),
        (answering(503), "HTTP 503"),
        (answering(401), "HTTP 401"),
        (insecure(), "no secure connection: is the address one of https?"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_tracker_in_trouble_is_told_in_few_words_and_once(
    place: object, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with place as address:  # pyright: ignore[reportGeneralTypeIssues]
        tracker = BufferedTracker(address, "x", output=tmp_path)
        (line,) = capfd.readouterr().err.splitlines()
        waits = f"records wait in {tmp_path / 'outbox'} until it can"
        assert line == f"the tracker {address} cannot be reached now ({words}); {waits}"
        tracker.start("r")
        with pytest.raises(UserError) as error:
            tracker.find("kind", "x")
        assert str(error.value) == f"the tracker {address} cannot be reached: {words}"
        waiting = tracker.close()
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"the tracker {address} has not received {waiting} records ({words}): they wait in ")
        assert not deliver_outbox(tmp_path, address)
        first, following = capfd.readouterr().out.splitlines()
        assert first == f"0 records sent, {waiting} wait: {words}"
        assert following.startswith("next    ")
        assert ("MLFLOW_TRACKING_PASSWORD" in following) == (words == "HTTP 401")


def test_an_address_that_is_none_is_refused_where_records_are_delivered(tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    with pytest.raises(UserError, match=r"^--uri=foo is no address of a tracker"):
        deliver_outbox(tmp_path, "foo")


def test_a_long_story_ends_with_a_whole_word() -> None:
    told = reason_of(ValueError("all is\n lost " * 60))
    assert len(told) <= 200 and "\n" not in told
    assert told.endswith(("lost ...", "all ...", "is ..."))
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(TimeoutError("timed out")) == "no answer in time"
