"""What a result says of the code that made it is true, also where git does not answer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import emolab
from emolab.tracking import provenance
from emolab.tracking.provenance import CLEAN, COMMIT, code_version


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in which the platform seems to lie."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("one = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message=first")
    monkeypatch.setattr(emolab, "__file__", str(tmp_path / "code.py"))
    return tmp_path


def test_a_clean_tree_is_told_from_a_changed_one(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert (code_version()[COMMIT], code_version()[CLEAN]) == (commit, "true")
    (repository / "further.py").touch()
    assert code_version()[CLEAN] == "true", "a file that git does not know is not the code that ran"
    (repository / "code.py").write_text("one = 2\n")
    assert (code_version()[COMMIT], code_version()[CLEAN]) == (commit, "false")


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emolab, "__file__", str(tmp_path / "code.py"))
    assert (code_version()[COMMIT], code_version()[CLEAN]) == ("unknown", "unknown")


@pytest.mark.parametrize("trouble", [subprocess.TimeoutExpired("git", 10), OSError("no memory"), None])
def test_a_tree_that_git_says_nothing_of_is_not_called_clean(
    repository: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception | None
) -> None:
    """A loaded machine, or an index that another git holds: a gate of promotion takes only what is known as clean."""
    (repository / "code.py").write_text("one = 2\n")

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "status" not in command:
            return real(command, **options)
        if trouble is not None:
            raise trouble
        return subprocess.CompletedProcess(command, 128, "", "fatal: index file corrupt")

    real = subprocess.run
    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert code_version()[COMMIT] != "unknown"
    assert code_version()[CLEAN] == "unknown"
