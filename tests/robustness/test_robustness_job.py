"""jobs/robustness.py as a whole: models however they are named, one tracked run, a page, and mistakes in one line."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from tests.docs.guides import notebook, run_section
from tests.jobs.test_jobs import run_here
from tests.training.test_loop import settings_for

from emolab import checkpoint
from emolab.locks import holding
from emolab.names import UserError
from emolab.registry.lookup import KeptModel, kept_model, model_folders
from emolab.registry.versions import register
from emolab.reports import robustness as report
from emolab.reports.robustness import heat_map, robustness_files, robustness_page
from emolab.robustness import sweep
from emolab.robustness.cells import Cell
from emolab.robustness.corruptions.catalog import corruptions
from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.sweep_plan import Unit
from emolab.robustness.tally import Tally
from emolab.sessions.manifest import Manifest, read_manifest, write_manifest
from emolab.studies import test_split as opening
from emolab.studies.bootstrap import Interval
from emolab.studies.comparison_settings import MODELS
from emolab.studies.robustness import RobustnessSettings, cell_table, robustness
from emolab.studies.robustness_results import Group, RobustnessResults, counted_models, grouped
from emolab.studies.statistics import holm
from emolab.tracking import beginning
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tracking.tracker import NoRun
from emolab.training.recipe import TrackingSettings
from emolab.training.train import TrainedModel, train

SUITE = {
    "name": "small",
    "seeds": [0, 1],
    "sweeps": [
        {"corruption": "frame_missing", "levels": [0.3, 0.6, 0.9]},
        {"corruption": "gaussian", "levels": [2], "modalities": "each"},
    ],
    "grids": [{"instances": [{"corruption": "burst_missing", "levels": [0.5]}]}],
}
XML_NAMESPACES = ("http://www.w3.org", "https://matplotlib.org", "http://purl.org", "http://creativecommons.org")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Four models in one tracker, below one run, as a comparison leaves them."""

    output: Path
    data: Path
    tracker: MLflowTracker
    comparison: str
    models: list[TrainedModel]


def write_suite(folder: Path, suite: dict[str, Any] = SUITE) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small suite.yaml").write_text(yaml.safe_dump(suite))
    return str(folder / "small suite.yaml")


def job_settings(data: Path, output: Path, suite: str, *models: str, **options: Any) -> RobustnessSettings:
    values = {"model": models, "suite": suite, "data": str(data), "output": str(output), "actors": 1}
    return RobustnessSettings.model_validate(values | options)


