"""docs/deployment.md quotes what is said when a command is refused: here each is refused, by what refuses it there."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import REPOSITORY
from tests.docs.guides import guide, quoted, rows
from tests.serving.parts import World, clean_environment, make_world

from emolab.features.text import TextSettings
from emolab.locks import holding
from emolab.names import UserError
from emolab.registry.gates import Provenance
from emolab.registry.judgement import _clean_commit
from emolab.registry.lookup import find_version
from emolab.serving.server import bound
from emolab.tuning.holding import holding_study

QUOTED = [quoted(said)[0] for said, _ in rows(guide("deployment.md"), "what is said")]


def without_weights(folder: Path) -> None:
    TextSettings(model="nowhere/such").identity()


def without_champion(folder: Path) -> None:
    world: World = make_world(folder)
    find_version(world.uri.replace("challenger", "champion"), world.tracker)


def on_a_taken_port(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        bound("127.0.0.1", other.getsockname()[1])


JOINING = """
from emolab.cluster import connected
from emolab.names import UserError

try:
    with connected():
        pass
except UserError as refusal:
    print(refusal)
"""


def without_token(folder: Path) -> None:
    environment = clean_environment(HOME=str(folder), RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="token")
    ended = subprocess.run(
        [sys.executable, "-c", JOINING], env=environment, cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert (ended.returncode, ended.stdout.count("\n")) == (0, 1), ended.stderr[-2000:]
    raise UserError(ended.stdout)


def without_commit(folder: Path) -> None:
    challenger: Any = SimpleNamespace(commits={"0123456789abcdef": "false"})
    asked = Provenance(clean_commit=True, most_openings=1, allow_rolled_back=False)
    raise UserError(_clean_commit(asked, challenger).sentence)


def held(folder: Path) -> None:
    with holding(folder, what="study"), holding(folder, what="study"):
        pass


def held_in_a_database(folder: Path) -> None:
    with (
        holding_study(f"sqlite:///{folder}/studies.db", "search"),
        holding_study(f"sqlite:///{folder}/studies.db", "search"),
    ):
        pass


CAUSES = [without_weights, without_champion, on_a_taken_port, without_token, without_commit, held, held_in_a_database]


def pattern(text: str) -> str:
    """What a quotation matches: anything for its capitals, the names of these tests for those of the guide."""
    ours = re.escape(text).replace("edu\\-emotionnet@", "live\\-tests@").replace(":8000:", ":\\d+:")
    return re.sub(r"\b[A-Z]{3,}\b", ".+", ours)


@pytest.mark.parametrize(("said", "cause"), zip(QUOTED, CAUSES, strict=True))
def test_a_quoted_refusal_is_said(said: str, cause: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        cause(tmp_path)
    assert re.match(pattern(said), str(refusal.value)), str(refusal.value)


def test_the_image_that_is_pushed_is_the_one_that_the_manifests_fetch() -> None:
    text = guide("deployment.md")
    (built, pushed) = re.findall(r"docker tag (\S+) (\S+)", text)[0]
    assert f"--tag {built} ." in text
    assert f"docker push {pushed}\n" in text
    for name in ("ray-cluster", "ray-job"):
        manifest = (REPOSITORY / "deploy" / "kuberay" / f"{name}.yaml").read_text()
        assert set(re.findall(r"image: (\S+)", manifest)) == {pushed}
