"""The jobs as a user calls them: real processes, real files, one line for a mistake."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tests.conftest import REPOSITORY

from emolab.configuration import parse
from emolab.training.recipe import TrainSettings

pytestmark = pytest.mark.timeout(900)  # the first test waits for the whole path from nothing too


def command(job: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A job as a process of its own: what to call, and its environment."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = known | {"PYTHONPATH": "", "RAY_AUTH_MODE": "disabled"}
    return [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *arguments], environment


def run(job: str, *arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    call, environment = command(job, *arguments)
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, env=environment, timeout=280)


class Ended(NamedTuple):
    status: int
    output: str
    errors: str


def run_here(
    job: str, *arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ended:
    """The script itself in this process, on the Ray of these tests: without a process's seconds of imports."""
    script = REPOSITORY / "jobs" / f"{job}.py"
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    status = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return Ended(status, *capsys.readouterr())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole path from nothing, as `python jobs/tune.py --preset smoke` goes it."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "search_spaces").symlink_to(REPOSITORY / "search_spaces")
    return folder, run("tune", "--preset", "smoke", cwd=folder)


Smoke = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_tuning_from_nothing_ends_with_all_that_was_promised(smoke: Smoke) -> None:
    folder, result = smoke
    assert result.returncode == 0, result.stderr[-3000:]
    for part in (
        "best parameters: training.kl_weight=",
        "class prior",
        "ceiling",
        "mlflow ui --backend-store-uri sqlite:///",
        "optuna-dashboard sqlite:///",
        "report.html",
        "models:/edu-emotionnet/1",
        "alias challenger",
        "complete",
    ):
        assert part in result.stdout, part
    assert "Traceback" not in result.stderr
    (report,) = folder.glob("runs/search-*/report.html")
    page = report.read_text()
    assert page.count("<svg") >= 3
    for stranger in ("http://", "https://", "src="):
        assert stranger not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
            "http://purl.org", ""
        ).replace("http://creativecommons.org", "")
    (best,) = folder.glob("runs/search-*/best.yaml")
    assert set(yaml.safe_load(best.read_text())) == {"model", "training"}


