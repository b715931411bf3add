"""A secret that a job is given is in nothing that it writes or prints."""

import json
import os
import runpy
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import REPOSITORY

from emolab.configuration import parse, to_yaml, validate
from emolab.names import UserError
from emolab.redaction import MASK, is_secret_name, masked_key, redact, redacted
from emolab.training.recipe import TrainSettings

SECRET = "hunter2-in-an-address"
OF_THE_ENVIRONMENT = "correct-horse-battery-staple"

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """``python jobs/train.py`` with these arguments, in this process: its status, and everything it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        script = REPOSITORY / "jobs" / "train.py"
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stopped:
            return int(stopped.code or 0), "".join(capsys.readouterr())
        raise AssertionError("a job ends with a status")

    return run


def small(data: Path, output: Path) -> list[str]:
    model = ["model.d_model=16", "model.layers=1", "model.heads=2"]
    training = ["training.epochs=1", "training.batch_size=8", "training.warmup_epochs=0"]
    return ["--data", str(data), "--output", str(output), "--name", "scanned", "--preset", "smoke", *model, *training]


def address(database: Path, secret: str) -> str:
    """An SQLite tracker whose address carries two secrets, of which SQLite itself takes no notice."""
    return f"sqlite:///file:{database}?mode=rwc&uri=true&lease={OF_THE_ENVIRONMENT}&token={secret}"


def files_with(text: str, *folders: Path) -> list[str]:
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert paths
    return [str(path) for path in paths if text.encode() in path.read_bytes() or text in str(path)]


def test_a_training_leaves_its_secrets_nowhere(
    train: Train, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", OF_THE_ENVIRONMENT)
    monkeypatch.chdir(tmp_path)
    output, database = tmp_path / "runs", tmp_path / "tracker" / "mlflow.db"
    database.parent.mkdir()
    given = [*small(toy_data, output), f"tracking.uri={address(database, SECRET)}"]
    status, printed = train(*given)
    assert status == 0, printed
    for secret in (SECRET, OF_THE_ENVIRONMENT):
        assert files_with(secret, tmp_path) == []
        assert secret not in printed

    # The scan would have found it: what stands beside the secret is there, wherever the secret would have been.
    beside = f"mode=rwc&uri=true&lease={MASK}&token={MASK}"
    assert beside in printed
    assert {Path(path).name for path in files_with(beside, output)} >= {"config.yaml", "run.json"}
    assert str(database) in files_with(beside, tmp_path)  # the tag with the command
    recorded = sqlite3.connect(database).execute("SELECT value FROM tags WHERE key = 'emolab.command'").fetchall()
    assert [beside in value for (value,) in recorded] == [True]

    # The same command finds its run again, also when the secret was changed meanwhile.
    first = json.loads((output / "scanned" / "run.json").read_text())["run_id"]
    given[-1] = f"tracking.uri={address(database, 'another-secret')}"
    status, printed = train(*given)
    assert status == 0, printed
    assert json.loads((output / "scanned" / "run.json").read_text())["run_id"] == first
    assert sqlite3.connect(database).execute("SELECT count(*) FROM runs").fetchone() == (1,)

    # What was left out is asked for, rather than used as an address.
    status, printed = train("--config", str(output / "scanned" / "config.yaml"))
    assert status == 2
    assert "tracking.uri: a secret was left out here" in printed


def test_an_error_that_quotes_an_address_leaves_the_password_out(train: Train, tmp_path: Path) -> None:
    status, printed = train(*small(tmp_path, tmp_path), f"tracking.enabled=http://me:{SECRET}@host")
    assert status == 2
    assert f"http://me:{MASK}@host" in printed
    assert SECRET not in printed
    assert (
        str(UserError(f"the tracker http://me:{SECRET}@host is down")) == f"the tracker http://me:{MASK}@host is down"
    )


def test_a_configuration_is_printed_without_its_secrets() -> None:
    settings = validate(TrainSettings, {"tracking": {"uri": f"https://me:{SECRET}@tracker/api"}})
    assert SECRET not in to_yaml(settings)
    assert yaml.safe_load(to_yaml(settings))["tracking"]["uri"] == f"https://me:{MASK}@tracker/api"
    with pytest.raises(UserError, match=r"tracking\.uri"):
        parse(TrainSettings, [f"tracking.uri=https://me:{MASK}@tracker/api"], description="")


def test_what_a_crash_prints_holds_no_secret() -> None:
    code = (
        "from emolab.job import run_job\n"
        f"def job():\n    print('to', 'http://me:{SECRET}@host'); raise RuntimeError('http://me:{SECRET}@host')\n"
        "run_job(job)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in ("platform", "model"))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"to http://me:{MASK}@host" in result.stdout
    assert f"RuntimeError: http://me:{MASK}@host" in result.stderr
    assert SECRET not in result.stdout + result.stderr


PASSWORDS = st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="'\""), min_size=1, max_size=40)


@given(PASSWORDS.filter(lambda text: "://" not in text and "@" not in text))
def test_the_password_of_any_address_is_masked(password: str) -> None:
    for scheme in ("http", "postgresql+psycopg", "s3"):
        rest = "host:5432/database?mode=x"
        assert redact(f"see {scheme}://user:{password}@{rest} there") == f"see {scheme}://user:{MASK}@{rest} there"


@given(st.text(max_size=200))
def test_redaction_is_done_once_and_for_all(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("prepare.py options.api_key=abc seed=1", f"prepare.py options.api_key={MASK} seed=1"),
        ("train.py --token abc --seed 1", f"train.py --token {MASK} --seed 1"),
        ('{"auth_token": "abc", "seed": 1}', f'{{"auth_token": "{MASK}", "seed": 1}}'),
        ("PGPASSWORD=abc AWS_SECRET_ACCESS_KEY='a b'", f"PGPASSWORD={MASK} AWS_SECRET_ACCESS_KEY={MASK}"),
        ("Authorization: Bearer abcdefgh.ijkl", f"Authorization: Bearer {MASK}"),
        ("https://ghp_0123456789@host/x", f"https://{MASK}@host/x"),
        ("postgresql://user@host/x", "postgresql://user@host/x"),
        ("http://127.0.0.1:5000 models:/m@champion", "http://127.0.0.1:5000 models:/m@champion"),
        ("http://127.0.0.1:5000/#/models/m@champion", "http://127.0.0.1:5000/#/models/m@champion"),
        ("https://a.host:443/m@1 https://me.too:5000@host/x", f"https://a.host:443/m@1 https://me.too:{MASK}@host/x"),
        ("store:\n  password: abc\nseed: 1", f"store:\n  password: {MASK}\nseed: 1"),
        ("training.kl_weight=0.1 max_tokens=5", "training.kl_weight=0.1 max_tokens=5"),
    ],
)
def test_secrets_are_known_by_their_form_and_their_name(text: str, left: str) -> None:
    assert redact(text) == left


def test_a_variable_that_names_a_place_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "SSH_PRIVATE_KEY"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("OF_THE_LAB_TOKEN", OF_THE_ENVIRONMENT)
    monkeypatch.setenv("SHORT_TOKEN", "runs")
    monkeypatch.setenv("TRACKER", f"https://me:{SECRET}@host")
    text = f"report {tmp_path}/runs/report.html of {OF_THE_ENVIRONMENT} and {SECRET}"
    assert redact(text) == f"report {tmp_path}/runs/report.html of {MASK} and {MASK}"


def test_secrets_are_known_by_the_key_they_stand_under() -> None:
    values = {"store": {"secret": "x", "user": "me", "keys": ["k", f"http://a:{SECRET}@b"]}, "token": None, "seed": 1}
    left = {"store": {"secret": MASK, "user": "me", "keys": ["k", f"http://a:{MASK}@b"]}, "token": None, "seed": 1}
    assert redacted(values) == left
    assert masked_key(left) == "store.secret"
    assert masked_key(values) is None
    secret = {name for name in ("apiKey", "RAY_AUTH_TOKEN", "tokenizer", "monkey", "KEY_PATH") if is_secret_name(name)}
    assert secret == {"apiKey", "RAY_AUTH_TOKEN"}
