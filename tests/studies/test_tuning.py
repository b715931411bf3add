"""jobs/tune.py as a whole: what it refuses before anything starts, and that it is one process's to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from tests.conftest import REPOSITORY

from emolab.configuration import parse
from emolab.locks import holding
from emolab.names import UserError
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.studies.tuning import tune
from emolab.tracking.beginning import write_record
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.train import flatten
from emolab.tuning.holding import holding_study
from emolab.tuning.plan import experiment, methods
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import read_space
from emolab.tuning.study import Study


def settings_for(data: Path, folder: Path, *overrides: str) -> TuneSettings:
    values = [
        f"--data={data}", f"--output={folder / 'runs'}", "--name=one", "--register-as=null",
        f"tuning.space={REPOSITORY / 'search_spaces' / 'paper.yaml'}", "tuning.trials=2",
        "tuning.final_workers=1", "tuning.grace_epochs=1",
        "model.d_model=8", "model.layers=1", "model.heads=2",
        "training.epochs=2", "training.batch_size=8", "training.warmup_epochs=0", *overrides,
    ]  # fmt: skip
    return parse(TuneSettings, values, description="")[0]


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_is_one_process_s_until_its_winner_is_reported(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    refused: list[str] = []

    def meanwhile(line: str) -> None:
        for stage in ("trial ", "epoch ", "best parameters"):
            if line.startswith(stage) and stage not in refused:
                with pytest.raises(UserError, match="in use by another process"), holding(folder, what="study"):
                    pass
                refused.append(stage)

    folder = tmp_path / "runs" / "one"
    assert tune(settings_for(toy_data, tmp_path), dry_run=False, report=meanwhile) is not None
    assert refused == ["trial ", "epoch ", "best parameters"]
    with holding(folder, what="study"):
        pass


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_what_ends_a_search_early_is_what_its_runs_say(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    longer = ("tuning.trials=4", "training.epochs=10", "training.patience=10")
    settings = settings_for(toy_data, tmp_path, "tuning.scheduler=none", "tuning.concurrency=1", *longer)
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    assert isinstance(tracker, MLflowTracker)

    going_on: list[str] = []

    def broken_off(at: str, by: BaseException) -> None:
        def report(line: str) -> None:
            if line.startswith("resuming"):
                going_on.extend(status("search"))
            if line.startswith(at):
                raise by

        with pytest.raises(type(by)):
            tune(settings, dry_run=False, report=report)

    def status(kind: str) -> list[str]:
        found = [tracker.client.get_run(run_id) for run_id in tracker.find("emolab.kind", kind)]
        return sorted(run.info.status for run in found)

    broken_off("trial 0", KeyboardInterrupt())  # another is training
    assert (status("search"), {*status("trial")}) == (["KILLED"], {"FINISHED", "KILLED"})
    broken_off("best parameters", UserError("no room"))
    assert status("search") == ["FAILED"]
    assert going_on == ["RUNNING"]
    assert tune(settings, dry_run=False, report=lambda _: None) is not None
    assert (status("search"), status("best")) == (["FINISHED"], ["FINISHED"])
    assert status("trial").count("FINISHED") == 4


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["tuning.space=nowhere.yaml"], ["nowhere.yaml"]),
        (["tuning.sampler=cmaes", "tuning.scheduler=halving"], ["sampler cmaes"]),
        (["tuning.epoch_budget=1", "training.patience=2"], ["no trial could complete", "tuning.epoch_budget"]),
        (
            ["tuning.time_budget_s=9", "tuning.scheduler=pbt", "tuning.trials=4"],
            ["scheduler pbt", "leave out tuning.time_budget_s"],
        ),
        (["tuning.time_budget_s=9", "tuning.scheduler=halving"], ["scheduler halving", "leave out tuning.time_bu"]),
        (["tuning.sampler=gp"], ["sampler gp", "scheduler asha", "set tuning.scheduler=none"]),
        (
            ["tuning.sampler=gp", "tuning.scheduler=none", "tuning.constraints.parameters=9"],
            ["sampler gp", "over a limit", "leave out tuning.constraints"],
        ),
        (
            ["tuning.scheduler=median", "tuning.objectives=[macro_f1, robustness]"],
            ["scheduler median", "one objective", "leave out tuning.scheduler"],
        ),
        (["--output=README.md/runs"], ["--output README.md/runs", "README.md is not a folder"]),
        (["--data=nowhere"], ["nowhere", "jobs/prepare.py"]),
    ],
)
def test_what_needs_neither_ray_nor_data_is_refused_before_either(
    toy_data: Path,
    tmp_path: Path,
    overrides: list[str],
    parts: list[str],
    one_line: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(ray, "is_initialized", lambda: pytest.fail("Ray was asked for"))
    with pytest.raises(UserError) as error:
        tune(settings_for(toy_data, tmp_path, *overrides), dry_run=False, report=lambda _: None)
    one_line(error, *parts)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def begun(settings: TuneSettings, manifest: Manifest | None, *, trials: int = 0) -> Path | str:
    """The study of a search, with so many trials; its database."""
    database = settings.tuning.storage or Path(settings.output) / str(settings.name) / "study.db"
    space = read_space(Path(settings.tuning.space), settings.base())
    study = Study(database, str(settings.name), space=space)
    study.claim(flatten(experiment(settings, space, manifest)))
    study.draw_with(methods(settings), trials=2)
    for _ in range(trials):
        study.tell(study.ask().number, "COMPLETE", [0.5], epochs=2)
    study.flush()
    return database


@pytest.mark.ray
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_needs_no_data_is_refused_before_they_are_made(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Any, dry_run: bool
) -> None:
    data = tmp_path / "data"
    made = (f"prepare.output={data}", "prepare.options={sessions: 20, speakers: 5, mean_steps: 4}")
    settings = settings_for(data, tmp_path, *made)
    begun(settings, read_manifest(toy_data))
    refused = {
        ("tuning.final_workers=900",): ["training the best configuration with 900 workers", "900 CPU needed"],
        ("workers.cpus=500",): ["a trial cannot run here", "500 CPU needed"],
        ("tuning.storage=postgresql://nobody@127.0.0.1:1/x",): ["nobody@127.0.0.1:1/x cannot be opened"],
        ("tuning.storage=postgresql://nobody@127.0.0.1:1/x", "--name=null"): ["127.0.0.1:1/x cannot be opened"],
        (f"tuning.storage=sqlite:///{REPOSITORY}/README.md/x.db",): ["README.md is not a folder"],
        ("training.epochs=3",): ["the study one was made with training.epochs 2, not 3: choose another name"],
    }
    before = contents(tmp_path)
    for overrides, parts in refused.items():
        with pytest.raises(UserError) as error:
            tune(settings_for(data, tmp_path, *made, *overrides), dry_run=dry_run, report=lambda _: None)
        one_line(error, *parts)
    if dry_run:
        lines: list[str] = []
        assert tune(settings, dry_run=True, report=lines.append) is None
        assert [line.split(":")[0] for line in lines] == [f"data set {data} is missing and will be made"]
    assert contents(tmp_path) == before


@pytest.mark.ray
def test_a_dry_run_refuses_what_the_search_would_be_refused_for_and_leaves_no_trace(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Any
) -> None:
    manifest = read_manifest(toy_data)
    own, folder = settings_for(toy_data, tmp_path), tmp_path / "runs" / "one"
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    shared = (f"tuning.storage={url}", "--name=two")

    def refused(*overrides: str) -> pytest.ExceptionInfo[UserError]:
        before = contents(tmp_path)
        with pytest.raises(UserError) as error:
            tune(settings_for(toy_data, tmp_path, *overrides), dry_run=True, report=lambda _: None)
        assert contents(tmp_path) == before
        return error

    with holding(folder, what="study"):
        one_line(refused(), f"the study in {folder} is in use by another process")
    with holding_study(url, "two"):
        one_line(refused(*shared), "the study two is in use by another process")
    begun(settings_for(toy_data, tmp_path, *shared), manifest)
    one_line(refused(*shared, "training.epochs=3"), "the study two was made with training.epochs 2, not 3")
    begun(own, manifest, trials=2)
    one_line(
        refused("tuning.sampler=random"), "the study one holds all its 2 trials, made with sampler tpe, not random"
    )
    record = {"identity": {"dataset": manifest.digest}, "run_id": "1", "tracker": "", "storage": None}
    write_record(folder, record)
    one_line(
        refused(f"tuning.storage={url}"),
        f"the trials of the study in {folder} are in this folder, not in {tmp_path / 'studies.db'}",
        "leave out tuning.storage", f"remove {folder / 'run.json'}",
    )  # fmt: skip
    write_record(folder, record | {"storage": "postgresql://host/studies"})
    one_line(refused(), "are in postgresql://host/studies, not in its own folder: set tuning.storage to postgresql:")
    write_record(folder, record | {"identity": {"dataset": "another"}})
    one_line(refused(), f"{folder} holds a search on other data")
    (folder / "study.db").write_bytes(b"no database")
    write_record(folder, record)
    one_line(refused(), "it is damaged (file is not a database)")
