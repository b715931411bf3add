"""deploy/ray-cluster.yaml is what `ray up` takes, and starts nothing without a token."""

import copy
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from tests.conftest import REPOSITORY


@pytest.fixture
def launcher() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "deploy" / "ray-cluster.yaml").read_text())


def prepared(configuration: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` reads a file: filled with the provider's defaults, then checked against Ray's own schema."""
    filled = prepare_config(copy.deepcopy(configuration))
    validate_config(filled)
    return filled


def test_ray_accepts_the_cluster_launcher_file(launcher: dict[str, Any]) -> None:
    filled = prepared(launcher)
    (kind,) = filled["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == filled["max_workers"] == 2
    assert filled["setup_commands"] == launcher["setup_commands"]


@pytest.mark.parametrize(
    "mistake", [{"setup_command": []}, {"idle_timeout_minutes": "ten"}, {"auth": {"user": "emolab"}}]
)
def test_ray_would_refuse_a_mistake_in_it(launcher: dict[str, Any], mistake: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        prepared(launcher | mistake)


def test_every_ray_of_the_launcher_asks_for_the_token(launcher: dict[str, Any]) -> None:
    started = launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"]
    for command in started:
        assert "RAY_AUTH_MODE=token ray " in command
    assert sum("ray start" in command for command in started) == 2
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert launcher["file_mounts"]["/home/emolab/.ray/auth_token"] == "~/.ray/auth_token"
