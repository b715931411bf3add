"""Promises about the house itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import JOBS, NEEDED, REPOSITORY


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_platform_is_still_the_standard_library() -> None:
    code = "import platform; print(platform.python_version(), platform.__file__)"
    for flags in ([], ["-m", "timeit", "-n1", "-r1", "import platform; platform.system()"]):
        command = [sys.executable, *(flags or ["-c", code])]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert str(REPOSITORY) not in subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.replace(sys.prefix, "")


@pytest.mark.parametrize("root", ["platform", "model"])
def test_source_roots_are_not_packages(root: str) -> None:
    assert not (REPOSITORY / root / "__init__.py").exists()


def test_the_model_knows_neither_ray_nor_mlflow_nor_the_platform() -> None:
    for path in sources("model"):
        assert not imported(path) & {"ray", "mlflow", "optuna", "emolab", "pydantic"}, path


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("optuna", ("tuning/",)),
        ("mlflow", ("tracking/", "registry/")),
    ],
)
def test_each_library_is_known_in_one_place(library: str, allowed: tuple[str, ...]) -> None:
    for path in sources("platform"):
        place = path.relative_to(REPOSITORY / "platform" / "emolab").as_posix()
        if library in imported(path):
            assert place.startswith(allowed), place


def test_processes_that_predict_do_without_mlflow() -> None:
    code = "import sys, emolab.serving.batch, emolab.serving.server; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_nothing_of_ours_is_pickled() -> None:
    for path in sources("platform", "model", "jobs"):
        assert not imported(path) & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}, path
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True)"), path  # tensors and nothing else
        assert "torch.save(" not in text, path


def test_jobs_are_thin() -> None:
    for path in sources("jobs"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path


def test_the_platform_runs_where_only_what_it_depends_on_is_installed() -> None:
    """As on a cluster that is sent the code (docs/cluster.md): its version is not asked of the installation."""
    for source in sources("platform", "model", "jobs"):
        assert "edu-emotionnet-lab" not in source.read_text(encoding="utf-8"), source


ENDING = ("--help", "--no-such-option", "--preset=smoek")
"""What ends a command before its work; a job also by a key that there is not, or whose value is wrong."""
COMMANDS = {
    f"jobs/{job}.py": (NEEDED.get(job, ()), (*ENDING, "--print-config", "tracking.urj=x", "tracking.enabled=3"))
    for job in JOBS
} | {"platform/emolab/__main__.py": (("doctor",), ENDING)}
LATER = {"fastapi", "matplotlib", "mlflow", "onnxruntime", "pandas", "ray", "scipy", "torchaudio", "transformers"}
CALLED = """
import runpy, sys

script, needed, endings, later = {}
statuses = {{}}
for ending in endings:
    sys.argv = [script, *needed, ending]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        statuses[ending] = ended.code
print(statuses, later & sys.modules.keys())
"""


@pytest.mark.parametrize("script", COMMANDS)
def test_help_and_a_mistyped_option_do_not_wait_for_the_libraries_of_the_work(script: str) -> None:
    needed, endings = COMMANDS[script]
    code = CALLED.format(repr((str(REPOSITORY / script), needed, endings, LATER)))
    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    expected = {ending: 0 if ending in ("--help", "--print-config") else 2 for ending in endings}
    assert told.stdout.splitlines()[-1] == f"{expected} set()"


def test_the_options_of_a_corpus_of_recordings_are_told_without_the_libraries_that_read_them() -> None:
    endings = ("--help", "--print-config")
    given = repr((str(REPOSITORY / "jobs" / "prepare.py"), ("--corpus=media", "--manifest=x"), endings, LATER))
    told = subprocess.run(
        [sys.executable, "-c", CALLED.format(given)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines()[-1].endswith("} set()")
