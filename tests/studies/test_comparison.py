"""A comparison from configuration to report: real training, a real cluster, a real tracker."""

import ast
import csv
import io
import json
import re
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tests.conftest import REPOSITORY, ToyCorpus
from tests.docs.guides import notebook, run_section
from tests.ports import free_port

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.theory import local_lipschitz
from emolab.configuration import parse, validate
from emolab.corpora.corpus import SessionReference, Split
from emolab.locks import LOCK
from emolab.names import UserError
from emolab.reports import comparison_figures
from emolab.reports.comparison import comparison_files, comparison_page, comparison_tables
from emolab.reports.comparison_text import header_lines, still_improving
from emolab.reports.page import Measured
from emolab.scores import accuracy, class_f1, macro_f1
from emolab.sessions.loading import load_split
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.preparation import prepare
from emolab.sessions.shards import sha256
from emolab.studies import test_split as opening
from emolab.studies import theory
from emolab.studies.comparison import compare, plan_comparison
from emolab.studies.comparison_analysis import Analysis, analyse
from emolab.studies.comparison_cells import Place, Remaining, Trained, _in_parallel, _result, train_cells
from emolab.studies.comparison_results import CellResult, Comparison, read_comparison
from emolab.studies.comparison_search import SEARCHES, search_settings
from emolab.studies.comparison_settings import MODELS, CompareSettings, SearchBudget, default_preset
from emolab.studies.report import ReportSettings, write_report
from emolab.studies.session_results import CONFIDENCE_STEPS, SessionResults, from_parquet, to_parquet
from emolab.studies.theory import TheoryRecord
from emolab.tracking import beginning
from emolab.tracking.buffered import BufferedTracker
from emolab.tracking.provenance import CLEAN, COMMIT
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tracking.tracker import NoTracker
from emolab.training.data import TRAINING_SPLITS
from emolab.training.loop import evaluate
from emolab.training.processes import Workers
from emolab.training.recipe import TrainSettings
from emolab.training.train import TrainedModel, load_model, train

TINY = {"d_model": 8, "layers": 1, "heads": 2, "dropout": 0.0}
RECIPE = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup_epochs": 0, "decay_epochs": [], "patience": 3}


def settings_for(data: Path, output: Path, **values: Any) -> CompareSettings:
    training = RECIPE | values.pop("training", {})
    base = {"data": str(data), "output": str(output), "model": TINY, "training": training, "name": "study"}
    return CompareSettings.model_validate(base | values)


def tracker_of(settings: CompareSettings) -> MLflowTracker:
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    assert isinstance(tracker, MLflowTracker)
    return tracker


def run(settings: CompareSettings) -> tuple[Analysis, list[str]]:
    lines: list[str] = []
    analysis = compare(settings, dry_run=False, report=lines.append)
    assert analysis is not None
    return analysis, lines


