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
from emolab.studies.tuning import tune
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tuning.settings import TuneSettings


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

    def broken_off(at: str, by: BaseException) -> None:
        def report(line: str) -> None:
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
    assert tune(settings, dry_run=False, report=lambda _: None) is not None
    assert (status("search"), status("best")) == (["FINISHED"], ["FINISHED"])
    assert status("trial").count("FINISHED") == 4


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["tuning.space=nowhere.yaml"], ["nowhere.yaml"]),
        (["tuning.sampler=cmaes", "tuning.scheduler=halving"], ["sampler cmaes"]),
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
