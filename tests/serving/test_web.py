"""A live service on a real socket in this process: what its sessions may pile up, and what ends them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from tests.docs.guides import guide, quoted, rows, run_section, sections
from tests.ports import free_port
from tests.serving.parts import World
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving.live import Limits, LiveSession, Reply
from emolab.serving.models import LoadedModel, load
from emolab.serving.server import ServeSettings, bound, in_brackets, known_hosts, serve_live, url_host
from emolab.serving.web import LiveService

LIMITS = Limits(message_bytes=5000, steps=20_000, mistakes=5)
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def loaded(world: World) -> LoadedModel:
    return load(kept_model(world.model))


@contextmanager
def served(loaded: LoadedModel, *, host: str = "127.0.0.1", **limits: Any) -> Iterator[int]:
    """The port of a service with one place."""
    service = LiveService(loaded, loaded.live(None), replace(LIMITS, **limits), sessions=1)
    server, listening = service.server(known_hosts(host, "127.0.0.1")), bound(host, 0)
    listening.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def begin(port: int, **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{port}/session", open_timeout=30, **options)


def hear(client: ClientConnection) -> dict[str, Any]:
    return json.loads(client.recv(timeout=30))


def step(number: int, padding: int = 0) -> str:
    return json.dumps({"step": number, "features": {}}) + " " * padding


def seconds_until_free(port: int) -> float:
    began = time.monotonic()
    while True:
        with begin(port) as client:
            if hear(client)["type"] == "session":
                return time.monotonic() - began
        assert time.monotonic() < began + 30
        time.sleep(0.02)


class SlowSession(LiveSession):
    """Takes half a second for every answer."""

    answered = 0

    def answer(self, message: str | bytes | None) -> Reply:
        time.sleep(0.5)
        SlowSession.answered += 1
        return super().answer(message)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowSession]:
    monkeypatch.setattr("emolab.serving.web.LiveSession", SlowSession)
    monkeypatch.setattr(SlowSession, "answered", 0)
    return SlowSession


def test_the_client_of_the_guide_to_python_is_answered_and_its_place_given_back(loaded: LoadedModel) -> None:
    with served(loaded) as port:
        for _ in range(2):
            seconds_until_free(port)
            found = run_section("A live session", {}, {"127.0.0.1:8000": f"127.0.0.1:{port}"})
            assert (found["answer"]["type"], found["answer"]["step"]) == ("prediction", 2)
            assert found["answer"]["present"] == {"audio": True, "visual": False, "text": False}


def test_the_server_ends_a_session_with_the_codes_of_the_guide(loaded: LoadedModel) -> None:
    table = rows(sections(guide("python.md"))["A live session"], "case")
    told = {quoted(code)[0]: int(close) for _, code, close in table if quoted(code)}
    (stopped,) = (int(close) for _, code, close in table if code == "none")
    with served(loaded) as port, begin(port) as client:
        hear(client)
        with begin(port) as further:
            assert ended(further) == ("too_many_sessions", told["too_many_sessions"])
    with served(loaded, idle_seconds=1.0) as port, begin(port) as client:
        hear(client)
        assert ended(client) == ("idle", told["idle"])
    with served(loaded, steps=0) as port, begin(port) as client:
        hear(client)
        client.send(step(0))
        assert ended(client) == ("too_many_steps", told["too_many_steps"])
    with served(loaded) as port:
        client = begin(port)
        hear(client)
    assert ended(client) == (None, stopped)


def ended(client: ClientConnection) -> tuple[str | None, int]:
    """The code of the error that a client is told last, and that with which its connection is closed."""
    code = None
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            code = hear(client).get("code")
    assert closed.value.rcvd is not None
    return code, closed.value.rcvd.code


@pytest.mark.parametrize("politely", [True, False])
def test_who_hangs_up_frees_the_place_and_what_waited_is_not_computed(
    loaded: LoadedModel, slow: type[SlowSession], politely: bool
) -> None:
    with served(loaded) as port:
        client = begin(port)
        hear(client)
        for number in range(30):
            client.send(step(number))
        hear(client)
        if politely:
            client.close()
        else:
            client.socket.shutdown(socket.SHUT_RDWR)
        assert seconds_until_free(port) < 10.0  # all that waited would take 14 s
        before = slow.answered
        time.sleep(1.2)
        assert before < 15 and slow.answered <= before + 1


@pytest.mark.parametrize(("count", "padding"), [(9, 0), (3, 3000)])
def test_no_more_may_wait_than_the_limits_say(
    loaded: LoadedModel, slow: type[SlowSession], count: int, padding: int
) -> None:
    with served(loaded, unanswered=7) as port, begin(port) as client:
        assert hear(client)["limits"]["unanswered"] == 7
        for number in range(count):
            client.send(step(number, padding))
        said = hear(client)
        assert said["code"] == "too_many_unanswered" and "7 messages of 5000 bytes" in said["message"]
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_as_many_as_may_wait_are_answered_in_order(loaded: LoadedModel) -> None:
    with served(loaded) as port, begin(port) as client:
        hear(client)
        for number in range(64):
            client.send(step(number))
        assert [hear(client)["step"] for _ in range(64)] == [*range(64)]


def test_who_waits_for_an_answer_is_not_silent(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    may_answer = threading.Event()

    class HeldSession(LiveSession):
        def answer(self, message: str | bytes | None) -> Reply:
            assert may_answer.wait(60)
            return super().answer(message)

    monkeypatch.setattr("emolab.serving.web.LiveSession", HeldSession)
    with served(loaded, idle_seconds=3.0) as port, begin(port) as client:
        hear(client)
        client.send(step(0))
        client.send(step(1))
        threading.Timer(4.5, may_answer.set).start()
        assert [hear(client)["type"] for _ in range(3)] == ["prediction", "prediction", "error"]


def test_who_takes_nothing_is_cut_before_it_piles_up(loaded: LoadedModel) -> None:
    with served(loaded) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.settimeout(30)
        client.sendall(upgrade(f"127.0.0.1:{port}"))
        ping = b"\x89\xfd" + bytes(4) + bytes(125)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            for _ in range(1500):  # 13 MB of pings, and as many pongs
                client.sendall(ping * 64)
        seconds_until_free(port)


def upgrade(host: str, origin: str | None = None) -> bytes:
    named = f"Origin: {origin}\r\n" if origin else ""
    return (
        f"GET /session HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{named}"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


def status(port: int, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/", headers={"Host": host})
    return connection.getresponse().status


def test_hosts_by_which_the_server_is_known_are_answered(loaded: LoadedModel) -> None:
    with served(loaded) as port:
        for host in ("localhost", "LOCALHOST", "127.0.0.1", f"[::1]:{port}"):
            assert status(port, host) == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "[::2]", "", "a b"):
            assert status(port, host) == 400
    assert {"0.0.0.0", "10.1.2.3", socket.gethostname(), "localhost"} <= known_hosts("0.0.0.0", "10.1.2.3")
    assert known_hosts("lab.example", "10.1.2.3") == {"lab.example", "localhost", "127.0.0.1", "[::1]"}


def test_further_names_are_hosts_and_nothing_else() -> None:
    given = ServeSettings.model_validate({"names": ["live.example", "*.lab.example", "[fd00::1]"]})
    assert len(given.names) == 3
    for name in ("*", "http://live.example", "live.example:80", "a*"):
        with pytest.raises(ValueError, match="names"):
            ServeSettings.model_validate({"names": [name]})


def test_the_address_that_is_printed_can_be_opened() -> None:
    assert [url_host(host, "10.1.2.3") for host in ("127.0.0.1", "::1", "lab.example")] == [
        "127.0.0.1", "[::1]", "lab.example",
    ]  # fmt: skip
    assert [url_host(host, "10.1.2.3") for host in ("0.0.0.0", "::")] == ["10.1.2.3"] * 2
    assert url_host("::", "fd00::1") == "[fd00::1]"
    assert url_host("0.0.0.0", "127.0.0.1") == socket.gethostname()
    assert in_brackets("127.0.0.1") == "127.0.0.1"


def test_it_listens_on_an_ipv6_address(world: World, loaded: LoadedModel) -> None:
    try:
        socket.socket(socket.AF_INET6).bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    lines: list[str] = []
    settings = ServeSettings.model_validate({"model": str(world.model), "host": "::1", "port": free_port()})
    serve_live(settings, dry_run=True, report=lines.append)
    assert "at most 16 sessions" in lines[0]
    with served(loaded, host="::1") as port, connect(f"ws://[::1]:{port}/session", open_timeout=30) as client:
        assert hear(client)["type"] == "session"


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", ""])
def test_an_address_of_elsewhere_is_one_line(host: str, one_line: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        bound(host, 18000).close()
    one_line(error, f"cannot listen on {host}:18000: ")
