"""SECURITY.md promises nothing that no test holds."""

import ast
import re

from tests.conftest import REPOSITORY


def test_every_promise_names_tests_that_exist() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.search(r"^## Promises\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    assert promises is not None
    items = re.split(r"^- ", promises[1], flags=re.MULTILINE)[1:]
    assert len(items) >= 10
    for item in items:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", item)
        assert named, item
        for path, name in named:
            tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
