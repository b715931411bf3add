"""A Ray that a job starts for itself is reached from this machine alone, and there only with its token."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.conftest import REPOSITORY

JOB = """
import json, os, urllib.error, urllib.request
import ray
import psutil  # Ray brings it along
from emolab.cluster import ClusterSettings, connected

def status(token):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(os.environ["RAY_API_SERVER_ADDRESS"] + "/api/jobs/", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code

with connected(ClusterSettings(cpus=1)):
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    me = psutil.Process()
    listening = sorted({
        connection.laddr.ip.removeprefix("::ffff:")
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    })
    answers = [status(token) for token in (None, "of-somebody-else", os.environ.get("RAY_AUTH_TOKEN"))]
left = {name: os.environ.get(name) for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE")}
print(json.dumps({"listening": listening, "answers": answers, "left": left}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a job sees that nobody has told anything about Ray."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    roots = os.pathsep.join(str(REPOSITORY / root) for root in ("platform", "model"))
    folders = {"HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": roots}
    result = subprocess.run(
        [sys.executable, "-c", JOB], env=known | folders, capture_output=True, text=True, timeout=280, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path_factory.getbasetemp().glob("home*/.ray/auth_token")), "a token was left in a file"
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.ray
def test_every_port_of_it_is_on_loopback(seen: dict[str, Any]) -> None:
    assert seen["listening"] == ["127.0.0.1"]


@pytest.mark.ray
def test_who_has_no_token_is_turned_away(seen: dict[str, Any]) -> None:
    without, wrong, right = seen["answers"]
    assert without == 401
    assert wrong in (401, 403)
    assert right == 200


@pytest.mark.ray
def test_a_cluster_that_is_joined_later_is_not_taken_for_a_local_one(seen: dict[str, Any]) -> None:
    assert seen["left"] == {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": None, "RAY_AUTH_MODE": "token"}