@pytest.mark.slow
def test_tuning_says_which_model_it_kept_and_prints_commands_that_work(
    smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = smoke
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert "goes to the registry as edu-emotionnet, is the model that was trained again" in result.stdout
    monkeypatch.chdir(folder)
    best = shlex.split(lines["best"])
    assert best[:2] == [sys.executable, str(REPOSITORY / "jobs" / "train.py")]  # as the job itself was called
    settings, _ = parse(TrainSettings, best[2:], description="")
    (said,) = re.findall(r"training the best configuration \(trial \d+\) with (\d+) worker", result.stdout)
    assert settings.workers.count == int(said)
    assert settings.model.options.d_model == 16  # what best.yaml holds
    dashboard, url = shlex.split(lines["study"])
    assert Path(dashboard).name == "optuna-dashboard"
    assert Path(url.removeprefix("sqlite:///")).is_file()
    there = shutil.which(dashboard, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert ("pip install --constraint constraints.txt optuna-dashboard" in result.stdout) == (there is None)


@pytest.mark.slow
@pytest.mark.ray
def test_tuning_again_finds_everything_done(
    smoke: Smoke, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = run_here("tune", "--preset", "smoke", cwd=smoke[0], monkeypatch=monkeypatch, capsys=capsys)
    assert again.status == 0, again.errors[-3000:]
    assert "resuming: 3 trials are finished, 0 were interrupted" in again.output
    assert "models:/edu-emotionnet/1" in again.output
    assert "was trained before: nothing is left to train" in again.output
    assert "training the best configuration" not in again.output


@pytest.mark.parametrize(
    ("job", "arguments", "parts"),
    [
        ("train", ["training.epocs=3"], ["training.epocs", "did you mean 'epochs'"]),
        ("train", ["--data", "nowhere"], ["nowhere", "jobs/prepare.py"]),
        ("prepare", ["--corpus", "mosii"], ["mosii", "did you mean 'mosi'"]),
        ("prepare", ["--corpus", "mosi"], ["mosi", "--source"]),
        ("prepare", ["--corpus", "mosi", "--source", "nowhere", "--output", "x"], ["nowhere"]),
        ("prepare", ["options.sesions=3"], ["options.sesions", "did you mean 'sessions'"]),
        ("prepare", ["options.sessions=-3"], ["sessions"]),
        ("tune", ["--preset", "smok"], ["smok", "did you mean 'smoke'"]),
        ("tune", ["--preset", "smoke", "--register-as", "a/b"], ["registered model name 'a/b' is not allowed"]),
        ("tune", ["--preset", "smoke", "--checkpoints", "foo"], ["checkpoints=foo", "s3://"]),
        ("compare", ["models=[mult,mulltt]"], ["mulltt", "did you mean 'mult'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_two(
    job: str,
    arguments: list[str],
    parts: list[str],
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = run_here(job, *arguments, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert ended.status == 2
    (line,) = [line for line in ended.errors.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.slow
@pytest.mark.ray
def test_more_workers_than_cpus_is_refused_and_does_not_wait(
    smoke: Smoke, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--preset", "smoke", "tuning.final_workers=500")
    ended = run_here("tune", *arguments, cwd=smoke[0], monkeypatch=monkeypatch, capsys=capsys)
    assert ended.status == 2
    assert "500 CPU needed" in ended.errors


def test_a_dry_run_starts_nothing(smoke: Smoke, tmp_path: Path) -> None:
    folder, _ = smoke
    result = run("train", "--data", str(folder / "data" / "edusim-smoke"), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "at most 50 epochs" in result.stdout
    assert not list(tmp_path.iterdir())


LONG = ["--preset", "smoke", "training.epochs=500", "training.patience=500"]
STOPPED = {
    "search": ("tune", "trial ", ["--preset", "smoke", "tuning.trials=200"]),
    "distributed training": ("train", "epoch ", [*LONG, "workers.count=2"]),
    "trials of several workers": ("tune", "trial ", ["--preset", "smoke", "workers.count=2", "tuning.trials=40"]),
    "population": ("tune", "epoch ", [*LONG, "tuning.scheduler=pbt", "tuning.sampler=random", "tuning.trials=4"]),
}
"""A job, what it says once it is at work, and how it is called so that there is much of it."""
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
FIRST = ("search", signal.SIGINT)
"""What `make test` tries; `make scenarios` tries all."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "number", "status"),
    [
        pytest.param(what, number, status, marks=[] if (what, number) == FIRST else pytest.mark.scenario)
        for what in STOPPED
        for number, status in SIGNALS.items()
    ],
)
def test_a_job_that_is_stopped_says_so_in_one_line_and_leaves_no_process(
    what: str, number: signal.Signals, status: int, smoke: Smoke, tmp_path: Path
) -> None:
    """Ray, Kubernetes and batch systems stop a job with SIGTERM, people with Ctrl-C."""
    (tmp_path / "data").symlink_to(smoke[0] / "data")
    (tmp_path / "search_spaces").symlink_to(REPOSITORY / "search_spaces")
    job, at_work, arguments = STOPPED[what]
    call, environment = command(job, *arguments)
    # Ctrl-C reaches every process of a terminal; here only the job gets it, and must end the others itself.
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        for line in process.stdout:
            if line.startswith(at_work):
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors[-3000:]
    lines = [line for line in errors.splitlines() if line.strip()]
    assert lines == ["interrupted: run the same command again to continue"]
    deadline = time.monotonic() + 120  # those that it told to end may take a moment
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


def _session(leader: int) -> str:
    """Command lines of the processes of a session."""
    return subprocess.run(["ps", "-o", "args=", "--sid", str(leader)], capture_output=True, text=True).stdout