def traces(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every weight file: a file written again has others."""
    paths = folder.rglob("*.safetensors")
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@dataclass(frozen=True)
class Finished:
    settings: CompareSettings
    analysis: Analysis
    lines: list[str]
    folder: Path

    @property
    def comparison(self) -> Comparison:
        return self.analysis.comparison


@pytest.fixture(scope="module")
def finished(ray_cluster: None, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Two models, two seeds."""
    output = tmp_path_factory.mktemp("comparison") / "runs"
    settings = settings_for(toy_data, output, models=["edu_emotionnet", "late_fusion"], seeds=[0, 1])
    yield Finished(settings, *run(settings), output / "study")


@pytest.mark.ray
@pytest.mark.slow
def test_every_cell_is_a_child_run_whose_scores_an_independent_evaluation_repeats(finished: Finished) -> None:
    tracker, data = tracker_of(finished.settings), Path(finished.settings.data)
    children = tracker.find("emolab.kind", "cell", parent=finished.comparison.run_id)
    assert sorted(children) == sorted(cell.run_id for cell in finished.comparison.cells)
    assert len(children) == 4
    store = load_split(data, read_manifest(data), "test")
    for cell in finished.comparison.cells:
        folder = finished.folder / "cells" / f"{cell.model}-seed-{cell.seed}"
        model, saved = load_model(folder / "model")
        assert saved.state["training"]["seed"] == cell.seed
        expected = evaluate(model, store, TrainSettings().training, workers=Workers())
        metrics = tracker.read(cell.run_id).metrics
        assert metrics["test_accuracy"] == pytest.approx(expected.accuracy, abs=1e-12)
        assert metrics["test_macro_f1"] == pytest.approx(expected.macro_f1, abs=1e-12)
        for name, score in zip(read_manifest(data).classes, expected.class_f1, strict=True):
            assert metrics[f"test_f1.{name}"] == pytest.approx(score, abs=1e-12)
        assert metrics["trainable_parameters"] == sum(p.numel() for p in model.parameters())
        assert metrics["training_seconds"] > 0
        shared = {key: value for key, value in cell.configuration["model"].items() if key in TINY}
        assert (shared, cell.configuration["training"]["seed"]) == (TINY, cell.seed)
        assert cell.sessions is not None
        assert np.array_equal(cell.sessions.confusion.sum(0), expected.confusion)
        assert (cell.sessions.confidence is None) == (cell.model == "late_fusion")


@pytest.mark.ray
@pytest.mark.slow
def test_the_test_split_is_opened_once_per_cell_after_all_are_trained(finished: Finished) -> None:
    tracker = tracker_of(finished.settings)
    records = [tracker.read(cell.run_id) for cell in finished.comparison.cells]
    frozen = json.loads(tracker.artifact(finished.comparison.run_id, "frozen.json"))
    for record in records:
        assert record.tags[opening.OPENINGS] == "1"
        assert record.tags[opening.OPENED_BY] == finished.comparison.run_id
        assert record.tags[opening.DATASET] == finished.comparison.manifest.digest
        assert record.tags[opening.CHECKPOINT] in frozen
    assert len(set(frozen)) == 4
    assert finished.comparison.openings == {"models": 4, "sweeps": 0}
    assert finished.analysis.trained_late() == 0
    assert sum(line.startswith("cell ") for line in finished.lines) == 4
    assert re.search(r"cell 2 of 4 .* about \d+ (s|min) left", "\n".join(finished.lines))
    assert any("opened for 4 of 4" in line for line in finished.lines)


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_command_again_trains_nothing_opens_nothing_and_reports_the_same(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginning, "code_version", lambda: {COMMIT: "later", CLEAN: "false"})
    before, page = traces(finished.folder), (finished.folder / "report.html").read_bytes()
    analysis, lines = run(finished.settings)
    assert traces(finished.folder) == before
    assert any("opened for 0 of 4" in line for line in lines)
    tracker = tracker_of(finished.settings)
    assert {tracker.read(cell.run_id).tags[opening.OPENINGS] for cell in analysis.comparison.cells} == {"1"}
    assert (finished.folder / "report.html").read_bytes() == page
    assert len(tracker.find("emolab.kind", "comparison")) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_the_report_is_rebuilt_from_the_tracker_alone(finished: Finished, tmp_path: Path) -> None:
    settings = ReportSettings(
        run=finished.comparison.run_id,
        runs=finished.settings.output,
        output=str(tmp_path / "again.html"),
        tables=str(tmp_path / "tables"),
    )
    write_report(settings, report=lambda _: None)
    assert (tmp_path / "again.html").read_bytes() == (finished.folder / "report.html").read_bytes()
    ours = {path.name: path.read_bytes() for path in (finished.folder / "tables").iterdir()}
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    assert {name.partition(".")[0] for name in ours} == {
        "table-ii", "models", "differences-accuracy", "differences-macro-f1", "lemma-1", "theorem-1", "cells",
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_that_is_printed_rebuilds_the_report(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output folder is not the usual one, and neither is the working folder."""
    (again,) = [line for text in finished.lines for line in text.splitlines() if line.startswith("again ")]
    words = shlex.split(again.removeprefix("again"))
    assert words[1].endswith("jobs/report.py")
    settings, _ = parse(ReportSettings, words[2:], description="")
    monkeypatch.chdir(tmp_path)
    write_report(settings, report=lambda _: None)
    assert (tmp_path / "report.html").read_bytes() == (finished.folder / "report.html").read_bytes()


@pytest.mark.ray
@pytest.mark.slow
def test_lemma_and_theorem_are_measured_on_validation_before_the_test_split_is_opened(finished: Finished) -> None:
    tracker, data = tracker_of(finished.settings), Path(finished.settings.data)
    store = load_split(data, read_manifest(data), "validation")
    said = [number for number, line in enumerate(finished.lines) if line.startswith("Lemma 1 and Theorem 1 measured")]
    opened = next(number for number, line in enumerate(finished.lines) if "test split opened" in line)
    assert len(said) == 1 and said[0] < opened
    for cell in finished.comparison.cells:
        record = cell.theory
        assert record is not None and record.split == "validation" and not record.not_measured
        assert record == TheoryRecord.model_validate_json(tracker.artifact(cell.run_id, theory.FILE_NAME))
        batch = store.batch([store.session_ids.index(name) for name in record.session_ids])
        model, _ = load_model(finished.folder / "cells" / f"{cell.model}-seed-{cell.seed}" / "model")
        case = next(case for case in record.lipschitz if (case.modality, case.missing) == ("audio", "text"))
        again = local_lipschitz(model, batch, modality="audio", missing="text", iterations=60, tolerance=1e-3)
        assert case.constants == pytest.approx(again.constants.tolist(), rel=1e-4)
        assert (record.feedback is not None) == (cell.model == "edu_emotionnet")
    before = {cell.run_id: tracker.read(cell.run_id).tags[theory.MEASURED] for cell in finished.comparison.cells}
    _, lines = run(finished.settings)
    assert not any(line.startswith("Lemma 1") for line in lines)
    assert {name: tracker.read(name).tags[theory.MEASURED] for name in before} == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_no_comparison_is_refused_in_one_line(
    finished: Finished, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    tracker = tracker_of(finished.settings)
    cell = finished.comparison.cells[0].run_id
    with pytest.raises(UserError) as error:
        read_comparison(tracker, cell)
    one_line(error, cell, "cell")
    with pytest.raises(UserError) as error:
        read_comparison(tracker, "0" * 32)
    one_line(error, "0" * 32)
    typo = {"uri": f"sqlite:///{tmp_path}/typo/mlflow.db"}
    for values in ({}, {"tracking": typo}):
        with pytest.raises(UserError) as error:
            write_report(ReportSettings.model_validate({"run": cell, "runs": str(tmp_path)} | values), report=print)
        one_line(error, "no tracker at", "mlflow.db", "--runs")
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_that_is_not_frozen_or_has_changed_does_not_meet_the_test_split(
    finished: Finished, one_line: Callable[..., None]
) -> None:
    tracker, data = tracker_of(finished.settings), Path(finished.settings.data)
    cell, other = finished.comparison.cells[:2]
    folder = finished.folder / "cells" / f"{cell.model}-seed-{cell.seed}"

    def score(run_id: str, frozen: list[str]) -> bool:
        return opening.score_on_test_split(
            folder, data, run_id=run_id, tracker=tracker, opened_by="x", frozen=frozen, training_seconds=1.0
        )

    with pytest.raises(UserError) as error:
        score(cell.run_id, [])
    one_line(error, "not among those frozen")
    digest = opening.checkpoint_digest(folder / "model")
    with pytest.raises(UserError) as error:  # these weights are not those that the other run was tested with
        score(other.run_id, [digest])
    one_line(error, "has changed since")
    assert not score(cell.run_id, [digest])
    assert tracker.read(cell.run_id).tags[opening.OPENINGS] == tracker.read(other.run_id).tags[opening.OPENINGS] == "1"


def frozen_model(data: Path, output: Path) -> tuple[MLflowTracker, TrainedModel, Callable[..., bool]]:
    """A tracker, a trained run in it, and what tests that run."""
    recipe = {"data": str(data), "output": str(output), "model": TINY, "training": RECIPE | {"epochs": 1}}
    settings = TrainSettings.model_validate(recipe)
    tracker = open_tracker(**settings.tracking.model_dump(), output=output)
    assert isinstance(tracker, MLflowTracker)
    trained = train(settings, tracker=tracker)
    digest = opening.checkpoint_digest(trained.folder / "model")

    def score(tracker: MLflowTracker) -> bool:
        return opening.score_on_test_split(
            trained.folder, data, run_id=trained.run_id, tracker=tracker, opened_by="x", frozen=[digest],
            training_seconds=1.0,
        )  # fmt: skip

    return tracker, trained, score


@pytest.mark.fault
@pytest.mark.ray
def test_an_opening_that_fails_is_counted(toy_data: Path, tmp_path: Path, one_line: Callable[..., None]) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    tracker, trained, score = frozen_model(data, tmp_path / "runs")
    shard = data / read_manifest(data).split_shards("test")[0].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError) as error:
        score(tracker)
    one_line(error, shard.name, "damaged")
    tags = tracker.read(trained.run_id).tags
    assert (tags[opening.OPENINGS], opening.RECORDED in tags) == ("1", False)
    shard.write_bytes(content)
    assert score(tracker)
    tags = tracker.read(trained.run_id).tags
    assert (tags[opening.OPENINGS], tags[opening.RECORDED]) == ("2", "true")


@pytest.mark.fault
@pytest.mark.ray
def test_the_split_stays_closed_where_its_opening_cannot_be_recorded(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., None]
) -> None:
    _, trained, score = frozen_model(toy_data, tmp_path / "runs")
    read: list[str] = []
    monkeypatch.setattr(opening, "load_split", lambda *arguments: read.append(arguments[-1]))
    dead = BufferedTracker(f"http://127.0.0.1:{free_port()}", "x", output=tmp_path)
    manifest = read_manifest(toy_data)
    for attempt in (
        lambda: score(dead),
        lambda: opening.open_for_sweep(manifest, run_id=trained.run_id, tracker=dead)(toy_data, manifest, "test"),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        one_line(error, "cannot be reached")
    dead.close()
    assert not read


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
def test_a_diverging_cell_is_recorded_and_more_seeds_can_be_added(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    values: dict[str, Any] = {
        "models": ["early_fusion", "late_fusion"],
        "reference": "early_fusion",
        "tuned": {"late_fusion": {"training": {"learning_rate": 1e30}}},
    }
    settings = settings_for(toy_data, tmp_path, seeds=[0], **values)
    with pytest.raises(UserError) as error:
        run(settings)
    one_line(error, "1 of 2 cells diverged", "late_fusion, seed 0", "non-finite loss")
    page = (tmp_path / "study" / "report.html").read_text()
    assert "late_fusion (seed 0)" in page
    assert "trained after the first opening" not in page
    before = {name: trace for name, trace in traces(tmp_path).items() if "early_fusion" in name}
    with pytest.raises(UserError):
        run(settings.model_copy(update={"seeds": (0, 1)}))
    after = traces(tmp_path)
    assert {name: after[name] for name in before} == before
    (run_id,) = tracker_of(settings).find("emolab.kind", "comparison")
    comparison = read_comparison(tracker_of(settings), run_id)
    assert [cell.seed for cell in comparison.cells if cell.sessions is not None] == [0, 1]
    assert comparison.openings["models"] == 2
    assert analyse(comparison, resamples=50).trained_late() == 1
    assert "1 of these models was trained after" in (tmp_path / "study" / "report.html").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_system_refuses_to_one_cell_is_that_cell_s_failure(toy_data: Path, tmp_path: Path) -> None:
    settings = settings_for(toy_data, tmp_path, models=["early_fusion"], reference="early_fusion", seeds=[0, 1])
    cells = [settings.cell("early_fusion", seed, tmp_path) for seed in settings.seeds]
    (cells[0].folder / "curves.svg").mkdir(parents=True)  # cannot be written, as on a full disk
    place = Place(
        tracker_uri=tracker_of(settings).uri, experiment="tests", output=str(tmp_path), parent="", concurrency=1, gpus=0
    )
    lines: list[str] = []
    refused, trained = train_cells(cells, place, report=lines.append)
    assert "curves.svg" in refused.failure and refused.failure.endswith(": Is a directory")
    assert refused.run_id and not refused.diverged
    assert not trained.failure and trained.checkpoint
    assert len(lines) == 2


def _read_what_is_not_there(path: str) -> bytes:
    return Path(path).read_bytes()


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.ray
def test_a_task_that_the_system_or_ray_ends_is_an_answer_and_no_traceback(ray_cluster: None, tmp_path: Path) -> None:
    task = ray.remote(_read_what_is_not_there).options(num_cpus=1)
    ((_, refused),) = _in_parallel(task, [(str(tmp_path / "absent"),)], 1)
    assert isinstance(refused, UserError)
    assert str(refused) == f"{tmp_path / 'absent'}: No such file or directory"
    reference = ray.remote(_sleep).options(num_cpus=1).remote(60.0)
    ray.cancel(reference)
    assert str(_result(reference)) == "its process was lost (TaskCancelledError)"


def test_what_was_trained_before_is_no_time_that_is_left(toy_data: Path, tmp_path: Path) -> None:
    settings = settings_for(toy_data, tmp_path, models=["early_fusion"], reference="early_fusion", seeds=[0, 1, 2])
    cells = [settings.cell("early_fusion", seed, tmp_path) for seed in settings.seeds]
    (cells[0].folder / "model").mkdir(parents=True)
    remaining = Remaining(cells, concurrency=1)
    remaining.note(cells[0], Trained(run_id="a", seconds=0.0, resumed=True))
    assert str(remaining) == ""
    remaining.note(cells[1], Trained(run_id="b", seconds=30.0, resumed=False))
    assert str(remaining) == "; about 30 s left"


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
def test_the_split_stays_closed_while_a_cell_may_still_be_trained(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    settings = settings_for(
        toy_data, tmp_path, models=["early_fusion", "late_fusion"], reference="early_fusion", seeds=[0]
    )
    blocked = tmp_path / "study" / "cells" / "late_fusion-seed-0"
    blocked.mkdir(parents=True)
    (blocked / "run.json").write_text(json.dumps({"identity": {}, "run_id": "none", "tracker": ""}))
    with pytest.raises(UserError) as error:
        run(settings)
    one_line(error, "1 of 2 cells could not be trained", "late_fusion, seed 0", "stays closed")
    tracker = tracker_of(settings)
    (trained,) = tracker.find("emolab.kind", "cell")
    assert not [tag for tag in tracker.read(trained).tags if tag.startswith("emolab.test")]
    assert not (tmp_path / "study" / "report.html").exists()
    (blocked / "run.json").unlink()
    analysis, lines = run(settings)
    assert any("early_fusion, seed 0" in line and "trained before" in line for line in lines)
    assert set(analysis.standings) == {"early_fusion", "late_fusion"}
    with FileLock(tmp_path / "study" / LOCK), pytest.raises(UserError) as error:
        run(settings)
    one_line(error, "in use by another process", str(tmp_path))
    with pytest.raises(UserError) as error:
        run(settings_for(toy_data, tmp_path, models=["early_fusion"], reference="early_fusion", training={"epochs": 2}))
    one_line(error, "choose another name")
    (deleted,) = tracker.find("emolab.kind", "comparison")
    tracker.client.delete_run(deleted)
    anew, lines = run(settings)
    assert anew.comparison.run_id != deleted
    assert tracker.find("emolab.kind", "comparison") == [anew.comparison.run_id]
    assert sum("trained before" in line for line in lines) == 2
    assert sorted(tracker.children(anew.comparison.run_id)) == sorted(cell.run_id for cell in anew.comparison.cells)


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
def test_every_model_gets_the_same_search_and_its_cells_the_best_of_it(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    space = tmp_path / "space.yaml"
    choices = "[0.001, 0.01, 0.02]"
    space.write_text(f"parameters: {{training.learning_rate: {{distribution: categorical, choices: {choices}}}}}")
    settings = settings_for(
        toy_data, tmp_path / "runs", models=["early_fusion", "late_fusion"], reference="early_fusion", seeds=[0],
        training={"epochs": 2}, search={"trials": 2, "space": str(space)}, theory={"sessions": 0},
    )  # fmt: skip
    analysis, _ = run(settings)
    tracker = tracker_of(settings)
    found = json.loads(tracker.artifact(analysis.comparison.run_id, SEARCHES))
    assert list(found) == ["early_fusion", "late_fusion"]
    for model, searched in found.items():
        assert searched["trials"] == 2 == len(tracker.find("emolab.kind", "trial", parent=searched["run_id"]))
        rate = searched["parameters"]["training.learning_rate"]
        assert analysis.comparison.settings["tuned"][model] == {"training": {"learning_rate": rate}}
        _, saved = load_model(tmp_path / "runs" / "study" / "cells" / f"{model}-seed-0" / "model")
        assert saved.state["training"]["learning_rate"] == rate
    assert {tracker.client.get_run(search["run_id"]).info.status for search in found.values()} == {"FINISHED"}
    before = traces(tmp_path / "runs")
    again, lines = run(settings)
    assert traces(tmp_path / "runs") == before
    assert not any(line.startswith("trial ") for line in lines)
    assert json.loads(tracker.artifact(again.comparison.run_id, SEARCHES)) == found
    space.write_text("parameters: {training.learning_rat: {distribution: categorical, choices: [0.1]}}")
    with pytest.raises(UserError) as error:
        run(settings.model_copy(update={"name": "other"}))
    one_line(error, "training.learning_rat", "learning_rate")
    space.write_text("parameters: {model.name: {distribution: categorical, choices: [late_fusion, early_fusion]}}")
    with pytest.raises(UserError) as error:
        run(settings.model_copy(update={"name": "other"}))
    one_line(error, "space.yaml", "model.name")


@dataclass(frozen=True, kw_only=True)
class WithoutValidation(ToyCorpus):
    """Published training and test parts, and nothing to select by."""

    def references(self) -> list[SessionReference]:
        def split(reference: SessionReference) -> Split:
            return "test" if reference.speaker_id in ("p0", "p1") else "train"

        return [replace(reference, published_split=split(reference)) for reference in super().references()]


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
def test_a_data_set_without_validation_is_compared_at_fixed_epochs(
    ray_cluster: None, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    data = tmp_path / "data"
    prepare(WithoutValidation(sessions=30), data, seed=0, shard_sessions=16, report=lambda _: None)
    values: dict[str, Any] = {"models": ["late_fusion"], "reference": "late_fusion", "seeds": [3]}
    with pytest.raises(UserError) as error:
        run(settings_for(data, tmp_path / "runs", **values))
    one_line(error, "no validation split", "training.selection=last")
    assert not (tmp_path / "runs").exists()
    analysis, _ = run(settings_for(data, tmp_path / "runs", **values, training={"selection": "last", "epochs": 2}))
    (cell,) = analysis.comparison.cells
    assert [report["epoch"] for report in cell.history] == [1, 2]
    assert all(report["validation_loss"] is None for report in cell.history)
    assert cell.metrics["test_macro_f1"] > 0
    assert not analysis.differences["macro_f1"]
    table = comparison_tables(analysis)["Cells"]
    assert table.rows[0][list(table.columns).index("validation macro-F1")] is None


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_cluster_or_the_data_cannot_give_is_refused(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    with pytest.raises(UserError) as error:
        plan_comparison(settings_for(toy_data, tmp_path, gpus=0.5))
    one_line(error, "GPU needed")
    with pytest.raises(UserError) as error:
        compare(settings_for(tmp_path / "nowhere", tmp_path), dry_run=False, report=print)
    one_line(error, "nowhere", "jobs/prepare.py")
    plan = plan_comparison(settings_for(toy_data, tmp_path, concurrency=1))
    assert (len(plan.cells), plan.concurrency) == (len(MODELS) * 3, 1)
    assert compare(settings_for(toy_data, tmp_path), dry_run=True, report=lambda _: None) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"models": ["mult", "mulltt"]}, ["mulltt", "did you mean 'mult'"]),
        ({"models": []}, ["models"]),
        ({"models": ["mult", "mult"]}, ["mult is listed twice"]),
        ({"models": ["mult"]}, ["'edu_emotionnet' is not among the models", "mult"]),
        ({"seeds": [0, 0]}, ["0 is listed twice"]),
        ({"seeds": [-1]}, ["seeds", "-1"]),
        ({"model": {"dmodel": 8}}, ["'dmodel'", "did you mean 'd_model'"]),
        ({"model": {"d_model": 7}}, ["edu_emotionnet", "multiple of heads"]),
        ({"tuned": {"mullt": {}}}, ["'mullt'", "did you mean 'mult'"]),
        ({"tuned": {"mult": {"trainin": {}}}}, ["tuned.mult", "'trainin'", "did you mean 'training'"]),
        ({"tuned": {"mult": {"training": {"epocs": 3}}}}, ["mult", "epocs", "did you mean 'epochs'"]),
        ({"tuned": {"mult": {"model": {"name": "misa"}}}}, ["tuned.mult", "misa"]),
        ({"training": {"seed": 3}}, ["training.seed", "seeds"]),
        ({"tracking": {"enabled": False}}, ["tracking.enabled"]),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        validate(CompareSettings, values)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_options_reach_the_models_that_have_them_and_no_others() -> None:
    settings = CompareSettings.model_validate(
        {
            "model": {"d_model": 12, "heads": 2, "cmaa": False, "shift_span": 5},
            "tuned": {"mult": {"training": {"learning_rate": 0.5, "seed": 9}, "model": {"d_model": 20}}},
        }
    )
    cells = {name: settings.cell(name, 4, Path("x")).settings for name in MODELS}
    assert {cell.training.seed for cell in cells.values()} == {4}
    assert {name for name, cell in cells.items() if cell.training.learning_rate == 0.5} == {"mult"}
    assert {cell.model.options.d_model for name, cell in cells.items() if name != "mult"} == {12}
    assert cells["mult"].model.options.d_model == 20
    assert cells["cfn_esa"].model.options.shift_span == 5
    assert not cells["edu_emotionnet"].model.options.cmaa
    assert not cells["edu_emotionnet-tfl"].model.options.tfl
    assert len({(cell.output, cell.name) for cell in cells.values()}) == len(MODELS)


def test_the_command_line_takes_lists_either_way_and_means_the_small_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*arguments: str) -> CompareSettings:
        return parse(CompareSettings, arguments, description="", default_preset=default_preset)[0]

    assert read().data == "data/edusim-small"
    assert read().model["d_model"] == 32
    assert read("--preset", "paper").model["d_model"] == 256
    assert read("--preset=smoke").training.epochs == 3
    assert read("--models", "edu_emotionnet,mult").models == ("edu_emotionnet", "mult")
    assert read("--models", "[edu_emotionnet, mult]", "--seeds", "4,2").seeds == (4, 2)
    assert read("--seeds", "7").seeds == read("--seeds", "[7]").seeds == (7,)
    assert read("models=[edu_emotionnet]", "seeds=[7]", "model.d_model=16").model == read().model | {"d_model": 16}
    assert read().models == MODELS
    assert capsys.readouterr().err.startswith("preset small: ")
    mine = tmp_path / "mine.yaml"
    mine.write_text("training: {epochs: 2}\n")
    assert read("--config", str(mine)).model == CompareSettings().model
    with pytest.raises(UserError, match="--conf"):
        read("--conf", str(mine))
    assert capsys.readouterr().err == ""


def test_a_search_does_not_hang_on_the_order_of_the_seeds(tmp_path: Path) -> None:
    searched = [
        search_settings(CompareSettings(seeds=seeds, search=SearchBudget(trials=1)), "mult", tmp_path)
        for seeds in ((1, 0), (2, 1, 0), (0, 1, 2))
    ]
    assert searched[0] == searched[1] == searched[2]


def modules() -> dict[str, ast.Module]:
    root = REPOSITORY / "platform" / "emolab"
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))
    }


def imports(tree: ast.Module) -> set[str]:
    """Files of the platform that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("emolab"):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("emolab")}
    return {name.removeprefix("emolab.").replace(".", "/") + ".py" for name in names}


SELECTION = "sessions/selection.py"
"""Reads any split but the test split by itself; that one by leave of studies/test_split.py."""


READING = {
    "load_split": {SELECTION, "sessions/loading.py", "studies/test_split.py", "training/data.py"},
    # Shards one by one: ``load_split``, and the check before a training.
    "split_blocks": {"sessions/loading.py", "training/readiness.py"},
    # Which shards a split has: beside these the check of a whole data set, what Ray's workers train on, and what a
    # model is asked to predict.
    "split_shards": {
        "sessions/manifest.py", "sessions/loading.py", "sessions/shards.py", "training/datasets.py",
        "training/distributed.py", "serving/batch.py",
    },
    "read_shard": {"sessions/loading.py", "sessions/shards.py"},
    "ShardReader": {"sessions/shards.py", "training/datasets.py"},
    # Whatever it holds: also the sessions that a preparation has finished.
    "read_rows": {"sessions/shards.py", "sessions/work.py", "serving/batch.py"},
}  # fmt: skip
"""What reads sessions -> the modules that name it, in whatever way."""


def named(node: ast.AST) -> str:
    """What a part of a module names: a value, an attribute, an import or a definition."""
    return next((getattr(node, key) for key in ("id", "attr", "name") if isinstance(getattr(node, key, None), str)), "")


def test_what_reads_sessions_is_named_by_those_alone_who_may_read_their_split() -> None:
    naming: dict[str, set[str]] = {name: set() for name in READING}
    for place, tree in modules().items():
        for node in ast.walk(tree):
            if (name := named(node)) in naming:
                naming[name].add(place)
                assert not (isinstance(node, ast.alias) and node.asname), f"{place} imports {name} by another name"
            # Named in a string it could be looked up.
            assert not (isinstance(node, ast.Constant) and node.value in naming), place
    assert naming == READING


def test_one_module_asks_for_the_test_split_by_name() -> None:
    asking = {}
    for place, tree in modules().items():
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and named(node.func) == "load_split"]
        for call in called:
            (split,) = call.args[2:]
            asking.setdefault(place, set()).add(split.value if isinstance(split, ast.Constant) else "any")
        functions = [call.func for call in called]
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and named(node) == "load_split":
                assert isinstance(node, ast.Name) and node in functions, f"{place} hands load_split on"
    assert asking.pop(SELECTION) == {"any"}
    assert asking == {"studies/test_split.py": {"test"}, "training/data.py": {"train", "validation"}}


def test_a_training_needs_no_test_split_and_comes_to_the_same_without_one(toy_data: Path, tmp_path: Path) -> None:
    assert TRAINING_SPLITS == ("train", "validation")
    shutil.copytree(toy_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    weights = []
    for data in (toy_data, tmp_path / "data"):
        recipe = {"data": str(data), "output": str(tmp_path / data.name), "model": TINY, "training": RECIPE}
        trained = train(TrainSettings.model_validate(recipe), tracker=NoTracker())
        weights.append(sha256(trained.folder / "model" / "model.safetensors"))
    assert weights[0] == weights[1]


def test_training_and_tuning_cannot_reach_the_module_that_opens_it() -> None:
    known = modules()
    reached = {place for place in known if place.startswith(("training/", "tuning/"))}
    assert len(reached) > 10
    while new := {file for place in reached for file in imports(known[place]) if file in known} - reached:
        reached |= new
    assert "sessions/loading.py" in reached  # imports are followed
    assert SELECTION not in reached
    assert not {place for place in reached if place.startswith("studies/")}


# Reading and judging results, without training


def results(counts: np.ndarray, *, weights: np.ndarray | None = None) -> SessionResults:
    """Session results with given counts (N, K, K)."""
    sessions, classes = counts.shape[:2]
    return SessionResults(
        classes=tuple(f"class {i}" for i in range(classes)),
        modalities=("audio", "visual", "text"),
        session_ids=tuple(f"s{i}" for i in range(sessions)),
        speaker_ids=tuple(f"p{i % 6}" for i in range(sessions)),
        steps=counts.sum(axis=(1, 2)),
        confusion=counts,
        confidence=weights,
    )


def judged(scores: Mapping[str, Sequence[float]], *, sessions: int = 60, **changes: Any) -> Analysis:
    """The analysis of models that are right on the given share of steps, one share per seed."""
    cells = []
    for number, (model, shares) in enumerate(scores.items()):
        for seed, share in enumerate(shares):
            generator = np.random.default_rng([number, seed])
            right = generator.binomial(5, share, (sessions, 2))
            counts = np.stack(
                [np.stack([right[:, 0], 5 - right[:, 0]], 1), np.stack([5 - right[:, 1], right[:, 1]], 1)], 1
            )
            cells.append(
                CellResult(
                    model=model,
                    seed=seed,
                    run_id=f"{number}{seed}" * 16,
                    sessions=results(counts),
                    history=({"epoch": 1, "train_loss": 1.0, "validation_loss": None},),
                    metrics={"trainable_parameters": 10.0 + number, "training_seconds": 2.0, "test_accuracy": share},
                    ended=1.0,
                    first_opened="2030-01-01T00:00:00+00:00",
                    opened="2030-01-01T00:00:00+00:00",
                    openings=1,
                )
            )
    summary = {"sessions": 60, "steps": 600, "speakers": ["p0"], "label_counts": [300, 300], "present": {}}
    manifest = {
        "corpus": "toy", "classes": ["class 0", "class 1"], "dimensions": {"audio": 1}, "step_seconds": 1.0, "seed": 0,
        "command": "", "statistics": {"mean": {}, "std": {}}, "shards": [],
        "splits": {"train": summary, "validation": summary, "test": summary},
    }  # fmt: skip
    values: dict[str, Any] = {
        "run_id": "0" * 32, "name": "judged", "tags": {}, "settings": {}, "reference": next(iter(scores)),
        "manifest": Manifest.model_validate(manifest | changes.pop("manifest", {})),
        "openings": {"models": 9, "sweeps": 1}, "cells": tuple(cells),
    }  # fmt: skip
    return analyse(Comparison(**(values | changes)), resamples=400)


def test_the_ranking_sentence_follows_from_the_scores() -> None:
    won = judged({"edu_emotionnet": [0.9, 0.9, 0.9], "mult": [0.6, 0.6, 0.6], "misa": [0.9, 0.89, 0.9]})
    assert "came out: it is number 1 of 3" in won.ranking_sentence()
    assert "1 favour edu_emotionnet and 0 the other" in won.ranking_sentence()
    lost = judged({"edu_emotionnet": [0.6, 0.6], "mult": [0.9, 0.9]})
    assert "did not come out: it is number 2 of 2" in lost.ranking_sentence()
    assert "behind mult" in lost.ranking_sentence()
    assert "0 favour edu_emotionnet and 1 the other" in lost.ranking_sentence()
    assert "cannot be judged" in judged({"mult": [0.5], "misa": [0.6]}).ranking_sentence()
    other = judged({"mult": [0.6, 0.6], "edu_emotionnet": [0.9, 0.9]})
    assert "edu_emotionnet first, came out" in other.ranking_sentence()
    assert "0 favour mult and 1 the other" in other.ranking_sentence()


def test_the_headline_claims_no_more_than_the_seeds_support() -> None:
    """Of two seeds, one by chance far better: the weights differ beyond doubt, the models need not."""
    scores = {"edu_emotionnet": [0.9, 0.6], "mult": [0.6, 0.55], "misa": [0.3, 0.32]}
    analysis = judged(scores)
    rows = {row.model: row for row in analysis.differences["macro_f1"]}
    row = rows["mult"]
    assert row.adjusted_p is not None and row.adjusted_p <= 0.05
    assert row.adjusted_t_p is not None and row.adjusted_t_p > 0.05
    assert row.verdict == "better (these weights)"
    sentence = analysis.ranking_sentence()
    assert "0 favour edu_emotionnet and 0 the other model" in sentence
    assert "2 more hold for these very weights (bootstrap) and not for other seeds" in sentence
    assert "other seeds, 2 in favour of edu_emotionnet and 0 of the other model: with 2 seeds" in sentence
    least, most = sorted(row.t_test.detectable_difference for row in rows.values() if row.t_test is not None)
    found = "with 2 seeds the smallest difference that the t-test finds (power 0.8) is"
    assert f"{found} {least:.3f} to {most:.3f}, depending on the model; for" in sentence
    assert least > 1.0 and "; for 2 of 2 models that is more than 1, the largest there can be" in sentence
    close = judged({"edu_emotionnet": [0.6, 0.35], "mult": [0.9, 0.6]}).ranking_sentence()
    assert 0.0 < float(close.partition(found)[2].rstrip(".")) < 1.0
    assert "1 more holds" in close and "0 in favour of edu_emotionnet and 1 of the other model" in close
    (single,) = judged({"edu_emotionnet": [0.5], "mult": [0.9]}).differences["macro_f1"]
    assert single.t_test is None and single.verdict == "worse (these weights)"
    assert "with one seed there is no test" in judged({"edu_emotionnet": [0.5], "mult": [0.9]}).ranking_sentence()


@given(data=st.data())
def test_a_verdict_never_contradicts_the_t_test(data: st.DataObject) -> None:
    seeds = data.draw(st.integers(1, 3))
    share = st.floats(0.3, 0.9)
    scores = {name: [data.draw(share) for _ in range(seeds)] for name in ("edu_emotionnet", "mult")}
    for rows in judged(scores, sessions=20).differences.values():
        for row in rows:
            if row.verdict.startswith("reference"):
                assert row.adjusted_t_p is not None and row.adjusted_t_p <= 0.05
                assert row.t_test is not None
                assert (row.t_test.difference > 0) == (row.verdict == "reference better")


@pytest.mark.parametrize(("sweeps", "told"), [(0, "0 times"), (1, "once"), (3, "3 times")])
def test_openings_by_sweeps_are_counted_in_words(sweeps: int, told: str) -> None:
    analysis = judged({"edu_emotionnet": [0.8], "mult": [0.6]}, openings={"models": 9, "sweeps": sweeps})
    (line,) = [line for line in header_lines(analysis) if line.startswith("The test split was opened")]
    assert line.startswith("The test split was opened once for every model and seed, after all of them were trained: ")
    assert line.endswith(f"opened 9 times for models in all, 2 of these here, and {told} for robustness sweeps.")


def test_the_header_does_not_say_once_of_what_was_opened_again_nor_after_all_of_what_was_added() -> None:
    comparison = judged({"edu_emotionnet": [0.8, 0.8], "mult": [0.6, 0.6]}).comparison
    *others, last = comparison.cells
    late = datetime.fromisoformat(last.opened).timestamp() + 60.0
    again = replace(last, openings=3, ended=late, opened="2031-01-01T00:00:00+00:00")
    added = analyse(replace(comparison, cells=(*others, again)), resamples=50)
    text = "\n".join(header_lines(added))
    assert "opened once for every model and seed but mult (seed 1) 3 times: 2030" in text
    assert "to 2031-01-01" in text
    assert "9 times for models in all, 6 of these here" in text
    assert "1 of these models was trained after the first opening" in text and "after all of them" not in text


def test_the_first_opening_is_kept_when_a_run_is_opened_again(tmp_path: Path, toy_data: Path) -> None:
    tracker = open_tracker(enabled=True, uri=None, experiment="tests", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    run = tracker.start("swept")
    manifest = read_manifest(toy_data)
    opening.open_for_sweep(manifest, run_id=run.run_id, tracker=tracker)
    first = tracker.read(run.run_id).tags[opening.OPENED]
    opening.open_for_sweep(manifest, run_id=run.run_id, tracker=tracker)
    tags = tracker.read(run.run_id).tags
    assert opening.first_opening(tags) == first < tags[opening.OPENED]
    assert opening.first_opening({opening.OPENED: first}) == first  # a run of before this was said
    assert opening.first_opening({}) == ""


def test_the_code_of_every_call_that_made_a_comparison_is_named() -> None:
    tags = {COMMIT: f"{'a' * 40} {'b' * 40}", CLEAN: "false"}
    line = header_lines(judged({"edu_emotionnet": [0.8], "mult": [0.6]}, tags=tags))[-1]
    assert f"code {'a' * 12}, {'b' * 12} with changes" in line


def test_tables_of_differences_have_room_on_the_page_and_all_columns_in_the_files() -> None:
    analysis = judged({"edu_emotionnet": [0.8, 0.7, 0.75], "mult": [0.6, 0.65, 0.7]})
    page = comparison_page(analysis).decode()
    sections = dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL))
    shown: set[str] = set()
    for kind in ("sessions", "seeds"):
        heads = re.findall(
            r"<th(?: [^>]*)?>(.*?)</th>", sections[f"edu_emotionnet against each model: macro-F1, over {kind}"]
        )
        assert len(heads) <= 9
        shown |= set(heads)
    assert shown == set(comparison_tables(analysis)["Differences macro-F1"].columns)


def test_differences_are_those_of_the_table_and_corrected_for_their_number() -> None:
    analysis = judged({"edu_emotionnet": [0.8, 0.82, 0.79], "mult": [0.7, 0.74, 0.71], "misa": [0.8, 0.8, 0.8]})
    for metric, rows in analysis.differences.items():
        for row in rows:
            ours, theirs = (analysis.standings[name].scores[metric].mean for name in ("edu_emotionnet", row.model))
            assert row.by_session is not None and row.t_test is not None and row.by_speaker is not None
            assert row.by_session.value == pytest.approx(ours - theirs, abs=1e-12)
            assert row.t_test.difference == pytest.approx(ours - theirs, abs=1e-12)
            assert row.adjusted_p is not None and row.adjusted_p >= row.by_session.p
            assert row.t_test.detectable_difference > 0
            assert row.by_speaker.clusters == 6
        assert (
            max(row.adjusted_p or 0 for row in rows) > max(row.by_session.p for row in rows if row.by_session) * 0.999
        )
        smallest = min((row for row in rows if row.by_session), key=lambda row: row.by_session.p)  # type: ignore[union-attr]
        assert smallest.by_session is not None
        assert smallest.adjusted_p == pytest.approx(2 * smallest.by_session.p)


def test_four_sessions_give_scores_and_no_intervals() -> None:
    analysis = judged({"edu_emotionnet": [0.9, 0.9], "mult": [0.3, 0.3]}, sessions=4)
    (row,) = analysis.differences["macro_f1"]
    assert row.by_session is None and row.t_test is not None and row.verdict == "undecided"
    assert not analysis.class_f1
    assert b"over seeds" in comparison_page(analysis)
    assert judged({"edu_emotionnet": [0.9], "mult": [0.3]}, sessions=5).class_f1


def test_a_model_that_lost_seeds_is_paired_over_those_it_has() -> None:
    analysis = judged({"edu_emotionnet": [0.8, 0.7, 0.9], "mult": [0.6, 0.65, 0.7]})
    cells = tuple(
        replace(cell, sessions=None, failure="non-finite loss") if (cell.model, cell.seed) == ("mult", 0) else cell
        for cell in analysis.comparison.cells
    )
    thinned = analyse(replace(analysis.comparison, cells=cells), resamples=100)
    (row,) = thinned.differences["accuracy"]
    assert row.t_test is not None and row.t_test.seeds == 2
    table = comparison_tables(thinned)["Table I"]
    assert [(line[0], line[3]) for line in table.rows[:2]] == [("mult", "2/3"), ("edu_emotionnet", "3/3")]
    none_left = tuple(replace(c, sessions=None, failure="x") if c.model == "mult" else c for c in cells)
    lonely = analyse(replace(analysis.comparison, cells=none_left), resamples=100)
    assert comparison_tables(lonely)["Table I"].rows[0][:4] == ["mult", None, None, "0/3"]
    assert b"diverged" in comparison_page(lonely)


def test_tables_parse_back_to_the_numbers_they_hold() -> None:
    analysis = judged({"edu_emotionnet": [0.8, 0.7], "mult": [0.6, 0.65], "edu_emotionnet-tfl": [0.7, 0.71]})
    files = comparison_files(analysis)
    assert {name for name in files if "table-" in name} == {
        f"tables/table-{number}.{kind}" for number in ("i", "iii") for kind in ("csv", "tex")
    }
    for name, table in comparison_tables(analysis).items():
        stem = "tables/" + name.lower().replace(" ", "-")
        rows = list(csv.DictReader(io.StringIO(files[f"{stem}.csv"].decode())))
        latex = [line for line in files[f"{stem}.tex"].decode().splitlines() if " & " in line][1:]
        assert len(rows) == len(latex) == len(table.rows)
        for row, line, values in zip(rows, latex, table.rows, strict=True):
            parts = line.removesuffix(r" \\").split(" & ")
            for column, part, value in zip(table.columns, parts, values, strict=True):
                if isinstance(value, Measured):
                    assert float(row[column]) == value.mean
                    assert row[f"{column} std"] == ("" if np.isnan(value.deviation) else repr(value.deviation))
                    numbers = [float(number) for number in part.strip("$").split(r" \pm ")]
                    assert numbers == pytest.approx([value.mean, value.deviation][: len(numbers)], abs=5.1e-5)
                elif isinstance(value, float):
                    assert float(row[column]) == value
                    assert float(part.strip("$")) == pytest.approx(value, rel=1e-3)
                else:
                    assert row[column] == ("" if value is None else str(value))
                    assert part.replace("\\", "") == ("--" if value is None else str(value))


def test_a_best_epoch_that_was_the_last_is_counted_by_the_epochs_of_its_own_cell() -> None:
    comparison = judged({"edu_emotionnet": [0.8, 0.7], "mult": [0.6, 0.65]}, settings={"training": {"epochs": 20}})
    settings = CompareSettings.model_validate(
        {"training": {"epochs": 20}, "tuned": {"mult": {"training": {"epochs": 50}}}}
    )

    def told(best: Mapping[str, int], reached: Mapping[str, int]) -> int:
        cells = tuple(
            replace(
                cell,
                history=({"epoch": reached[cell.model], "best_epoch": best[cell.model]},),
                configuration=settings.cell(cell.model, cell.seed, Path("x")).settings.model_dump(mode="json"),
            )
            for cell in comparison.comparison.cells
        )
        return still_improving(replace(comparison.comparison, cells=cells))

    assert told({"edu_emotionnet": 3, "mult": 50}, {"edu_emotionnet": 20, "mult": 50}) == 2  # of 2 seeds
    assert told({"edu_emotionnet": 20, "mult": 20}, {"edu_emotionnet": 20, "mult": 20}) == 2
    assert told({"edu_emotionnet": 3, "mult": 20}, {"edu_emotionnet": 20, "mult": 20}) == 0, "mult ran out of patience"


def test_the_size_and_training_of_every_model_stand_beside_each_other() -> None:
    """A baseline that is wider or deeper than it was published, or than the full model, must be seen to be so."""
    analysis = judged({"edu_emotionnet": [0.8, 0.7], "mult": [0.6, 0.65], "misa": [0.5, 0.5]})
    settings = CompareSettings.model_validate(
        {
            "models": ["edu_emotionnet", "mult"],
            "model": {"d_model": 12, "layers": 1, "heads": 2, "dropout": 0.25},
            "tuned": {"mult": {"model": {"d_model": 30, "layers": 5, "heads": 5}, "training": {"kl_weight": 0.0}}},
        }
    )
    resolved = {name: settings.cell(name, 0, Path("x")).settings.model_dump(mode="json") for name in settings.models}
    cells = tuple(replace(cell, configuration=resolved.get(cell.model, {})) for cell in analysis.comparison.cells)
    found = analyse(replace(analysis.comparison, cells=cells), resamples=100)
    table = comparison_tables(found)["Models"]
    assert list(table.columns) == [
        "model", "width", "layers", "heads", "dropout", "learning rate", "lambda", "parameters",
    ]  # fmt: skip
    assert [list(row) for row in table.rows] == [
        ["edu_emotionnet", 12, 1, 2, 0.25, 1e-4, 0.1, 10],
        ["mult", 30, 5, 5, 0.25, 1e-4, 0.0, 11],
        ["misa", *[None] * 6, 12],  # a run of which nothing is known
    ]
    assert "Models: size and training" in comparison_page(found).decode()


def test_the_page_says_what_its_scores_may_be_set_beside() -> None:
    scores = {"edu_emotionnet": [0.8, 0.7], "mult": [0.6, 0.65]}
    recorded = judged(scores, manifest={"corpus": "mosi", "provenance": {"caveat": "features have seen the labels"}})
    assert b"features have seen the labels." in comparison_page(recorded)
    assert b"not to be set beside" not in comparison_page(recorded)
    simulated = comparison_page(judged(scores, manifest={"corpus": "edusim"})).decode()
    assert "not to be set beside the paper" in simulated
    assert "accuracy 0.5000, macro-F1 0.3333" in simulated  # the class prior: 2 * 0.5 / 1.5 / 2
    strangers = re.sub(r"https?://(www\.w3\.org|matplotlib\.org|purl\.org|creativecommons\.org)", "", simulated)
    assert "http" not in strangers and "src=" not in strangers
    assert simulated.count("<svg") == 5


@given(data=st.data())
def test_session_results_survive_the_file(data: st.DataObject) -> None:
    sessions, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = generator.integers(0, 20, (sessions, classes, classes))
    lengths = generator.integers(1, 2 * CONFIDENCE_STEPS, sessions)
    observed = np.arange(CONFIDENCE_STEPS) < lengths[:, None]
    weights = generator.random((sessions, CONFIDENCE_STEPS, 3), dtype=np.float32) * observed[..., None]
    given_weights = weights if data.draw(st.booleans()) else None
    before = replace(results(counts, weights=given_weights), steps=lengths)
    after = from_parquet(to_parquet(before))
    for name in ("classes", "modalities", "session_ids", "speaker_ids"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("steps", "confusion", "confidence", "observed"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and something else PAR1"])
def test_something_else_is_no_session_results(content: bytes) -> None:
    with pytest.raises(UserError, match="no session results"):
        from_parquet(content)


@given(data=st.data())
def test_counts_per_session_are_those_of_a_plain_loop(data: st.DataObject) -> None:
    sessions, steps, classes = (data.draw(st.integers(1, 5)) for _ in range(3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scores = torch.rand(sessions, steps, classes, generator=generator)
    labels = torch.randint(-1, classes, (sessions, steps), generator=generator)
    labels[labels < 0] = -100
    batch = SessionBatch(features={}, present={}, lengths=torch.full((sessions,), steps), labels=labels)
    expected = torch.zeros(sessions, classes, classes, dtype=torch.int64)
    for i in range(sessions):
        for t in range(steps):
            if labels[i, t] >= 0:
                expected[i, labels[i, t], scores[i, t].argmax()] += 1
    counts = opening.session_confusion(scores, batch)
    assert torch.equal(counts, expected)
    assert 0.0 <= float(accuracy(counts.sum(0))) <= 1.0
    assert float(macro_f1(counts.sum(0))) == pytest.approx(float(class_f1(counts.sum(0)).mean()))


def test_a_run_of_one_epoch_leaves_a_mark_in_its_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_figures, "svg", lambda figure: drawn.append(figure) or b"<svg/>")
    longer = [{"epoch": epoch, "train_loss": 1.0 / epoch} for epoch in (1, 2)]
    comparison_figures.loss_curves({"mult": [longer[:1], longer]})
    assert [line.get_marker() for line in drawn[0].axes[0].lines] == ["o", ""]


def test_figures_draw_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison_page(judged({"edu_emotionnet": [0.8, 0.7], "mult": [0.6, 0.65], "misa": [0.5, 0.5]}))


@pytest.mark.ray
@pytest.mark.slow
def test_the_guide_to_python_reads_a_comparison(finished: Finished) -> None:
    with notebook(finished.folder.parent.parent, tracker_of(finished.settings).uri) as namespace:
        found = run_section("A comparison", namespace, {"NAME": finished.folder.name})
    tested = {cell.run_id: cell for cell in finished.comparison.cells}
    assert set(found["ranking"].index) == {"edu_emotionnet", "late_fusion"}
    for row in found["cells"].itertuples():
        assert found["tested"].loc[row.run, "tags.emolab.model"] == row.model == tested[row.run].model
        assert found["tested"].loc[row.run, "metrics.test_macro_f1"] == tested[row.run].metrics["test_macro_f1"]
