"""The container and compose files, by the tools that know them; secrets come from the environment alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
CONTAINERFILE, COMPOSE = DEPLOY / "Containerfile", DEPLOY / "compose.yaml"


def tool(name: str) -> str:
    """A program of the environment that runs these tests."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed: pip install --editable '.[dev]'")
    return found


def run(name: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool(name), *arguments], input=text, capture_output=True, text=True, timeout=60)


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def test_the_linter_has_nothing_to_say_about_the_container_file() -> None:
    result = run("hadolint", "--no-color", str(CONTAINERFILE))
    assert result.returncode == 0, result.stdout
    spoiled = re.sub("FROM python:3.11-slim-bookworm", "FROM python", CONTAINERFILE.read_text())
    assert "DL3006" in run("hadolint", "--no-color", "-", text=spoiled).stdout


def test_no_image_runs_as_root_and_every_package_is_pinned() -> None:
    stages: list[list[tuple[str, str]]] = []
    for name, rest in instructions(CONTAINERFILE.read_text()):
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest))
    assert len(stages) == 3
    for stage in stages[1:]:
        assert [rest for name, rest in stage if name == "USER"] == ["1000:1000"]
        last = max(place for place, (name, _) in enumerate(stage) if name == "RUN")
        assert last < next(place for place, (name, _) in enumerate(stage) if name == "USER")
    installs = [rest for stage in stages for name, rest in stage if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--constraint" in command for command in installs)


def test_what_the_container_file_copies_exists_and_may_travel() -> None:
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"  # nothing travels unless it is named
    copies = [rest.split()[:-1] for name, rest in instructions(CONTAINERFILE.read_text()) if name == "COPY"]
    for source in {name for names in copies for name in names}:
        assert (REPOSITORY / source).exists(), source
        assert f"!{source}" in ignored


def test_the_compose_file_is_one() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = yaml.safe_dump(yaml.safe_load(COMPOSE.read_text()))  # with its merged parts written out
    project = compose_spec.PyCompose.from_yaml(text)
    project.validate()
    assert set(project.service_names()) == {"postgres", "s3", "mlflow", "bucket", "ray-head", "ray-worker"}
    for right, wrong in (("image:", "imagee:"), ("service_healthy", "healthy"), ("127.0.0.1:5000:5000", "127.0.0.1:x")):
        with pytest.raises(ValueError, match=r"services\."):
            compose_spec.PyCompose.from_yaml(text.replace(right, wrong))


def test_docker_itself_resolves_the_compose_file_and_refuses_it_without_secrets() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker's compose plugin is not installed")
    command = [docker, "compose", "--file", str(COMPOSE), "config", "--quiet"]
    secrets = dict.fromkeys(("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "RAY_AUTH_TOKEN"), "x")
    assert subprocess.run(command, env=os.environ | secrets, capture_output=True).returncode == 0
    assert b"set it" in subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True).stderr


def test_the_security_linter_finds_nothing_grave_in_the_compose_file(tmp_path: Path) -> None:
    result = run("compose-lint", "check", "--format", "json", str(COMPOSE))
    assert result.returncode == 0, result.stdout
    grave = [finding for finding in json.loads(result.stdout)["findings"] if finding["severity"] != "low"]
    # Pinned by tag: which digest a registry serves cannot be said here.
    assert {finding["rule_id"] for finding in grave} == {"CL-0019"}
    spoiled = tmp_path / "compose.yaml"
    spoiled.write_text(COMPOSE.read_text().replace("read_only: true", "privileged: true"))
    assert run("compose-lint", "check", str(spoiled)).returncode != 0


def test_secrets_of_the_compose_file_come_from_the_environment_and_are_required(composed: dict[str, Any]) -> None:
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|BACKEND_STORE_URI")
    found = [
        (name, variable, str(value))
        for name, service in composed["services"].items()
        for variable, value in service.get("environment", {}).items()
        if secret.search(variable)
    ]
    assert len(found) >= 9
    for name, variable, value in found:
        assert re.search(r"\$\{[A-Z0-9_]+:\?[^}]+\}", value), f"{name}: {variable}"


def test_ports_are_published_on_loopback_and_ray_asks_for_its_token(composed: dict[str, Any]) -> None:
    published = [port for service in composed["services"].values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265"]
    for name in ("ray-head", "ray-worker"):
        service = composed["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["user"] == "1000:1000"
        assert service["read_only"] is True
    assert composed["networks"]["storage"]["internal"] is True
    assert all("cluster" not in composed["services"][name]["networks"] for name in ("postgres", "s3", "bucket"))


def test_the_tracking_server_of_the_compose_file_knows_the_variables_it_is_given(composed: dict[str, Any]) -> None:
    found = find_spec("mlflow")  # read, not imported: its command line takes seconds to load
    assert found is not None
    package = Path(str(found.origin)).parent
    places = ("cli/__init__.py", "utils/cli_args.py", "environment_variables.py")
    text = "".join((package / place).read_text() for place in places)
    given = [name for name in composed["services"]["mlflow"]["environment"] if name.startswith("MLFLOW_")]
    assert len(given) == 6
    for name in given:
        assert f'"{name}"' in text, name
