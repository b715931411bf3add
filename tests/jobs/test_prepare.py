"""jobs/prepare.py as a user meets it: a data set, a page that explains it, and a run that holds the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.sessions.staged_corpus import StagedCorpus, write_recordings

from emolab.configuration import parse
from emolab.corpora import catalog
from emolab.names import UserError
from emolab.sessions.manifest import Manifest
from emolab.studies.preparation import REPORT_OF, PreparationSettings, prepare_and_report
from emolab.tracking.runs import MLflowTracker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, folder: Path) -> tuple[PreparationSettings, Manifest, list[str]]:
    write_recordings(folder / "media", 40, bad={3: "truncated", 5: "strange"})
    settings = PreparationSettings.model_validate(
        {
            "corpus": "staged",
            "source": str(folder / "media"),
            "output": str(folder / "data"),
            "runs": str(folder / "runs"),
            "options": {"staged": False, "gap": 5},
            "protocol": {"max_gap_seconds": 2, "balance": "classes"},
        }
    )
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalog._CORPORA, "staged", StagedCorpus)
        manifest = prepare_and_report(settings, report=lines.append)
        again: list[str] = []
        assert prepare_and_report(settings, report=again.append) == manifest
    return settings, manifest, lines


Prepared = tuple[PreparationSettings, Manifest, list[str]]


def test_the_page_says_what_is_there_and_what_is_not_and_loads_nothing(prepared: Prepared, folder: Path) -> None:
    _, manifest, lines = prepared
    page = (folder / "data" / "report.html").read_text()
    kept = sum(split.sessions for split in manifest.splits.values())
    assert f"{kept} sessions of " in page
    for part in (
        "2 could not be read",
        "s003 is truncated",
        "KeyError",
        f"{manifest.dropped['gap']} for gap",
        f"{manifest.dropped['balance']} for balance",
        "audio is absent for 2.5 s",
        "kappa",
        "0.71",
        "unmapped.surprised",
        "protocol: max_gap_seconds",
        manifest.digest[:16],
    ):
        assert part in page, part
    assert page.count("<svg") == 4
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", re.sub(r"xlink:href=\"#", "", page))
    assert "quarantined: 2 of 40 sessions" in "\n".join(lines)


def test_the_report_is_a_run_of_its_own_and_recorded_once(prepared: Prepared, folder: Path) -> None:
    settings, manifest, _ = prepared
    tracker = MLflowTracker(f"sqlite:///{(folder / 'runs' / 'mlflow.db').resolve()}", settings.tracking.experiment)
    (run_id,) = tracker.find(REPORT_OF, manifest.digest)
    record = tracker.read(run_id)
    assert record.tags["emolab.dataset"] == manifest.digest
    assert record.ended is not None
    assert record.metrics["quarantined"] == 2
    assert record.metrics["sessions_train"] == manifest.splits["train"].sessions
    for name in ("report.html", "dataset.json", "sessions.csv", "quarantine.csv"):
        assert tracker.artifact(run_id, name) == (folder / "data" / name).read_bytes()


def test_a_tracker_that_is_down_costs_the_record_not_the_data(
    prepared: Prepared, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest, _ = prepared
    monkeypatch.setitem(catalog._CORPORA, "staged", StagedCorpus)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = settings.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    lines: list[str] = []
    assert prepare_and_report(settings.model_copy(update={"tracking": down}), report=lines.append) == manifest
    assert "not in the tracker" in "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["protocol.balance=clases"], ["protocol.balance", "classes"]),
        (["protocol.max_gap=2"], ["protocol.max_gap", "max_gap_seconds"]),
        (["--max-refused", "2"], ["max_refused"]),
        (["--corpus", "edusim", "--manifest", "x.csv", "options.manifest=y.csv"], ["options.manifest", "edusim"]),
    ],
)
def test_a_mistake_is_named(arguments: list[str], parts: list[str], one_line: Callable[..., Any]) -> None:
    with pytest.raises(UserError) as error:
        parse(PreparationSettings, arguments, description="")[0].build()
    one_line(error, *parts)
