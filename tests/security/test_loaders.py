"""No source file of ours can run code that it reads: what unpickles, evaluates or starts a shell is not to be found.

Not even the reader of published pickles does: it takes them apart with ``pickletools``, which runs nothing.
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "pty"}
CALLS = {
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "code.InteractiveInterpreter"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("pandas.read_pickle", "torch.hub.load", "torch.package.PackageImporter", "shutil.unpack_archive"),
    *("mlflow.pytorch.load_model", "mlflow.sklearn.load_model", "runpy.run_path", "runpy.run_module"),
    *("xml.etree.ElementTree.parse", "xml.etree.ElementTree.fromstring", "xml.dom.minidom.parse", "xml.sax.parse"),
}
NAMES = {f"yaml.{name}Loader" for name in ("", "Full", "Unsafe", "C", "CFull", "CUnsafe")}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def findings(source: str) -> Iterator[str]:
    """What in a source text could run code that it was only meant to read."""
    tree = ast.parse(source)
    known = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"{node.lineno}: from {node.module}"
        elif isinstance(node, ast.Attribute | ast.Name) and dotted(node, known) in NAMES:
            yield f"{node.lineno}: {dotted(node, known)}"
        elif isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in unsafe_call(node, dotted(node.func, known)))


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for."""
    known = {name: f"builtins.{name}" for name in BUILTINS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                known[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return known


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([known.get(node.id, node.id), *reversed(parts)])


def unsafe_call(node: ast.Call, name: str) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS:
        yield name
    if name == "torch.load" and not is_constant(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if "shell" in given and not is_constant(given["shell"], False):
        yield "shell=True"
    if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
        yield "allow_pickle=True"
    if "trust_remote_code" in given and not is_constant(given["trust_remote_code"], False):
        yield "trust_remote_code=True"
    if isinstance(node.func, ast.Attribute) and node.func.attr == "extractall" and "filter" not in given:
        yield "an archive unpacked without a filter"


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def sources() -> list[Path]:
    roots = ("platform", "model", "jobs", "benchmarks")
    return sorted(path for root in roots for path in REPOSITORY.glob(f"{root}/**/*.py"))


def test_no_source_file_can_run_what_it_reads() -> None:
    files = sources()
    assert len(files) > 150
    found = {
        path.relative_to(REPOSITORY).as_posix(): list(findings(path.read_text(encoding="utf-8"))) for path in files
    }
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as read",
        "import cloudpickle as c; c.loads(b'')",
        "import torch; torch.load('x')",
        "from torch import load; load('x', weights_only=False)",
        "import torch; torch.load('x', weights_only=safe)",
        "import yaml; yaml.load('x', yaml.SafeLoader)",
        "import yaml as y; y.load('x', Loader=y.FullLoader)",
        "from yaml import unsafe_load; unsafe_load('x')",
        "eval('1')",
        "def f(text): exec(text)",
        "__import__('os')",
        "import os; os.system('ls')",
        "import subprocess; subprocess.run('ls', shell=True)",
        "from subprocess import run; run('ls', shell=flag)",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import pandas; pandas.read_pickle('x')",
        "import joblib",
        "import tarfile; tarfile.open('x').extractall('.')",
        "from transformers import AutoModel; AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_what_must_not_be_there_would_be_found(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x', weights_only=True)",
        "import yaml; yaml.safe_load('x')",
        "import json; json.loads('1')",
        "import subprocess; subprocess.run(['ls'])",
        "import numpy as np; np.load('x', allow_pickle=False)",
        "model.eval()",
        "import re; re.compile('x')",
    ],
)
def test_what_is_safe_is_left_alone(source: str) -> None:
    assert not list(findings(source))


def test_mlflow_is_told_not_to_unpickle_before_it_is_imported() -> None:
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION

    import emolab.tracking.runs  # noqa: F401

    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