def no_report(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    output = tmp_path_factory.mktemp("robustness") / "runs"
    tracker = open_tracker(**TrackingSettings().model_dump(), output=output)
    assert isinstance(tracker, MLflowTracker)
    comparison = tracker.start("comparison", tags={"emolab.kind": "comparison"})
    models = [
        train(
            settings_for(toy_data, output, model={"name": name}, epochs=3, seed=seed),
            tracker=tracker,
            parent=comparison.run_id,
        )
        for name, seed in (("edu_emotionnet", 0), ("edu_emotionnet", 1), ("late_fusion", 0), ("audio_only", 0))
    ]
    tracker.start("diverged", parent=comparison.run_id).finish("FAILED")
    tracker.start("a-trial", parent=comparison.run_id).finish()  # ended well and kept nothing
    comparison.finish()
    first = models[0]
    register(first.folder / "model", "toy-model", run_id=first.run_id, tracking_uri=tracker.uri)
    assert "MLFLOW_TRACKING_URI" not in os.environ  # it would stand in for the embedded tracker
    return Trained(output=output, data=toy_data, tracker=tracker, comparison=comparison.run_id, models=models)


Finished = tuple[RobustnessSettings, RobustnessResults, list[str]]


@pytest.fixture(scope="module")
def finished(ray_cluster: None, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    settings = job_settings(
        trained.data, trained.output, write_suite(tmp_path_factory.mktemp("suite")), trained.comparison
    )
    lines: list[str] = []
    results = robustness(settings, dry_run=False, report=lines.append)
    assert results is not None
    return settings, results, lines


@pytest.mark.slow
@pytest.mark.ray
def test_models_of_a_comparison_side_by_side(finished: Finished, trained: Trained) -> None:
    _, results, lines = finished
    assert {group.label: list(group.run_ids) for group in results.groups} == {
        "edu_emotionnet, clean": [model.run_id for model in trained.models[:2]],
        "late_fusion, clean": [trained.models[2].run_id],
        "audio_only, clean": [trained.models[3].run_id],
    }
    assert [group.engine for group in results.groups] == ["factorised", "plain", "plain"]
    compared = results.compared(0.6)
    assert [c.other for c in compared] == ["late_fusion, clean", "audio_only, clean"]
    assert {c.other: c.adjusted_p for c in compared} == holm({c.other: c.difference.p for c in compared})
    assert any("edu_emotionnet, clean (2 models, factorised engine)" in line for line in lines)
    for late in (group for group in results.groups if group.model == "late_fusion"):
        assert results.summary(late)["effective_robustness"] == pytest.approx(0.0, abs=1e-12)
        assert results.summary(late)["mean_corruption_error"] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.ray
def test_the_tracked_run_holds_page_table_and_figures(finished: Finished, trained: Trained) -> None:
    _, results, lines = finished
    tracker = trained.tracker
    recorded = tracker.client.get_run(results.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags[opening.OPENINGS] == "1"
    assert recorded.data.tags[opening.OPENED_BY] == results.run_id
    assert recorded.data.tags[opening.DATASET] == results.manifest.digest
    assert opening.openings(tracker, results.manifest.digest) == {"models": 0, "sweeps": 1}
    folder = trained.output / results.name
    page = tracker.artifact(results.run_id, "report.html")
    assert page == (folder / "report.html").read_bytes()
    text = page.decode()
    for namespace in XML_NAMESPACES:
        text = text.replace(namespace, "")
    assert not re.search(r"https?://|src=|@import|url\((?!#)", text)
    assert text.count("<svg") == 3
    assert "edu_emotionnet against the others at rate 0.6" in text
    table = pq.read_table(io.BytesIO(tracker.artifact(results.run_id, "cells.parquet")))
    assert table.num_rows == 4 * len(results.cells)
    assert set(table.column("run_id").to_pylist()) == {model.run_id for model in trained.models}
    points = pd.read_csv(io.BytesIO(tracker.artifact(results.run_id, "tables/curves.csv")))
    seen = table.to_pandas().groupby(["model", "corruption", "modalities", "level"])["macro_f1"].mean()
    drawn = points[points["level"] > 0].set_index(["model", "corruption", "modalities", "level"])["macro-F1"]
    assert len(drawn) == 3 * 6 and np.allclose(drawn, seen[drawn.index])
    differences = pd.read_csv(io.BytesIO(tracker.artifact(results.run_id, "tables/differences.csv")))
    found = [(c.other, c.difference.value, c.difference.low, c.adjusted_p) for c in results.compared(0.6)]
    assert found == [*differences[["other", "difference", "low", "p (Holm)"]].itertuples(index=False, name=None)]
    assert set(differences["reference"]) == {"edu_emotionnet"} and set(differences["level"]) == {0.6}
    names = {path.name for path in (folder / "tables").iterdir()}
    assert {"summary.tex", "calibration-and-speakers.csv", "runs.csv"} <= names
    for group in results.groups:
        for key, value in results.summary(group).items():
            if np.isfinite(value):
                assert recorded.data.metrics[f"{key}.{group.slug}"] == pytest.approx(value)
    assert any(str(folder / "report.html") in line for line in lines)


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_models_by_other_names_are_the_same_sweep_and_nothing_runs_again(
    finished: Finished, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, results, _ = finished
    seed_0, seed_1, late, audio = trained.models
    names = [str(seed_0.folder), f"runs:/{seed_1.run_id}", late.run_id, str(audio.folder / "model")]
    names.append("models:/toy-model@challenger")  # seed_0 again: still one model
    table = (trained.output / results.name / "cells.parquet").read_bytes()
    computed_by = trained.tracker.read(results.run_id).tags["emolab.git_commit"]
    monkeypatch.setattr(beginning, "code_version", lambda: {"emolab.git_commit": "later", "emolab.git_clean": "false"})
    read: list[Unit] = []
    usable = sweep._usable
    monkeypatch.setattr(sweep, "_usable", lambda unit, *rest: read.append(unit) or usable(unit, *rest))
    lines: list[str] = []
    again = robustness(settings.model_copy(update={"model": tuple(names)}), dry_run=False, report=lines.append)
    assert again is not None
    assert read and len(read) == len(set(read))  # whether it is whole is looked at once
    assert (again.name, again.run_id) == (results.name, results.run_id)
    assert (trained.output / results.name / "cells.parquet").read_bytes() == table
    assert trained.tracker.find("emolab.kind", "robustness") == [results.run_id]
    assert not [line for line in lines if line.startswith("unit ")]
    tags = trained.tracker.read(results.run_id).tags
    assert tags[opening.OPENINGS] == "1"  # nothing was left to read
    assert tags["emolab.git_commit"] == computed_by
    assert trained.tracker.client.get_run(results.run_id).info.status == "FINISHED"


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_over_validation_opens_nothing(ray_cluster: None, trained: Trained, tmp_path: Path) -> None:
    suite = write_suite(tmp_path, {"name": "s", "sweeps": [{"corruption": "absent", "modalities": [["text"]]}]})
    model = str(trained.models[3].folder)
    settings = job_settings(trained.data, trained.output, suite, model, split="validation", name="chosen-by")
    results = robustness(settings, dry_run=False, report=no_report)
    assert results is not None and len(results.groups[0].tallies[0].session_ids) == 6
    assert not [tag for tag in trained.tracker.read(results.run_id).tags if tag.startswith("emolab.test_")]
    trained.tracker.client.delete_run(results.run_id)


@pytest.mark.ray
def test_a_folder_and_a_name_belong_to_one_sweep_and_one_process(
    finished: Finished, trained: Trained, one_line: Callable[..., None]
) -> None:
    settings, results, _ = finished
    other = settings.model_copy(update={"name": results.name, "model": str(trained.models[0].folder)})
    with pytest.raises(UserError) as error:
        robustness(other, dry_run=False, report=no_report)
    one_line(error, results.name, "choose another name")
    with holding(trained.output / results.name, what="sweep"), pytest.raises(UserError) as error:
        robustness(settings, dry_run=False, report=no_report)
    one_line(error, results.name, "in use by another process")


@pytest.mark.fault
@pytest.mark.ray
def test_a_sweep_that_was_deleted_in_the_tracker_is_recorded_anew(finished: Finished, trained: Trained) -> None:
    settings, results, _ = finished
    record = trained.output / results.name / "run.json"
    before = record.read_bytes()
    trained.tracker.client.delete_run(results.run_id)
    try:
        lines: list[str] = []
        again = robustness(settings, dry_run=False, report=lines.append)
        assert again is not None
        assert again.run_id != results.run_id
        assert trained.tracker.read(again.run_id).metrics == trained.tracker.read(results.run_id).metrics
    finally:  # as others expect it
        if (anew := json.loads(record.read_bytes())["run_id"]) != results.run_id:
            trained.tracker.client.delete_run(anew)
        record.write_bytes(before)
        trained.tracker.client.restore_run(results.run_id)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_that_fails_is_one_line_and_its_run_is_closed(
    ray_cluster: None,
    make_dataset: Callable[..., tuple[Path, Manifest]],
    trained: Trained,
    tmp_path: Path,
    one_line: Callable[..., None],
) -> None:
    data, manifest = make_dataset()
    shard = data / manifest.split_shards("test")[0].path
    shard.write_bytes(shard.read_bytes()[:-1])
    settings = job_settings(
        data, trained.output, write_suite(tmp_path), str(trained.models[0].folder), name="damaged", actors=1
    )
    with pytest.raises(UserError) as error:
        robustness(settings, dry_run=False, report=no_report)
    one_line(error, "test/", "damaged", "prepare it again")
    known = json.loads((trained.output / "damaged" / "run.json").read_text())
    failed = trained.tracker.client.get_run(known["run_id"])
    assert failed.info.status == "FAILED"
    assert failed.data.tags[opening.OPENINGS] == "1"  # it was opened, whatever came of it
    assert not list((trained.output / "damaged" / "units").iterdir())
    trained.tracker.client.delete_run(known["run_id"])


def test_every_name_of_a_model_finds_the_same_weights(trained: Trained, tmp_path: Path) -> None:
    seed_0 = trained.models[0]
    names = [
        str(seed_0.folder),
        str(seed_0.folder / "model"),
        seed_0.run_id,
        f"runs:/{seed_0.run_id}",
        "models:/toy-model@challenger",
        "models:/toy-model/1",
    ]
    found = [model_folders(name, lambda: trained.tracker, tmp_path / "cache") for name in names]
    assert {kept_model(folder).digest for (folder,) in found} == {kept_model(seed_0.folder / "model").digest}
    below = model_folders(trained.comparison, lambda: trained.tracker, tmp_path / "cache")
    assert [kept_model(folder).run_id for folder in below] == [model.run_id for model in trained.models]


@pytest.mark.parametrize("name", ["folder", "registered", "comparison"])
def test_without_data_a_model_is_evaluated_on_what_it_was_trained_on_and_the_plan_says_so(
    name: str, ray_cluster: None, trained: Trained, tmp_path: Path
) -> None:
    model = {
        "folder": str(trained.models[0].folder),
        "registered": "models:/toy-model@challenger",
        "comparison": trained.comparison,
    }[name]
    settings = RobustnessSettings(model=model, suite=write_suite(tmp_path), output=str(trained.output))
    lines: list[str] = []
    robustness(settings, dry_run=True, report=lines.append)
    assert f" test sessions of {trained.data}: " in lines[0]


def test_other_data_than_a_model_was_trained_on_are_taken_and_named(
    make_dataset: Callable[..., tuple[Path, Manifest]], trained: Trained, tmp_path: Path
) -> None:
    data, _ = make_dataset(seed=7)
    settings = job_settings(data, trained.output, write_suite(tmp_path), str(trained.models[0].folder))
    lines: list[str] = []
    robustness(settings, dry_run=True, report=lines.append)
    assert f" test sessions of {data}, which is not what 1 of them were trained on: " in lines[0]


def test_data_that_are_not_there_any_more_are_asked_for(
    make_dataset: Callable[..., tuple[Path, Manifest]],
    trained: Trained,
    tmp_path: Path,
    one_line: Callable[..., None],
) -> None:
    run = tmp_path / "copied"
    shutil.copytree(trained.models[0].folder, run)
    other = make_dataset(seed=8)[0]
    for place in (tmp_path / "nowhere", other):
        (run / "config.yaml").write_text(yaml.safe_dump({"data": str(place)}))
        with pytest.raises(UserError) as error:
            robustness(
                RobustnessSettings(model=str(run), suite=write_suite(tmp_path), output=str(trained.output)),
                dry_run=True,
                report=no_report,
            )
        one_line(error, str(place), "does not hold the data that", "--data")
    shutil.copytree(run / "model", tmp_path / "alone")
    with pytest.raises(UserError) as error:
        robustness(
            RobustnessSettings(model=str(tmp_path / "alone"), suite=write_suite(tmp_path), output=str(tmp_path / "o")),
            dry_run=True,
            report=no_report,
        )
    one_line(error, "it is not known on which data", "--data")


def test_models_that_were_not_tracked_are_told_apart(trained: Trained, tmp_path: Path) -> None:
    names = []
    for number, model in enumerate(trained.models[:2]):
        saved = checkpoint.load(model.folder / "model")
        checkpoint.save(tmp_path / str(number), replace(saved, state={**saved.state, "run_id": NoRun.run_id}))
        kept = kept_model(tmp_path / str(number))
        names.append(kept.run_id)
        assert kept.run_id == f"untracked-{kept.digest[:16]}"
    assert len(set(names)) == 2
    assert kept_model(trained.models[0].folder / "model").run_id == trained.models[0].run_id


def test_a_damaged_copy_is_fetched_again(trained: Trained, tmp_path: Path) -> None:
    name = trained.models[0].run_id
    (folder,) = model_folders(name, lambda: trained.tracker, tmp_path / "cache")
    digest = kept_model(folder).digest
    (folder / "model.safetensors").write_bytes(b"half a file")
    assert model_folders(name, lambda: trained.tracker, tmp_path / "cache") == [folder]
    assert kept_model(folder).digest == digest


def test_another_process_may_be_faster_to_fetch_a_model(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cache = trained.models[0].run_id, tmp_path / "cache"
    fetch = trained.tracker.client.__class__.download_artifacts

    def outpaced(self: Any, *arguments: Any) -> str:
        fetched = fetch(self, *arguments)
        shutil.copytree(fetched, cache / name)
        return fetched

    monkeypatch.setattr(trained.tracker.client.__class__, "download_artifacts", outpaced)
    (folder,) = model_folders(name, lambda: trained.tracker, cache)
    assert kept_model(folder).digest == kept_model(trained.models[0].folder / "model").digest
    assert [path.name for path in cache.iterdir()] == [name]


def changed(data: Path, folder: Path, **changes: Any) -> Path:
    """A manifest like the data set's but for some of its values; planning reads nothing else."""
    values = read_manifest(data).model_dump(mode="json") | changes
    write_manifest(Manifest.model_validate(values), folder)
    return folder


def splits_of(data: Path, **changes: Any) -> dict[str, Any]:
    splits = read_manifest(data).model_dump(mode="json")["splits"]
    return splits | {"test": splits["test"] | changes}


Case = Callable[[Trained, Path], RobustnessSettings]


def mistake(*, suite: dict[str, Any] | str = "paper", model: str | None = None, **options: Any) -> Case:
    """A call with one thing wrong."""

    def build(trained: Trained, folder: Path) -> RobustnessSettings:
        name = suite if isinstance(suite, str) else write_suite(folder, suite)
        models = (str(trained.models[0].folder),) if model is None else (model,) if model else ()
        data = folder / options["data"] if "data" in options else trained.data
        rest = {key: value for key, value in options.items() if key != "data"}
        return job_settings(data, folder / "runs", name, *models, **rest)

    return build


def on_data(**changes: Callable[[Path], Any]) -> Case:
    def build(trained: Trained, folder: Path) -> RobustnessSettings:
        values = {key: make(trained.data) for key, make in changes.items()}
        data = changed(trained.data, folder / "data", **values)
        suite = write_suite(folder, {"name": "s", "sweeps": [{"corruption": "absent", "modalities": [["text"]]}]})
        return job_settings(data, folder / "runs", suite, str(trained.models[0].folder))

    return build


def a_checkpoint_to_resume_from(trained: Trained, folder: Path) -> RobustnessSettings:
    newest = max((trained.models[0].folder / "checkpoints").iterdir())
    return job_settings(trained.data, folder / "runs", "paper", str(newest))


MISTAKES: dict[str, tuple[Case, list[str]]] = {
    "suite": (mistake(suite="papr"), ["'papr'", "did you mean 'paper'?"]),
    "corruption": (
        mistake(suite={"name": "s", "sweeps": [{"corruption": "gausian"}]}),
        ["small suite.yaml", "'gausian'", "did you mean 'gaussian'?"],
    ),
    "no condition": (mistake(suite={"name": "s"}), ["suite 's' has no condition", "a level above 0"]),
    "severity": (
        mistake(suite={"name": "s", "sweeps": [{"corruption": "gaussian", "levels": [7]}]}),
        ["gaussian", "no severity 7", "0, 1, 2, 3, 4, 5"],
    ),
    "rate": (
        mistake(suite={"name": "s", "sweeps": [{"corruption": "frame_missing", "levels": [1.5]}]}),
        ["frame_missing", "no rate 1.5"],
    ),
    "modality": (
        on_data(dimensions=lambda _: {"audio": 6, "visual": 4}),
        ["'text'", "the data has audio, visual"],
    ),
    "dimensions": (on_data(dimensions=lambda _: {"audio": 7, "visual": 4, "text": 3}), ["'audio': 6", "'audio': 7"]),
    "classes": (on_data(classes=lambda _: ["yes", "no"]), ["low, middle, high", "yes, no"]),
    "empty split": (on_data(splits=lambda data: splits_of(data, sessions=0)), ["no labelled sessions", "test split"]),
    "no labels": (on_data(splits=lambda data: splits_of(data, label_counts=[0, 0, 0])), ["no labelled sessions"]),
    "one session": (on_data(splits=lambda data: splits_of(data, sessions=1)), ["one session", "two or more"]),
    "no model": (mistake(model=""), ["no model was given", "--model"]),
    "no folder": (mistake(model="nowhere/at-all"), ["'nowhere/at-all'", "run's folder"]),
    "no run": (mistake(model="0" * 32), ["no tracker at", "runs/mlflow.db", "--output"]),
    "no version": (mistake(model="models:/nobody@champion"), ["no tracker at"]),
    "checkpoint": (a_checkpoint_to_resume_from, ["epoch-", "give the run's folder"]),
    "no data": (mistake(data="no-such-data"), ["no-such-data", "jobs/prepare.py"]),
    "tracking": (mistake(tracking={"enabled": False}), ["tracking.enabled=true"]),
    "name": (mistake(name="../elsewhere"), ["'../elsewhere'", "not allowed"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(
    trained: Trained, tmp_path: Path, one_line: Callable[..., None], name: str
) -> None:
    build, parts = MISTAKES[name]
    settings = build(trained, tmp_path)
    with pytest.raises(UserError) as error:
        robustness(settings, dry_run=False, report=no_report)
    one_line(error, *parts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("f" * 32, ["no run ffff"]),
        ("runs:/" + "e" * 32, ["no run eeee"]),
        ("models:/toy-model@champion", ["toy-model@champion"]),
        ("models:/toy-model/9", ["toy-model/9"]),
        ("models:/nobody/1", ["nobody/1"]),
    ],
)
def test_names_that_the_tracker_does_not_know(
    trained: Trained, tmp_path: Path, one_line: Callable[..., None], model: str, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        model_folders(model, lambda: trained.tracker, tmp_path / "cache")
    one_line(error, *parts)
    assert not (tmp_path / "cache").exists()


def test_a_run_without_a_model_is_named(trained: Trained, tmp_path: Path, one_line: Callable[..., None]) -> None:
    empty = trained.tracker.start("empty")
    empty.finish()
    with pytest.raises(UserError) as error:
        model_folders(empty.run_id, lambda: trained.tracker, tmp_path / "cache")
    one_line(error, empty.run_id, "holds no model")
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_says_what_would_run_and_writes_nothing(trained: Trained, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = job_settings(trained.data, tmp_path / "runs", "paper", str(trained.models[0].folder))
    assert robustness(settings, dry_run=True, report=lines.append) is None
    assert f"1 model, 28 cells, 12 test sessions of {trained.data}: 2 units of work" in lines[0]
    robustness(settings.model_copy(update={"suite": "standard"}), dry_run=True, report=lines.append)
    assert len(lines) == 3 and lines[2].endswith("no cell has rate 0.7, the highest is 0.667")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--suite", "papr"], "did you mean 'paper'?"),
        (["--model", "nowhere", "--reference", "edu_emotionnett"], "did you mean 'edu_emotionnet'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_status_two(
    toy_data: Path,
    tmp_path: Path,
    arguments: Sequence[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--data", str(toy_data), "--model", "nowhere", *arguments)
    result = run_here("robustness", *given, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert result.status == 2, result.errors
    (line,) = result.errors.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert not list(tmp_path.iterdir())


# What the results say, against made-up counts: a few sessions by two speakers, two classes.

CURVES: dict[str, Any] = {
    "name": "s",
    "seeds": [0, 1],
    "sweeps": [
        {"corruption": "frame_missing", "levels": [0.2, 0.6]},
        {"corruption": "absent", "modalities": [["audio"]]},
    ],
    "grids": [{"instances": [{"corruption": "burst_missing", "levels": [0.5]}], "modalities": ["audio", "text"]}],
}


def counts_with_accuracy(share: float, sessions: int) -> np.ndarray:
    """(N, 2, 2): each class 50 times a session, this share of both right, so macro-F1 is it too."""
    right = round(50 * share)
    return np.array([[[right, 50 - right], [50 - right, right]]] * sessions)


def made_up(cells: Sequence[Cell], score: Callable[[Cell], float], sessions: int = 6) -> Tally:
    return Tally(
        cells=tuple(cells),
        session_ids=tuple(f"s{i}" for i in range(sessions)),
        speaker_ids=tuple(f"p{i % 2}" for i in range(sessions)),
        confusion=np.stack([counts_with_accuracy(score(cell), sessions) for cell in cells]),
        calibration=np.ones((len(cells), sessions, 15, 3)),
        squared_error=np.full((len(cells), sessions), 20.0),
        weight=None,
        engine="plain",
    )


def table_score(scores: dict[tuple[str, float], tuple[float, float]]) -> Callable[[Cell], float]:
    """Score by (corruption, level) and corruption seed; 0.1 for cells of a grid, which no curve may contain."""
    return lambda cell: scores[cell.corruption, cell.level][cell.seed] if "burst" not in cell.corruption else 0.1


OURS = {
    ("clean", 0.0): (0.9, 0.9),
    ("frame_missing", 0.2): (0.88, 0.84),
    ("frame_missing", 0.6): (0.7, 0.66),
    ("absent", 1.0): (0.5, 0.5),
}
NO_BAND = {"value": 0.5, "low": 0.5, "high": 0.5, "level": 0.95, "clusters": 6}
LATE = {
    ("clean", 0.0): (0.8, 0.8),
    ("frame_missing", 0.2): (0.7, 0.7),
    ("frame_missing", 0.6): (0.6, 0.6),
    ("absent", 1.0): (0.6, 0.6),
}


def made_up_results(toy_data: Path, *names: str, suite: dict[str, Any] = CURVES) -> RobustnessResults:
    cells = expand(parse_suite(suite), ("audio", "visual", "text"))
    groups = [
        Group(
            model=name,
            regime="clean",
            run_ids=["r"],
            tallies=[made_up(cells, table_score(LATE if name == "late_fusion" else OURS))],
            engine="plain",
            agreement={},
        )
        for name in names
    ]
    return RobustnessResults(
        name="made-up",
        run_id="r",
        manifest=read_manifest(toy_data),
        split="test",
        cells=cells,
        reference="edu_emotionnet",
        groups=groups,
    )


def test_the_summary_against_values_by_hand(toy_data: Path) -> None:
    results = made_up_results(toy_data, "edu_emotionnet", "late_fusion")
    ours = results.summary(results.groups[0])
    # Seeds are averaged: 0.9 at 0, 0.86 at 0.2, 0.68 at 0.6.
    area = (0.2 * (0.9 + 0.86) / 2 + 0.4 * (0.86 + 0.68) / 2) / 0.6
    assert ours == pytest.approx(
        {
            "clean_accuracy": 0.9,
            "clean_macro_f1": 0.9,
            "clean_calibration_error": 0.0,
            "clean_brier": 20.0 / 100,
            "area_under_curve": area,
            "largest_tolerated_rate": 0.2,
            "effective_robustness": (0.86 - 0.8) + (0.68 - 0.7),
            "mean_corruption_error": ((0.14 + 0.32) / (0.3 + 0.4) + 0.5 / 0.4) / 2,
            "relative_mean_corruption_error": ((0.04 + 0.22) / (0.1 + 0.2) + 0.4 / 0.2) / 2,
            "worst_speaker_macro_f1": 0.9,
        }
    )
    assert results.worst_condition(results.groups[0]) == ("absent throughout (audio)", pytest.approx(0.5))
    late = results.summary(results.groups[1])
    assert late["effective_robustness"] == pytest.approx(0.0)
    assert late["mean_corruption_error"] == late["relative_mean_corruption_error"] == pytest.approx(1.0)


def test_what_needs_late_fusion_or_a_curve_is_absent_without_it(toy_data: Path) -> None:
    alone = made_up_results(toy_data, "edu_emotionnet", "mult")
    summary = alone.summary(alone.groups[0])
    assert {"effective_robustness", "mean_corruption_error", "relative_mean_corruption_error"}.isdisjoint(summary)
    assert "area_under_curve" in summary
    flat = made_up_results(toy_data, "edu_emotionnet", suite={"name": "s", "grids": CURVES["grids"]})
    assert flat.curves() == {}
    assert flat.main_curve() is None
    assert flat.worst_condition(flat.groups[0]) is None
    assert "area_under_curve" not in flat.summary(flat.groups[0])
    assert not next(flat.lines()).endswith("nan")
    assert b"Summary" in robustness_page(flat)


def test_relative_errors_are_undefined_where_late_fusion_loses_nothing(toy_data: Path) -> None:
    results = made_up_results(toy_data, "edu_emotionnet", "late_fusion")
    unmoved = made_up(results.cells, lambda _: 0.8)
    results = replace(results, groups=[results.groups[0], replace(results.groups[1], tallies=[unmoved])])
    summary = results.summary(results.groups[0])
    assert np.isnan(summary["relative_mean_corruption_error"])
    assert np.isfinite(summary["mean_corruption_error"])


def test_curves_begin_with_the_clean_cell_and_leave_grids_out(toy_data: Path) -> None:
    results = made_up_results(toy_data, "edu_emotionnet")
    ids = {
        key: {level: [results.cells[i].id for i in cells] for level, cells in levels.items()}
        for key, levels in results.curves().items()
    }
    everything = ("audio", "visual", "text")
    assert ids == {
        ("frame_missing", everything): {
            0.0: ["clean"],
            0.2: [f"frame_missing-0.2.audio-visual-text.seed{seed}" for seed in (0, 1)],
            0.6: [f"frame_missing-0.6.audio-visual-text.seed{seed}" for seed in (0, 1)],
        },
        ("absent", ("audio",)): {0.0: ["clean"], 1.0: ["absent-1.audio.seed0"]},
    }
    assert [list(levels) for levels in results.curves().values()] == [[0.0, 0.2, 0.6], [0.0, 1.0]]
    assert len(results.cells) == 1 + 4 + 1 + 2 * 3


def test_the_main_curve_does_not_hang_on_the_order_of_the_manifest(toy_data: Path) -> None:
    results = made_up_results(toy_data, "edu_emotionnet")
    backwards = dict(reversed(results.manifest.dimensions.items()))
    longer = CURVES | {"sweeps": [*CURVES["sweeps"], {"corruption": "gaussian"}]}  # five levels against two
    results = replace(
        results,
        manifest=results.manifest.model_copy(update={"dimensions": backwards}),
        cells=expand(parse_suite(longer), ("audio", "visual", "text")),
    )
    main = results.main_curve()
    assert main is not None
    assert main[0] == ("frame_missing", ("audio", "visual", "text"))


def shades(figure: bytes) -> np.ndarray:
    """Pixels of the heat map in a figure, (levels, 3)."""
    (image,) = list(re.findall(rb"base64,\s*([A-Za-z0-9+/=\s]+)", figure))[:1]
    pixels = imread(io.BytesIO(base64.b64decode(image)), format="png")
    return pixels[pixels.shape[0] // 2, :, :3]


def test_a_difference_of_a_point_does_not_look_like_a_collapse() -> None:
    """The first model loses a point, the second nearly everything."""
    figure = heat_map(["missing steps"], ["one"], [np.array([[0.61, 0.60]])])
    first, last = shades(figure)[[0, -1]]
    assert np.abs(first - last).max() < 0.05
    first, last = shades(heat_map(["missing steps"], ["one"], [np.array([[0.9, 0.1]])]))[[0, -1]]
    assert np.abs(first - last).max() > 0.4


def test_the_page_speaks_of_conditions_in_words_and_has_room_for_its_tables(toy_data: Path) -> None:
    results = made_up_results(toy_data, "edu_emotionnet", "late_fusion")
    page = robustness_page(results).decode()
    for internal in ("frame_missing", "burst_missing", "mean corruption error", "clean_macro", "rate of"):
        assert internal not in page, internal
    for word in ("rate: missing steps (all modalities)", "absent throughout (audio)", "tolerated rate"):
        assert word in page, word
    assert "the scores here lie between 0.50 and 0.90" in page
    sections = re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL)
    heads = {title: re.findall(r"<th(?: [^>]*)?>(.*?)</th>", body) for title, body in sections}
    assert max(len(columns) for columns in heads.values()) <= 7
    values = results.summary(results.groups[0])
    assert "over the classes that occur with that speaker" in page
    told = [each for title in ("Summary", "Against late fusion", "Calibration and speakers, on clean sessions")
            for each in heads[title][1:]]  # fmt: skip
    assert len(told) == len(values) + 3  # and the seeds, the worst condition and the worst speaker


def test_a_model_near_chance_is_seen_as_one(toy_data: Path) -> None:
    """It loses nothing at any rate, because it has nothing to lose."""
    results = made_up_results(toy_data, "edu_emotionnet", "mult")
    prior = results.manifest.class_prior_on("test")[1]
    flat = made_up(results.cells, lambda _: round(50 * (prior + 0.04)) / 50)
    results = replace(results, groups=[results.groups[0], replace(results.groups[1], tallies=[flat])])
    assert [results.near_chance(group) for group in results.groups] == [False, True]
    first, last = results.lines()
    assert f"(1 model, plain engine): clean macro-F1 0.9000 (class prior {prior:.4f}), area" in first
    assert f"(class prior {prior:.4f}, near chance), area" in last
    page = robustness_page(results).decode()
    assert f"macro-F1 {prior:.4f} (dotted in the figures)." in page
    assert "Within five points of macro-F1 of that on clean sessions: mult, clean." in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert cells.count("0.6 (near chance)") == 1  # the last rate there is
    summary = pd.read_csv(io.BytesIO(robustness_files(results)["tables/summary.csv"]))
    assert summary["tolerated rate"].tolist()[1] == 0.6
    assert page.count(">class prior<") == 1  # in the legend
    assert "near chance)" not in robustness_page(made_up_results(toy_data, "edu_emotionnet")).decode()


def test_noise_of_a_point_fills_no_axis(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(report, "svg", lambda figure: drawn.append(figure) or b"<svg/>")
    robustness_page(made_up_results(toy_data, "edu_emotionnet"))
    curves, calibration, _ = drawn
    for axes in (*curves.axes, *calibration.axes):
        bottom, top = axes.get_ylim()
        highest = max(np.max(line.get_ydata()) for line in axes.lines)
        assert bottom == 0.0 and top > 1.05 * highest


def test_every_model_of_a_large_comparison_has_a_line_of_its_own_and_no_legend_lies_across(
    toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(report, "svg", lambda figure: drawn.append(figure) or b"<svg/>")
    monkeypatch.setattr(
        RobustnessResults, "intervals", lambda _, __, levels, ___: [Interval(**NO_BAND) for _ in levels]
    )
    robustness_page(made_up_results(toy_data, *MODELS))
    for figure in drawn[:2]:
        assert [axes.get_legend() for axes in figure.axes] == [None, None]
        (legend,) = figure.legends
        for axes in figure.axes:
            models = [line for line in axes.lines if line.get_label() != "class prior"]
            assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in models}) == len(MODELS)
        assert [text.get_text() for text in legend.get_texts()][: len(MODELS)] == [f"{name}, clean" for name in MODELS]


def test_a_bootstrap_over_too_few_sessions_is_not_drawn(toy_data: Path) -> None:
    results = made_up_results(toy_data, "edu_emotionnet", "mult")
    page = robustness_page(results).decode()
    assert "95 % session-clustered" in page and "no intervals" not in page
    few = [replace(group, tallies=[made_up(results.cells, table_score(OURS), sessions=4)]) for group in results.groups]
    results = replace(results, groups=few)
    page = robustness_page(results).decode()
    assert results.compared(0.6) == []
    assert "95 % session-clustered" not in page and "Fewer than 5 sessions" in page
    assert page.count("<svg") == 3


def test_seeds_that_err_on_either_side_are_not_calibrated_together(toy_data: Path) -> None:
    """Both say 0.77; one is right in 60 % of steps, the other in 94 %."""
    results = made_up_results(toy_data, "edu_emotionnet")
    (tally,) = results.groups[0].tallies
    over, under = np.zeros((2, *tally.calibration.shape))
    over[..., 11, :], under[..., 11, :] = [100, 60, 77], [100, 94, 77]
    group = replace(
        results.groups[0],
        run_ids=["a", "b"],
        tallies=[replace(tally, calibration=over), replace(tally, calibration=under)],
    )
    rows = cell_table(replace(results, groups=[group])).to_pylist()
    assert group.calibration(results.clean) == pytest.approx(0.17)
    for (_, main), measure, column in (
        (results.main_curve(), group.calibration, "calibration_error"),
        (results.main_curve(), group.brier, "brier"),
    ):
        for level, cells in main.items():
            of_level = [row[column] for row in rows if row["cell"] in {results.cells[cell].id for cell in cells}]
            assert measure(cells) == pytest.approx(np.mean(of_level)), level


@pytest.mark.parametrize(
    ("suite", "unit"),
    [
        (
            {"name": "s", "purpose": "validation", "sweeps": [{"corruption": "speckle", "modalities": "each"}]},
            "severity",
        ),
        ({"name": "s", "sweeps": [{"corruption": "absent", "modalities": "each"}]}, "severity"),
        ({"name": "s", "sweeps": [{"corruption": "frame_missing", "modalities": [["audio"]]}]}, "rate"),
    ],
)
def test_what_is_summed_over_the_missing_rate_is_not_summed_over_any_other_condition(
    toy_data: Path, suite: dict[str, Any], unit: str
) -> None:
    cells = expand(parse_suite(suite), ("audio", "visual", "text"))
    results = replace(made_up_results(toy_data, "edu_emotionnet", "late_fusion"), cells=cells)
    groups = [replace(group, tallies=[made_up(cells, lambda cell: 0.9 - 0.1 * cell.level)]) for group in results.groups]
    results = replace(results, groups=groups)
    summary = results.summary(results.groups[0])
    assert {"area_under_curve", "largest_tolerated_rate", "effective_robustness"}.isdisjoint(summary)
    assert "mean_corruption_error" in summary and "area" not in next(results.lines())
    page = robustness_page(results).decode()
    main = results.main_curve()
    assert main is not None
    assert f"<h2>Score against the {unit}</h2>" in page
    assert f"one of its {len(results.curves())} conditions" in page
    assert "area under the curve" not in page and "Tolerated rate" not in page


def test_every_corruption_has_a_name_for_people() -> None:
    labels = {name: each.label for name, each in corruptions().items()}
    assert len(set(labels.values())) == len(labels)
    assert not [label for label in labels.values() if "_" in label]


@pytest.mark.parametrize(
    ("names", "shown"),
    [(("edu_emotionnet", "mult"), True), (("edu_emotionnet",), False), (("mult", "late_fusion"), False)],
)
def test_the_page_compares_only_where_there_is_something_to_compare(
    toy_data: Path, names: tuple[str, ...], shown: bool
) -> None:
    page = robustness_page(made_up_results(toy_data, *names)).decode()
    assert ("against the others" in page) == shown


def described(name: str, seed: int, **training: Any) -> KeptModel:
    settings = {"model.name": name, "model.d_model": 16, "training.modality_dropout": 0.0, "data": "d"}
    return KeptModel(folder=Path(), digest=f"{name}{seed}", run_id=f"{name}{seed}", settings=settings | training)


def test_models_that_differ_in_more_than_their_seed_are_told_apart(toy_data: Path) -> None:
    models = [
        described("edu_emotionnet", 0),
        described("edu_emotionnet", 1),
        described("edu_emotionnet", 2, **{"model.d_model": 32}),
        described("edu_emotionnet", 3, **{"training.modality_dropout": 0.5}),
        described("mult", 0),
    ]
    tally = made_up_results(toy_data, "mult").groups[0].tallies[0]
    agreement = [{"audio": 0.25}, {"audio": 0.75}, {}, {}, {}]
    groups = grouped(models, [tally] * 5, agreement)
    assert {group.label: list(group.run_ids) for group in groups} == {
        "edu_emotionnet (d_model=16), clean": ["edu_emotionnet0", "edu_emotionnet1"],
        "edu_emotionnet (d_model=32), clean": ["edu_emotionnet2"],
        "edu_emotionnet, modality dropout": ["edu_emotionnet3"],
        "mult, clean": ["mult0"],
    }
    assert groups[0].agreement == {"audio": 0.5}
    assert len({group.slug for group in groups}) == 4
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", groups[0].slug)


def test_models_are_counted_in_words() -> None:
    assert [counted_models(count) for count in (0, 1, 2)] == ["0 models", "1 model", "2 models"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_guide_to_python_reads_a_sweep(finished: Finished, trained: Trained) -> None:
    _, results, _ = finished
    with notebook(trained.output.parent, trained.tracker.uri) as namespace:
        found = run_section("A sweep of robustness", namespace, {"NAME": results.name})
    assert set(found["curve"].columns) == {group.label for group in results.groups}
    assert list(found["curve"].index) == [0.3, 0.6, 0.9]
    (late,) = (group for group in results.groups if group.model == "late_fusion")
    (cells,) = (levels[0.6] for (name, _), levels in results.curves().items() if name == "frame_missing")
    assert found["curve"].loc[0.6, late.label] == pytest.approx(late.score(cells))
