"""Ctrl-C while a job still imports what it needs, which takes seconds: one line, as at any later time."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.conftest import JOBS, NEEDED
from tests.jobs.test_jobs import command

HOOK = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_IMPORT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["SIGNAL_NUMBER"]))

sys.meta_path.insert(0, Interrupting())
"""
"""Python runs a file of this name when it starts; this one sends the signal at the import of a library."""


@pytest.mark.parametrize("library", ["pydantic", "numpy"])
@pytest.mark.parametrize("job", JOBS)
def test_ctrl_c_during_the_imports_is_one_line(job: str, library: str, tmp_path: Path) -> None:
    ended = interrupted(job, library, signal.SIGINT, tmp_path)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.splitlines() == ["interrupted: run the same command again to continue"]
    assert not ended.stdout


def test_sigterm_during_the_imports_has_its_own_status(tmp_path: Path) -> None:
    ended = interrupted("train", "numpy", signal.SIGTERM, tmp_path)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr.splitlines() == ["interrupted: run the same command again to continue"]


def interrupted(job: str, library: str, number: signal.Signals, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(HOOK)
    call, environment = command(job, *NEEDED.get(job, ()))
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "INTERRUPTED_IMPORT": library,
        "SIGNAL_NUMBER": str(int(number)),
    }
    return subprocess.run(
        call, capture_output=True, text=True, cwd=folder, env=environment, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
