"""Ray Train runs the same loop: what comes out does not depend on the number of workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_loop import finish, settings_for

from emolab.checkpoint import CheckpointFolder
from emolab.names import UserError
from emolab.tracking.runs import existing_tracker
from emolab.tracking.tracker import NoTracker
from emolab.training.distributed import fit_distributed
from emolab.training.loop import NonFiniteLossError
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrackingSettings, TrainSettings, WorkerSettings
from emolab.training.train import train


def with_workers(settings: TrainSettings, count: int) -> TrainSettings:
    return settings.model_copy(update={"workers": WorkerSettings(count=count)})


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_the_best_weights_of_no_validation_are_refused_before_anything_starts(
    workers: int, unvalidated_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    settings = settings_for(unvalidated_data, tmp_path / "runs", epochs=1)
    settings = with_workers(settings, workers)
    with pytest.raises(UserError) as error:
        train(settings, tracker=NoTracker())
    one_line(error, f"{unvalidated_data} has no validation split: set training.selection=last")
    assert not (tmp_path / "runs").exists()


AUGMENTED = {"modality_dropout": 0.5, "feature_noise": 0.3, "length_buckets": 2, "gradient_clip": 0.5}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("recipe", [{}, AUGMENTED], ids=["plain", "augmented"])
def test_two_workers_reach_the_weights_of_one_after_twenty_steps(
    ray_cluster: None, toy_data: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    # 42 sessions in batches of 9 are 5 steps an epoch; the last batch has 6, and shares differ in size.
    recipe = {"epochs": 4, "batch_size": 9, "ema_decay": 0.8} | recipe
    settings = settings_for(toy_data, tmp_path, model={"dropout": 0.0}, **recipe)
    alone = finish(settings, CheckpointFolder(tmp_path / "alone"))
    told: list[EpochReport] = []
    fit_distributed(with_workers(settings, 2), tmp_path / "two", report=told.append)
    assert [(epoch.epoch, epoch.workers) for epoch in told] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    one, two = (
        CheckpointFolder(tmp_path / "alone").newest(),
        CheckpointFolder(tmp_path / "two" / "checkpoints").newest(),
    )
    assert one is not None
    assert two is not None
    assert one.state["epoch"] == two.state["epoch"] == 4
    for group in ("model", "best"):
        for name, value in one.tensors[group].items():
            difference = (two.tensors[group][name] - value).norm() / value.norm().clamp_min(1e-8)
            assert difference <= 1e-5, (group, name, float(difference))
    for mine, theirs in zip(alone.progress.reports, two.state["reports"], strict=True):
        assert theirs["validation_macro_f1"] == mine["validation_macro_f1"]
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-6)


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_cpus_is_refused_at_once(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = with_workers(settings_for(toy_data, tmp_path), 64)
    with pytest.raises(UserError, match=r"64 CPU needed, 2 in the cluster"):
        fit_distributed(settings, tmp_path / "many")
    assert not (tmp_path / "many").exists()


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_non_finite_loss_is_reported_by_all_workers_as_by_one(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = settings_for(toy_data, tmp_path, learning_rate=1e30, warmup_epochs=0)
    plan = WorkerSettings(count=2, max_failures=0)
    with pytest.raises(NonFiniteLossError, match=r"non-finite loss at epoch 1, step 2"):
        fit_distributed(settings.model_copy(update={"workers": plan}), tmp_path / "nan")


@pytest.mark.parametrize(
    ("plan", "part"),
    [({"count": 2, "minimum": 3}, "at most count=2"), ({"count": 2, "minimum": 1, "max_failures": 0}, "max_failures")],
)
def test_a_minimum_of_workers_that_cannot_work_is_refused(plan: dict[str, int], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        WorkerSettings.model_validate(plan)
    assert WorkerSettings.model_validate({"count": 2, "minimum": 2, "max_failures": 0}).minimum == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.scenario
def test_workers_record_in_the_file_that_is_named_from_the_jobs_folder(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = with_workers(settings_for(toy_data, tmp_path / "runs", epochs=1), 2)
    settings = settings.model_copy(update={"tracking": TrackingSettings(uri="sqlite:///mine.db")})
    trained = train(settings)
    tracker = existing_tracker(enabled=True, uri=f"sqlite:///{tmp_path}/mine.db", experiment="any", output=tmp_path)
    assert tracker.read(trained.run_id).metrics["workers"] == 2
    assert [file.name for file in tmp_path.rglob("*.db")] == ["mine.db"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.fault
def test_what_cannot_be_told_of_an_epoch_ends_the_training_with_its_reason(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    def full(epoch: EpochReport) -> None:
        raise UserError("the tracker's disk is full")

    settings = settings_for(toy_data, tmp_path, epochs=2)
    with pytest.raises(UserError, match="the tracker's disk is full"):
        fit_distributed(with_workers(settings, 2), tmp_path / "untold", report=full)
    checkpoints = CheckpointFolder(tmp_path / "untold" / "checkpoints")
    assert checkpoints.newest() is not None  # nothing of it is lost
