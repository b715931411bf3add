"""A command that is printed works when it is pasted: a shell and the job read back exactly what was meant."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import REPOSITORY

from emolab.commands import beside_interpreter, job_command, tool_command
from emolab.configuration import Settings, parse
from emolab.names import UserError
from emolab.registry.promotion import PromoteSettings
from emolab.studies.report import ReportSettings
from emolab.studies.robustness import RobustnessSettings
from emolab.training.recipe import TrainSettings

ODD = ["runs", "my runs", "it's", "2026", "1.5", "null", "true", "-o", "a: b", "[x]", "$HOME", "ä", "#1", "a=b", "*"]
texts = st.sampled_from(ODD)
tracking = st.fixed_dictionaries({}, optional={"uri": st.none() | texts, "experiment": texts})
jobs = st.one_of(
    st.builds(ReportSettings, run=texts, output=texts, runs=texts, tables=st.none() | texts, tracking=tracking),
    st.builds(
        RobustnessSettings,
        model=texts | st.lists(texts, min_size=1, max_size=3).map(tuple),
        data=texts,
        output=texts,
        bfloat16=st.booleans(),
        tracking=tracking,
    ),
    st.builds(PromoteSettings, model=texts, evaluate=st.none() | texts, output=texts, tracking=tracking),
    st.builds(
        TrainSettings,
        data=texts,
        output=texts,
        workers=st.fixed_dictionaries({}, optional={"count": st.integers(1, 4), "cpus": st.floats(0.5, 4)}),
        training=st.fixed_dictionaries({}, optional={"decay_epochs": st.lists(st.integers(1, 9))}),
        tracking=tracking,
    ),
)


def as_a_shell_reads(command: str) -> list[str]:
    """The words of a command, as a real shell hands them to a program."""
    show = f"{shlex.quote(sys.executable)} -c 'import sys; print(repr(sys.argv[1:]))'"
    shown = subprocess.run(["/bin/sh", "-c", f"{show} {command}"], capture_output=True, text=True, check=True)
    return list(ast.literal_eval(shown.stdout))


@given(settings=jobs)
def test_a_job_reads_back_the_settings_that_its_command_was_made_of(settings: Settings) -> None:
    words = shlex.split(job_command("any", settings))
    assert words[1] == "jobs/any.py"
    assert parse(type(settings), words[2:], description="")[0] == settings


def test_a_shell_hands_over_every_word_as_it_was_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where `*` would find a file
    (tmp_path / "a file").touch()
    for text in ODD:
        settings = ReportSettings.model_validate({"run": text, "runs": text, "tracking": {"uri": text}})
        words = as_a_shell_reads(job_command("report", settings))
        assert parse(ReportSettings, words[2:], description="")[0] == settings
        assert as_a_shell_reads(tool_command("mlflow", "ui", text))[1:] == ["ui", text]


def test_what_stands_in_a_file_is_not_said_again(tmp_path: Path) -> None:
    file = tmp_path / "the best.yaml"
    file.write_text(yaml.safe_dump({"training": {"epochs": 7}}))
    words = shlex.split(job_command("train", TrainSettings(output="elsewhere"), config=file))
    assert words[2:] == ["--config", str(file), "--output", "elsewhere"]
    assert parse(TrainSettings, words[2:], description="")[0].training.epochs == 7


def test_a_password_is_left_out_and_asked_for_by_whoever_pastes() -> None:
    settings = ReportSettings.model_validate({"run": "a", "tracking": {"uri": "http://me:hunter22@tracker:5000"}})
    command = job_command("report", settings)
    assert "hunter22" not in command
    words = as_a_shell_reads(command)  # a mask is no redirection into a file
    with pytest.raises(UserError, match="a secret was left out here"):
        parse(ReportSettings, words[2:], description="")
    assert "hunter22" not in tool_command("optuna-dashboard", "postgresql://me:hunter22@host/studies")
    assert len(as_a_shell_reads(tool_command("optuna-dashboard", "postgresql://me:hunter22@host/studies"))) == 2


@pytest.mark.parametrize(
    ("given_uri", "variable", "told"),
    [
        (None, "http://tracker:5000", "http://tracker:5000"),
        ("http://mine:1", "http://tracker:5000", "http://mine:1"),
        (None, "http://me:hunter22@tracker:5000", None),  # it stays where the job finds it
        (None, None, None),
    ],
)
def test_a_tracker_of_the_environment_is_named(
    given_uri: str | None, variable: str | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    settings = ReportSettings.model_validate({"run": "a", "tracking": {"uri": given_uri}})
    words = shlex.split(job_command("report", settings))
    assert parse(ReportSettings, words[2:], description="")[0].tracking.uri == told


@pytest.mark.parametrize(
    ("interpreter", "script", "python", "job"),
    [
        ("python", "jobs/tune.py", "python", "jobs/report.py"),
        (".venv/bin/python", "../lab/jobs/tune.py", ".venv/bin/python", "../lab/jobs/report.py"),
        ("python3", "/usr/bin/pytest", "python3", "jobs/report.py"),
        ("", "", "python", "jobs/report.py"),
    ],
)
def test_a_job_is_called_as_the_one_that_runs(
    interpreter: str, script: str, python: str, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", [interpreter])
    monkeypatch.setattr(sys, "argv", [script])
    assert shlex.split(job_command("report", ReportSettings(run="a")))[:2] == [python, job]


def test_a_program_is_taken_from_beside_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "mlflow"
    program.parent.mkdir()
    program.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["bin/python", "jobs/tune.py"])
    assert tool_command("mlflow", "ui") == "bin/mlflow ui"
    assert tool_command("optuna-dashboard") == "optuna-dashboard"  # on PATH, or nowhere
    monkeypatch.setattr(sys, "orig_argv", ["python", "jobs/tune.py"])
    assert beside_interpreter("mlflow") is None


def strings_of(path: Path) -> list[str]:
    """String constants of a module, parts of formatted ones too."""
    tree = ast.parse(path.read_text("utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_no_other_module_writes_a_command_by_hand() -> None:
    """`python jobs/...` in a text was wrong wherever the output folder was not the usual one."""
    known: dict[str, Any] = {}
    for path in sorted((REPOSITORY / "platform").rglob("*.py")):
        for text in strings_of(path):
            if any(part in text for part in ("python jobs/", "optuna-dashboard ", "mlflow ui", "emolab deliver ")):
                known[os.fspath(path.relative_to(REPOSITORY))] = text
    assert known == {}
