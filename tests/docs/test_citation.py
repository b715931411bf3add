"""CITATION.cff names this version and the paper, in the form that CFF 1.2.0 asks for."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml
from tests.conftest import REPOSITORY

PAPER = REPOSITORY.parent / "shared" / "paper" / "edu-emotionnet.md"


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_is_of_this_software(citation: dict[str, Any]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["abstract"] == f"{project['description']}."
    assert citation["title"] and citation["message"] and citation["authors"]


def test_the_preferred_reference_has_what_the_format_requires_and_no_invented_address(citation: dict[str, Any]) -> None:
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["type"] == "conference-paper"
    assert set(paper["conference"]) == {"name"}
    for author in paper["authors"]:
        assert set(author) <= {"family-names", "given-names", "affiliation"}
    assert not {"doi", "url"} & {*citation, *paper}
    assert [each["type"] for each in paper["identifiers"]] == ["other"]


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper is not at ../shared/paper")
def test_title_author_and_venue_are_as_the_paper_prints_them(citation: dict[str, Any]) -> None:
    printed, paper = PAPER.read_text(encoding="utf-8"), citation["preferred-citation"]
    (author,) = paper["authors"]
    assert re.findall("^# (.+)$", printed, re.MULTILINE)[:2] == [
        paper["title"],
        f"{author['given-names']} {author['family-names']}",
    ]
    assert paper["notes"] in printed
    assert paper["conference"]["name"] in paper["notes"]
