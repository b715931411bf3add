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


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["tuning.space=nowhere.yaml"], ["nowhere.yaml"]),
        (["tuning.sampler=cmaes", "tuning.scheduler=halving"], ["sampler cmaes"]),
        (["tuning.epoch_budget=1", "training.patience=2"], ["no trial could complete", "tuning.epoch_budget"]),
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
