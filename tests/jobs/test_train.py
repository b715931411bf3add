"""What jobs/train.py tells, and what a tracker that cannot be reached costs it."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from tests.ports import free_port

from emolab import cluster
from emolab.cluster import ClusterSettings, connected
from emolab.doctor import Finding, examine, print_findings
from emolab.job import run_job
from emolab.locks import holding
from emolab.names import UserError
from emolab.registry.training import train_and_register
from emolab.sessions.manifest import read_manifest
from emolab.training import readiness
from emolab.training.recipe import TrainSettings


def settings_of(data: Path, output: Path, /, **values: object) -> TrainSettings:
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


def test_the_papers_size_on_cpus_is_told_in_one_line(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for model in ({}, {"d_model": 8, "heads": 2}):
        settings = settings_of(toy_data, tmp_path, model=model, tracking={"enabled": False})
        train_and_register(settings, dry_run=True, report=lambda _: None)
        told.append(capsys.readouterr().err)
    line = "the paper's size, without a GPU: this takes long; --preset small is sized for CPU cores\n"
    assert told == [line if not torch.cuda.is_available() else "", ""]


def damaged(data: Path, folder: Path) -> Path:
    """A copy of a data set with one flipped byte in a training shard."""
    copy = Path(shutil.copytree(data, folder / "damaged"))
    shard = next((copy / "train").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return copy


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"name": "my run"}, ("run name 'my run' is not allowed",)),
        ({"tracking": {"uri": "foo"}}, ("tracking.uri=foo is no address of a tracker", "http://host:port")),
        ({"tracking": {"uri": "http://"}}, ("tracking.uri=http:// is no address of a tracker",)),
        ({"checkpoints": "foo"}, ("checkpoints=foo", "s3://bucket/prefix")),
        ({"register_as": "a/b"}, ("registered model name 'a/b' is not allowed",)),
        ({"data": "damaged"}, ("is damaged: its SHA-256 differs",)),
        ({"model": {"d_model": 8_000_000}}, ("parameters here: training takes at least", "choose a smaller model")),
        ({"workers": {"count": 50}}, ("training with 50 workers cannot run here: 50 CPU needed, 2 in the cluster",)),
        ({"workers": {"count": 2}, "data": "damaged"}, ("is damaged: its SHA-256 differs",)),
    ],
)
def test_what_a_training_cannot_use_is_refused_before_the_plan_is_told_and_anything_is_written(
    ray_cluster: None,
    toy_data: Path,
    tmp_path: Path,
    one_line: Callable[..., None],
    values: dict[str, Any],
    parts: tuple[str, ...],
    dry_run: bool,
) -> None:
    if "data" in values:
        values = values | {"data": str(damaged(toy_data, tmp_path))}
    with pytest.raises(UserError) as error:
        train_and_register(
            settings_of(toy_data, tmp_path / "runs", **values), dry_run=dry_run, report=lambda _: pytest.fail()
        )
    one_line(error, *parts)
    assert not (tmp_path / "runs").exists()


def test_the_address_of_the_environment_is_named_where_it_is_none(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI=mlruns is no address of a tracker"):
        train_and_register(settings_of(toy_data, tmp_path), dry_run=True, report=print)


def test_a_worker_that_no_node_can_hold_is_refused(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, toy_data: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 1.0}, {"CPU": 1.0}])
    wide = settings_of(toy_data, tmp_path, workers={"count": 1, "cpus": 2.0})
    with pytest.raises(UserError, match="a worker needs 2 CPU and 0 GPU of one node, and the largest node has 1 CPU"):
        readiness.check_room(wide.workers, count=1, purpose="training with 1 workers")


def allocate() -> None:
    torch.empty(2**55)


def test_an_allocation_that_fails_is_one_line_here_and_in_another_process(
    ray_cluster: None, capsys: pytest.CaptureFixture[str], one_line: Callable[..., None]
) -> None:
    line = f"the memory does not suffice (DefaultCPUAllocator: can't allocate memory: you tried to allocate {2**57}"
    with pytest.raises(UserError) as remote:
        try:
            ray.get(ray.remote(allocate).remote())
        except RayTaskError as error:
            raise cluster.user_error(error) from None
    one_line(remote, line, "choose a smaller model, or a smaller batch")
    with pytest.raises(SystemExit, match="2"):
        run_job(allocate)
    assert capsys.readouterr().err == f"error: {remote.value}\n"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_finished_run_says_that_it_reads_nothing_and_another_configuration_is_refused(
    toy_data: Path, tmp_path: Path, dry_run: bool
) -> None:
    """With a damaged shard and more workers than there are CPUs: neither is needed any more."""
    values: dict[str, Any] = {"tracking": {"enabled": False}, "name": "mine", "data": str(tmp_path / "damaged")}
    shutil.copytree(toy_data, tmp_path / "damaged")
    train_and_register(settings_of(toy_data, tmp_path, **values), dry_run=False, report=lambda _: None)
    shutil.rmtree(tmp_path / "damaged")
    damaged(toy_data, tmp_path)
    lines: list[str] = []
    again = settings_of(toy_data, tmp_path, **values, workers={"count": 50})
    train_and_register(again, dry_run=dry_run, report=lines.append)
    assert any("nothing is left to train, and the data are not read again" in line for line in lines)
    other = settings_of(toy_data, tmp_path, **values, training={"epochs": 3})
    with pytest.raises(UserError, match="mine holds a run with another configuration: choose another name"):
        train_and_register(other, dry_run=dry_run, report=lambda _: pytest.fail())


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_folder_with_somebody_elses_files_is_left_alone(toy_data: Path, tmp_path: Path, dry_run: bool) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("mine")
    settings = settings_of(toy_data, tmp_path, name="occupied", tracking={"enabled": False})
    with pytest.raises(UserError, match=r"occupied is not empty and holds no run \(thesis.tex\): choose another name"):
        train_and_register(settings, dry_run=dry_run, report=lambda _: pytest.fail())
    assert [path.name for path in occupied.iterdir()] == ["thesis.tex"]


def test_what_a_killed_process_has_left_of_its_beginning_is_no_obstacle(toy_data: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with holding(begun, what="run"):
        (begun / ".run.key.1.partial").write_text("half")
    assert {path.name for path in begun.iterdir()} >= {"holder.json"}
    settings = settings_of(toy_data, tmp_path, name="begun", tracking={"enabled": False})
    assert train_and_register(settings, dry_run=False, report=lambda _: None) is not None


def test_a_training_that_goes_on_says_from_where_once(toy_data: Path, tmp_path: Path) -> None:
    settings, lines = settings_of(toy_data, tmp_path, tracking={"enabled": False}), list[str]()

    def broken_off(line: str) -> None:
        if line.startswith("epoch   1/2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_register(settings, dry_run=False, report=broken_off)
    train_and_register(settings, dry_run=False, report=lines.append)
    assert [line for line in lines if "resuming" in line] == ["resuming after epoch 1 of 2"]
    assert lines[2].startswith("epoch   2/2")


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
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["[lab]", "x[/lab]"])
def test_the_doctor_shows_what_it_found_as_it_is(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"sqlite:////data/{folder}/mlflow.db"
    assert print_findings([Finding(topic="tracker", good=True, detail=address)])
    assert address in capsys.readouterr().out


def test_the_doctor_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tracker,) = [finding for finding in examine("smoke") if finding.topic == "tracker"]
    assert tracker.good and "runs/mlflow.db is missing and will be made" in tracker.detail
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["doctor", "--preset", "smok"], "error: unknown preset 'smok', did you mean 'smoke'?"),
        (["doctr"], "error: argument command: invalid choice: 'doctr' (choose from "),
        (["verify"], "error: the following arguments are required: folder"),
    ],
)
def test_the_command_can_be_called_as_a_module_and_says_what_is_wrong_in_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["emolab", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("emolab", run_name="__main__")
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


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
