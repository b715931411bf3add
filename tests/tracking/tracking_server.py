"""A real MLflow server on loopback, and a gate before it that loses questions and answers."""

import http.client
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A server with one worker; what it holds lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


class Gate(ThreadingHTTPServer):
    """Forwards requests; some it drops, and of some it drops the answer."""

    daemon_threads = True

    def __init__(self, upstream: int, *, seed: int, lose: float) -> None:
        super().__init__(("127.0.0.1", 0), _GateHandler)
        self.upstream, self.lose = upstream, lose
        self.random = random.Random(seed)
        self.lost_questions = self.lost_answers = self.passed = 0
        self.delay = 0.0
        """Seconds for which every request waits; those under way as well wait no longer once it is 0."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _GateHandler(BaseHTTPRequestHandler):
    server: Gate
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        gate = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        came = time.monotonic()
        while time.monotonic() < came + gate.delay:
            time.sleep(0.02)
        fate = gate.random.random()
        if fate < gate.lose / 2:
            gate.lost_questions += 1
            return self.send_error(500)
        connection = http.client.HTTPConnection("127.0.0.1", gate.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if fate < gate.lose:
            gate.lost_answers += 1
            return self.send_error(500)
        gate.passed += 1
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type") or "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    do_GET = do_POST = do_PUT = do_PATCH = do_any  # noqa: N815 - the names that the base class calls

    def log_message(self, *args: object) -> None:
        """Silent."""


@contextmanager
def gate(upstream: int, *, seed: int = 0, lose: float = 0.0) -> Iterator[Gate]:
    """A gate before the server on port ``upstream``.

    Args:
        lose: share of the requests that end with status 500, half of them after they were carried out.
    """
    server = Gate(upstream, seed=seed, lose=lose)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
