"""`ray job submit` against a real cluster, in both ways of shipping the code."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.ports import free_port

pytestmark = pytest.mark.timeout(900)  # the first test waits for the cluster too
BIN = Path(sys.executable).parent
SHORT = ("tuning.trials=1", "tuning.final_workers=1")
"""The whole preset is run by the tests of the jobs; here it is the submission that matters."""


def clean_environment() -> dict[str, str]:
    """Without what this test process knows of its own cluster: the command line would follow it there."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return known | {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would track, as a clone would have it."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def head(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`ray start --head` in the repository, on ports of its own; yields the dashboard's address."""
    port, dashboard = free_port(), free_port()
    # Nothing runs any more when it ends: no half minute of draining.
    environment = clean_environment() | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    log = tmp_path_factory.mktemp("head") / "output.log"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, log.open("wb") as output:
        arguments = [
            f"--port={port}",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",  # its default is taken where another cluster runs
            "--num-cpus=2",
            f"--temp-dir={folder}",
            "--block",
        ]
        process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", *arguments],
            cwd=repository,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{dashboard}/api/version", process, log)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            process.send_signal(signal.SIGTERM)  # --block ends what it started
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a process answers there.

    Args:
        log: what the process says.
    """
    for _ in range(360):  # a busy machine takes its time; what is waited for is that it comes up at all
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"{url}: {log.read_text()[-3000:]}")


def submit(head: str, cwd: Path, *arguments: str) -> str:
    environment = clean_environment()
    for _ in range(30):
        result = subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", head, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        if "No available agent to submit job" not in result.stdout + result.stderr:
            break
        time.sleep(1)  # the cluster has only just started
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_runs_in_the_repository_of_the_head(head: str, repository: Path) -> None:
    output = submit(head, repository, "--", "python", "jobs/tune.py", "--preset", "smoke", *SHORT)
    assert "succeeded" in output
    assert "models:/edu-emotionnet/1" in output
    assert list(repository.glob("runs/search-*/report.html"))


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_uploaded_code_runs_where_only_the_dependencies_are_installed(head: str, repository: Path) -> None:
    marker = repository / "jobs" / "tune_and_tell.py"
    marker.write_text(
        "import runpy, emolab, edu_emotionnet\n"
        "print('from', emolab.__file__, edu_emotionnet.__file__, flush=True)\n"
        "runpy.run_path('jobs/tune.py', run_name='__main__')\n"
    )
    variables = '{"env_vars": {"PYTHONPATH": "platform:model"}}'
    upload = ("--working-dir", ".", "--runtime-env-json", variables)
    results = repository.parent / "results"
    output = submit(
        head, repository, *upload, "--",
        "python", "jobs/tune_and_tell.py", "--preset", "smoke", *SHORT, "--output", str(results),
        "--data", str(results / "data"), f"prepare.output={results / 'data'}",
    )  # fmt: skip
    assert "succeeded" in output
    assert output.count("/runtime_resources/working_dir_files/") >= 2, output
    assert list(results.glob("search-*/report.html"))
