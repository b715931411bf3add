"""jobs/serve.py for real: one server, driven by WebSocket clients and by a browser, ended by a signal."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import ray
import torch
from ray.util.state import list_actors
from tests.conftest import REPOSITORY
from tests.docs.guides import run_section
from tests.ports import free_port
from tests.serving.browser import CHROMIUM, browse
from tests.serving.parts import LATE_FUSION, World, clean_environment, keep_model
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving.models import load
from emolab.serving.recordings import recordings
from emolab.serving.server import ServeSettings, serve_live

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SESSIONS, IDLE = 3, 15
BRIEF = 2.5


@dataclass(frozen=True, kw_only=True)
class Server:
    world: World
    port: int
    process: subprocess.Popen[str]

    def open(self, **options: Any) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}/session", open_timeout=30, max_size=None, **options)

    def get(self, path: str) -> bytes:
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20).read()


@pytest.fixture(scope="module")
def server(world: World, ray_cluster: None) -> Iterator[Server]:
    options = [
        "--model", world.uri, "--output", str(world.runs), "--demo", str(world.data), "--port", str(free_port()),
        "--sessions", str(SESSIONS), "--idle-seconds", str(IDLE), "--message-bytes", "5000",
    ]  # fmt: skip
    with started(world, *options, folder=world.runs) as server:
        yield server


@contextmanager
def started(world: World, *options: str, folder: Path) -> Iterator[Server]:
    """One on the tests' cluster, whose processes run in another folder."""
    address = f"cluster.address={ray.get_runtime_context().gcs_address}"
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "jobs" / "serve.py"), *options, address],
        env=clean_environment(), cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("session ws://"):
                break
        else:
            pytest.fail(process.stderr.read()[-3000:])
        port = urlsplit(line.split()[1]).port
        assert port is not None
        yield Server(world=world, port=port, process=process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ask(client: ClientConnection, message: Any) -> dict[str, Any]:
    client.send(message if isinstance(message, str | bytes) else json.dumps(message))
    return json.loads(client.recv(timeout=30))


def step(number: int, **features: Any) -> dict[str, Any]:
    return {"step": number, "features": features}


def test_a_recorded_session_is_answered_step_by_step(server: Server) -> None:
    shown = json.loads(server.get("/recordings"))
    assert [r["session_id"] for r in shown] == [s.session_id for s in server.world.sessions["validation"]]
    recorded = json.loads(server.get("/recordings/0"))
    loaded = load(kept_model(server.world.model))
    assert recorded == recordings(str(server.world.data), loaded)[0]
    stream = loaded.live(None).open()
    with server.open() as client:
        greeting = json.loads(client.recv(timeout=30))
        assert greeting["classes"] == ["low", "middle", "high"]
        assert greeting["dimensions"] == {"audio": 6, "visual": 4, "text": 3}
        assert greeting["recomputes"] is False
        for number in range(len(recorded["labels"])):
            features = {name: rows[number] for name, rows in recorded["features"].items()}
            said = ask(client, step(number, **features))
            vectors = {name: None if row is None else torch.tensor(row) for name, row in features.items()}
            expected = stream.step(vectors)
            assert said["probabilities"] == pytest.approx(expected.probabilities.tolist(), abs=1e-6)
            assert list(said["confidence"].values()) == pytest.approx(expected.confidence.tolist(), abs=1e-6)


def test_the_client_of_the_guide_to_python_is_answered(server: Server) -> None:
    found = run_section("A live session", {}, {"127.0.0.1:8000": f"127.0.0.1:{server.port}"})
    assert found["greeting"]["dimensions"] == {"audio": 6, "visual": 4, "text": 3}
    assert (found["answer"]["type"], found["answer"]["step"]) == ("prediction", 2)
    assert found["answer"]["present"] == {"audio": True, "visual": False, "text": False}


def test_malformed_messages_are_refused_and_other_sessions_undisturbed(server: Server) -> None:
    with server.open() as rude, server.open() as polite:
        greetings = [json.loads(client.recv(timeout=30)) for client in (rude, polite)]
        assert greetings[0] == greetings[1]
        bad = [
            ("{", "not_json"),
            (b"\x80\x04", "not_text"),
            ('{"step": 0, "features": {"text": [NaN, 0, 0]}}', "bad_features"),
            (step(0, text=[1.0]), "bad_features"),
            (step(0, face=[1.0]), "unknown_modality"),
            (step(7), "out_of_order"),
            ("x" * 6_000, "too_large"),
            ("x" * 3_000_000, "too_large"),
        ]
        alone = load(kept_model(server.world.model)).live(None).open()
        for number, (message, code) in enumerate(bad):
            refused = ask(rude, message)
            assert (refused["type"], refused["code"], refused["next_step"]) == ("error", code, 0)
            said = ask(polite, step(number))
            assert said["probabilities"] == pytest.approx(alone.step({}).probabilities.tolist(), abs=1e-6)
        assert ask(rude, step(0))["type"] == "prediction"  # the session goes on
        assert "was answered already" in ask(rude, step(0))["message"]


def test_an_oversized_frame_ends_its_own_session_alone(server: Server) -> None:
    with server.open() as other:
        other.recv(timeout=30)
        with server.open() as client, pytest.raises(ConnectionClosed):
            client.recv(timeout=30)
            client.send("x" * 20_000_000)
            client.recv(timeout=30)
        assert ask(other, step(0))["type"] == "prediction"


def test_sessions_are_bounded_and_places_are_given_back(server: Server) -> None:
    clients = [server.open() for _ in range(SESSIONS)]
    try:
        for client in clients:
            assert json.loads(client.recv(timeout=30))["type"] == "session"
        with server.open() as further:
            refused = json.loads(further.recv(timeout=30))
            assert refused["code"] == "too_many_sessions" and str(SESSIONS) in refused["message"]
            with pytest.raises(ConnectionClosed) as closed:
                further.recv(timeout=30)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
    finally:
        for client in clients:
            client.close()
    for _ in range(50):
        with server.open() as again:
            if json.loads(again.recv(timeout=30))["type"] == "session":
                return
        time.sleep(0.1)
    pytest.fail("no place was given back")


def test_a_strangers_page_cannot_open_a_session(server: Server) -> None:
    for origin in ("http://evil.example", "http://[", "null"):
        with pytest.raises(InvalidStatus) as refused, server.open(origin=origin) as client:
            client.recv(timeout=30)
        assert refused.value.response.status_code == 403
    with server.open(origin=f"http://127.0.0.1:{server.port}") as client:
        assert json.loads(client.recv(timeout=30))["type"] == "session"


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example"])
def test_a_strangers_name_for_this_machine_opens_nothing(server: Server, name: str) -> None:
    """DNS rebinding: a browser takes the page at that name, and the socket, for the same origin."""
    host = f"{name}:{server.port}"
    assert request(server, "/recordings/0", Host=host) == 400
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert request(server, "/session", Host=host, Origin=f"http://{host}", **upgrade) == 400
    own = f"localhost:{server.port}"
    assert request(server, "/session", Host=own, Origin=f"http://{own}", **upgrade) == 101


def request(server: Server, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path, headers=headers)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_who_sends_faster_than_it_is_answered_is_told_so_before_it_fills_the_memory(server: Server) -> None:
    sent: list[int] = []

    def flood(client: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            for number in range(20_000):  # 98 MB
                client.send(json.dumps(step(number)).ljust(4_900))
                sent.append(number)

    with server.open() as client:
        assert json.loads(client.recv(timeout=30))["type"] == "session"
        thread = Thread(target=flood, args=(client,))
        thread.start()
        codes = []
        with pytest.raises(ConnectionClosed):
            while True:
                codes.append(json.loads(client.recv(timeout=60)).get("code"))
        thread.join(60)
    assert codes[-1] == "too_many_unanswered"
    assert len(sent) < 5_000


def test_a_second_server_on_the_cluster_has_limits_of_its_own_and_leaves_the_first_alone(
    server: Server, tmp_path: Path
) -> None:
    world = server.world
    other = keep_model(tmp_path / "other", world.manifest, LATE_FUSION, run_id="other")
    demo = world.data.relative_to(world.runs.parent)
    before = server_processes()
    options = ["--model", str(other), "--demo", str(demo), "--port", "0", "--idle-seconds", str(BRIEF)]
    with started(world, *options, folder=world.runs.parent) as second:
        assert second.port != server.port
        assert [recomputes(each) for each in (server, second)] == [False, True]
        assert json.loads(second.get("/recordings")) == json.loads(server.get("/recordings"))
        with second.open() as client:
            client.recv(timeout=30)
            assert f"{BRIEF} s" in json.loads(client.recv(timeout=30))["message"]  # nothing was heard for so long
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=20)
        (lost,) = server_processes() - before
        os.kill(lost, signal.SIGKILL)
        _, errors = second.process.communicate(timeout=60)
        assert second.process.returncode == 2
        assert errors.count("\n") == 1 and errors.startswith("error: the server failed: ")
    assert recomputes(server) is False


def recomputes(server: Server) -> bool:
    """Of the model that answers there."""
    with server.open() as client:
        return json.loads(client.recv(timeout=30))["recomputes"]


def server_processes() -> set[int]:
    """On the tests' cluster."""
    found = list_actors(filters=[("class_name", "=", "LiveServer"), ("state", "=", "ALIVE")])
    return {int(actor.pid) for actor in found}


def test_the_page_is_whole_and_loads_nothing_from_anywhere(server: Server) -> None:
    page = server.get("/").decode()
    for stranger in ("https://", "src=", "href=", "@import"):
        assert stranger not in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http://") == 0
    with pytest.raises(urllib.error.HTTPError) as error:
        server.get("/recordings/999")
    assert error.value.code == 404


COUNT_SOCKETS = """
window.opened = [];
document.body.dataset.stage = 'clicked';
window.WebSocket = class extends WebSocket { constructor(address) { super(address); opened.push(address); } };
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_page_replays_a_session_in_a_browser(server: Server, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/?play&speed=20"
    with browse(str(CHROMIUM), tmp_path, address) as tab:
        tab.wait("document.body.dataset.stage === 'done'", seconds=60)
        steps = len(server.world.sessions["validation"][0].labels)
        assert f"{steps} steps, finished" in tab.evaluate("document.getElementById('status').textContent")
        assert tab.evaluate("document.querySelectorAll('#emotion-chart path').length") == 3
        assert tab.evaluate("document.querySelectorAll('#confidence-chart path').length") == 3
        shown = tab.evaluate("[...document.querySelectorAll('#emotions .number')].map(e => Number(e.textContent))")
        assert sum(shown) == pytest.approx(1.0, abs=0.01)
        tab.evaluate(COUNT_SOCKETS)
        tab.evaluate("for (let click = 0; click < 3; click++) document.getElementById('play').click()")
        tab.wait("document.body.dataset.stage === 'done'", seconds=60)
        assert tab.evaluate("opened.length") == 1  # two clicks came before their recordings: they took no session
        assert tab.errors == []


def test_two_servers_do_not_share_a_port(server: Server, one_line: Callable[..., None]) -> None:
    second = ServeSettings.model_validate({"model": str(server.world.model), "port": server.port})
    with pytest.raises(UserError) as error:
        serve_live(second, dry_run=True, report=lambda _: None)
    one_line(error, f"cannot listen on 127.0.0.1:{server.port}:")


def test_features_that_come_too_late_are_named_before_anybody_connects(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(kept_model(world.model))
    heard = {"options": {"audio": {"extractor": "mfcc"}}}
    monkeypatch.setattr("emolab.serving.server.load", lambda _: replace(loaded, dataset={**loaded.dataset, **heard}))
    lines: list[str] = []
    serve_live(ServeSettings(model=str(world.model), port=0), dry_run=True, report=lines.append)
    assert lines[-1].startswith("warning: ") and "mfcc" in lines[-1]


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """As they were, after a server in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_port_that_is_taken_meanwhile_is_one_line(
    server: Server, signal_handlers: None, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., None]
) -> None:
    monkeypatch.setattr("emolab.serving.server.bound", lambda *_: socket.socket())
    second = ServeSettings.model_validate({"model": str(server.world.model), "port": server.port})
    with pytest.raises(UserError) as error:
        serve_live(second, dry_run=False, report=lambda _: None)
    one_line(error, f"cannot listen on 127.0.0.1:{server.port}: Address already in use")


def test_a_server_without_a_free_cpu_says_what_it_waits_for_and_can_be_interrupted(
    server: Server, signal_handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emolab.serving.server._SLOW_START_SECONDS", 1.0)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if line.startswith("still starting"):
            os.kill(os.getpid(), signal.SIGINT)

    taken = ray.util.placement_group([{"CPU": 1.0}])
    try:
        ray.get(taken.ready(), timeout=60)
        second = ServeSettings.model_validate({"model": str(server.world.model), "port": 0})
        serve_live(second, dry_run=False, report=report)
    finally:
        ray.util.remove_placement_group(taken)
    assert lines[1:] == ["still starting: 0 of 2 CPU are free", "stopped"]


def test_it_ends_cleanly_on_a_signal(server: Server) -> None:
    """Last in this file."""
    with server.open() as client:
        client.recv(timeout=30)
        server.process.send_signal(signal.SIGINT)
        output, errors = server.process.communicate(timeout=90)
    assert server.process.returncode == 0, errors[-2000:]
    assert output.endswith("stopped\n")
    assert "Traceback" not in errors
    with pytest.raises(OSError):
        server.get("/")
