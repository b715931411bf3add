"""`mlflow models serve` with the registered version: a real HTTP client, answers as the model's, refusals as 4xx."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ports import free_port
from tests.serving.parts import World, clean_environment

from emolab.registry.lookup import kept_model
from emolab.serving.models import load
from emolab.sessions.selection import load_selection_split

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[tuple[World, str]]:
    port = free_port()
    log = (world.runs / "server.log").open("w")
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "--model-uri", world.uri, "--host",
         "127.0.0.1", "--port", str(port), "--env-manager", "local", "--workers", "1"],
        env=clean_environment(
            MLFLOW_TRACKING_URI=world.tracker.uri, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        ),
        cwd=world.runs, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/ping", process, world.runs / "server.log")
        yield world, f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        log.close()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
    raise TimeoutError(log.read_text()[-3000:])


def post(url: str, content: bytes) -> Any:
    request = urllib.request.Request(url, data=content, headers={"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def test_a_session_is_answered_as_the_model_answers(served: tuple[World, str]) -> None:
    world, url = served
    session = world.sessions["validation"][0]
    given: dict[str, Any] = {"session_id": session.session_id}
    for name, values in session.features.items():
        given |= {name: values.tolist(), f"{name}_present": session.present[name].tolist()}
    (answer,) = post(url, json.dumps({"inputs": [given]}).encode())["predictions"]
    with torch.no_grad():
        said = load(kept_model(world.model)).model(
            load_selection_split(world.data, world.manifest, "validation").batch([0])
        )
    assert answer["classes"] == world.manifest.classes
    np.testing.assert_allclose(answer["probabilities"], said.log_probabilities[0].exp(), atol=1e-6)
    np.testing.assert_allclose(answer["confidence"], said.confidence[0], atol=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"inputs": 3}',
        b'{"inputs": [{"audio": [[1, 2]]}]}',
        b'{"inputs": [{"session_id": "x"}]}',
        b'{"inputs": [{"session_id": "x", "audio": [[1, 2]]}]}',
        b'{"inputs": [{"session_id": "x", "text": [["a", 2, 3]]}]}',
        b'{"inputs": [{"session_id": "x", "text": [[1, 2, 3]], "text_present": [true, false]}]}',
    ],
)
def test_malformed_input_is_refused_and_the_server_goes_on(served: tuple[World, str], content: bytes) -> None:
    _, url = served
    with pytest.raises(urllib.error.HTTPError) as error:
        post(url, content)
    assert 400 <= error.value.code < 500, error.value.read()[:2000]
    fine = {"inputs": [{"session_id": "x", "text": [[1.0, 2.0, 3.0]]}]}
    assert post(url, json.dumps(fine).encode())["predictions"][0]["session_id"] == "x"
