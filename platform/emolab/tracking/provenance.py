"""Where a result comes from: code, versions, command."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import emolab
from emolab.redaction import command_line

COMMIT = "emolab.git_commit"
"""Tag: the commit of the code; those of all calls, where several made a run."""
CLEAN = "emolab.git_clean"
"""Tag: `true`, or `false` where the working tree differed from its commit in one of them; `unknown` where git does not
answer."""


def code_version() -> dict[str, str]:
    """Tags that say which code ran: release, git commit, whether the working tree differed from it, the command; and
    who started what, under the names whose tags MLflow's pages show in columns of their own."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    clean = "unknown" if commit is None or changed is None else str(not changed).lower()
    return {
        "emolab.version": emolab.__version__,
        COMMIT: commit or "unknown",
        CLEAN: clean,
        "emolab.command": command_line(),
        "emolab.versions": ", ".join(
            f"{name} {metadata.version(name)}" for name in ("torch", "ray", "optuna", "mlflow", "pyarrow")
        ),
        "emolab.python": platform.python_version(),
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.user": _user(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number and no name
        return "unknown"


def _git(*arguments: str) -> str | None:
    folder = Path(emolab.__file__).resolve().parent
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def together(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Tags of what several calls have computed: the commits of all, each once; clean only if all were."""
    states = {version[CLEAN] for version in versions}
    clean = next((state for state in ("false", "unknown", "true") if state in states), "unknown")
    commits = dict.fromkeys(commit for version in versions for commit in version[COMMIT].split())
    return {COMMIT: " ".join(commits), CLEAN: clean}
