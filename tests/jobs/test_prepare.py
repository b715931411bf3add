"""jobs/prepare.py as a user meets it: a data set, a page that explains it, and a run that holds the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.features.media_files import tone, write_rows, write_wave
from tests.sessions.staged_corpus import StagedCorpus, write_recordings

from emolab.configuration import parse
from emolab.corpora import catalog
from emolab.names import UserError
from emolab.sessions.manifest import Manifest
from emolab.studies.preparation import REPORT_OF, PreparationSettings, prepare_and_describe, prepare_and_report
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


def test_a_finished_data_set_is_found_without_its_source(
    prepared: Prepared, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest, _ = prepared
    monkeypatch.setitem(catalog._CORPORA, "staged", StagedCorpus)
    (folder / "media").rename(folder / "away")
    try:
        assert prepare_and_report(settings, report=lambda _: None) == manifest
    finally:
        (folder / "away").rename(folder / "media")


def test_a_source_that_is_not_there_is_told_before_a_cluster_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., Any]
) -> None:
    started: list[object] = []
    monkeypatch.setattr("emolab.studies.preparation.connected", started.append)
    settings = PreparationSettings(corpus="mosi", source=str(tmp_path / "nowhere"), output=str(tmp_path / "data"))
    with pytest.raises(UserError) as error:
        prepare_and_report(settings, report=lambda _: None)
    one_line(error, str(tmp_path / "nowhere"))
    assert not started


SOUND_ALONE = ("options.visual.extractor=none", "options.text.extractor=none")


def dry_run(folder: Path, *arguments: str) -> list[str]:
    """What `jobs/prepare.py --corpus media --dry-run` says of the manifest in a folder."""
    given = ["--corpus", "media", "--manifest", str(folder / "sessions.csv"), *arguments]
    lines: list[str] = []
    prepare_and_describe(parse(PreparationSettings, given, description="")[0], dry_run=True, report=lines.append)
    return lines


def test_a_dry_run_reads_the_manifest_before_it_looks_for_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sessions\.csv cannot be read"):
        dry_run(tmp_path, "options.text.model=nowhere/bert")


def test_a_dry_run_names_the_files_that_are_not_there(tmp_path: Path, one_line: Callable[..., Any]) -> None:
    write_wave(tmp_path / "a.wav", tone(0.1))
    rows = [f"s{number},p{number},,a.wav,," for number in range(18)]
    rows += ["lost,p,,lost.wav,,", "unlabelled,p,,a.wav,,lost.csv", "silent,p,lost.mp4,a.wav,lost.vtt,"]
    write_rows(tmp_path / "sessions.csv", "session_id,speaker_id,video,audio,transcript,labels", *rows)
    found = f"2 of 21 sessions name a file that is not there (session lost: {tmp_path / 'lost.wav'}; "
    found += f"session unlabelled: {tmp_path / 'lost.csv'})"  # nobody looks at pictures or words
    made, warning = dry_run(tmp_path, *SOUND_ALONE)
    assert made.startswith("would write 19 sessions of media to ")
    assert warning == f"warning: {found} and would be set aside"
    with pytest.raises(UserError) as error:
        dry_run(tmp_path, *SOUND_ALONE, "--max-refused", "0.05")
    one_line(error, found, "more than max_refused=0.05 allows")
    write_rows(tmp_path / "sessions.csv", "session_id,speaker_id,video", "lost,p,lost.mp4")
    with pytest.raises(UserError, match=r"1 of 1 sessions .* which leaves none"):
        dry_run(tmp_path, *SOUND_ALONE, "--max-refused", "1")


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
