"""What jobs/train.py tells, and what a tracker that cannot be reached costs it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from tests.tracking.tracking_server import free_port

from emolab.cluster import ClusterSettings, connected
from emolab.doctor import examine
from emolab.names import UserError
from emolab.registry.training import train_and_register
from emolab.sessions.manifest import read_manifest
from emolab.training.recipe import TrainSettings


def settings_of(data: Path, output: Path, **values: object) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "data": str(data),
            "output": str(output),
            "model": {"d_model": 8, "layers": 1, "heads": 2},
            "training": {"epochs": 2, "batch_size": 8},
        }
        | values
    )


def test_a_score_stands_beside_the_same_score_of_the_class_prior_and_the_end_is_told_again(
    toy_data: Path, tmp_path: Path
) -> None:
    settings, first, again = settings_of(toy_data, tmp_path, tracking={"enabled": False}), list[str](), list[str]()
    train_and_register(settings, dry_run=False, report=first.append)
    train_and_register(settings, dry_run=False, report=again.append)
    prior = read_manifest(toy_data).class_prior_macro_f1
    for lines in (first, again):
        assert sum(f"(class prior {prior:.4f})" in line for line in lines) == 1
    assert sum(line.startswith("epoch ") for line in first) == 2
    assert not any("finished before" in line for line in first)
    assert any(line.startswith("finished before, after 2 epochs") for line in again)


def test_a_dead_tracker_costs_the_registration_but_not_the_training(toy_data: Path, tmp_path: Path) -> None:
    dead = {"uri": f"http://127.0.0.1:{free_port()}"}
    lines: list[str] = []
    settings = settings_of(toy_data, tmp_path, tracking=dead, register_as="mine")
    assert train_and_register(settings, dry_run=False, report=lines.append) is not None
    assert lines[-1].startswith("version not registered: the tracker cannot be reached")


def test_the_doctor_sees_that_a_tracker_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    (tracker,) = [finding for finding in examine("smoke") if finding.topic == "tracker"]
    assert not tracker.good
    assert "cannot be reached" in tracker.detail


def test_the_command_can_be_called_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["emolab", "doctor", "--preset", "smok"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("emolab", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown preset 'smok', did you mean 'smoke'?")


def test_a_command_that_is_interrupted_while_it_imports_ends_with_one_line() -> None:
    program = """
import builtins, os, signal
from emolab.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
usual = builtins.__import__
def interrupting(name, *given, **named):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGINT)
    return usual(name, *given, **named)
builtins.__import__ = interrupting
main(["doctor"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_ray_that_does_not_come_up_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def overloaded(**_: object) -> None:
        raise Exception("\nThe current node timed out during startup.\nmany lines of logs")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", overloaded)
    with pytest.raises(UserError) as error, connected(ClusterSettings(address="local")):
        pass
    assert str(error.value).startswith("Ray did not start (The current node timed out during startup.)")
    assert "\n" not in str(error.value)
