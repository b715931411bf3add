"""Configurations that train in one step end where each would have ended alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emolab.names import UserError
from emolab.training.data import TrainingData, load_training_data
from emolab.training.fused import FUSABLE, FusedTraining, MemberDropout
from emolab.training.loop import fit, run_to_end
from emolab.training.metrics import EpochReport
from emolab.training.processes import Workers
from emolab.training.recipe import TrainSettings

CPU = torch.device("cpu")


def member(data: Path, *, name: str = "edu_emotionnet", dropout: float = 0.0, **training: Any) -> TrainSettings:
    """Four epochs of six steps, the last of which is kept."""
    recipe = {"epochs": 4, "batch_size": 8, "warmup_epochs": 1, "decay_epochs": [2], "selection": "last"} | training
    model = {"name": name, "d_model": 8, "layers": 1, "heads": 2, "dropout": dropout}
    return TrainSettings.model_validate({"data": str(data), "model": model, "training": recipe})


def alone(settings: TrainSettings, data: TrainingData) -> tuple[dict[str, Tensor], list[EpochReport]]:
    torch.manual_seed(settings.training.seed)
    model = settings.model.build(data.manifest)
    reports: list[EpochReport] = []
    outcome = run_to_end(fit(model, model, data, settings.training, workers=Workers()), reports.append)
    return dict(outcome.weights), reports


RECIPES = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(1e-4, 3e-3),
        "weight_decay": st.floats(0.0, 0.1),
        "kl_weight": st.floats(0.0, 1.0),
        "modality_dropout": st.sampled_from([0.0, 0.5]),
        "feature_noise": st.sampled_from([0.0, 0.3]),
        "gradient_clip": st.sampled_from([None, 0.5]),
        "ema_decay": st.sampled_from([0.0, 0.5, 0.9]),
    }
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FUSABLE), recipes=st.lists(RECIPES, min_size=2, max_size=4), seed=st.integers(0, 99))
def test_each_member_ends_with_the_weights_it_has_alone(
    toy_data: Path, name: str, recipes: list[dict[str, Any]], seed: int
) -> None:
    """24 steps without dropout: at most 1e-5 apart, and equal scores after every epoch."""
    data = load_training_data(toy_data)
    members = {3 * i: member(toy_data, name=name, seed=seed, **recipe) for i, recipe in enumerate(recipes)}
    fused = FusedTraining(members, data, CPU)
    epochs = [fused.epoch() for _ in range(4)]
    for number, mine in members.items():
        weights, reports = alone(mine, data)
        found = fused.weights(number)
        assert set(found) == set(weights)
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        for report, epoch in zip(reports, epochs, strict=True):
            theirs = epoch[number]
            assert isinstance(theirs, EpochReport)
            assert theirs.validation_macro_f1 == report.validation_macro_f1
            assert theirs.learning_rate == report.learning_rate
            assert theirs.train_loss == pytest.approx(report.train_loss, abs=1e-5)
            assert theirs.finished == report.finished


def test_a_member_that_leaves_or_fails_changes_nothing_for_the_others(toy_data: Path) -> None:
    data = load_training_data(toy_data)
    stays = member(toy_data, learning_rate=2e-3)
    members = {0: member(toy_data), 1: stays, 2: member(toy_data, learning_rate=1e30), 3: member(toy_data)}
    fused = FusedTraining(members, data, CPU)
    first = fused.epoch()
    assert isinstance(first[2], UserError)
    assert str(first[2]) == "non-finite loss at epoch 1, step 2"
    assert fused.numbers == [0, 1, 3]
    fused.epoch()
    fused.keep([1])
    assert [list(fused.epoch()), list(fused.epoch())] == [[1], [1]]
    weights, _ = alone(stays, data)
    for key, value in weights.items():
        torch.testing.assert_close(fused.weights(1)[key], value, rtol=1e-5, atol=1e-5)


def test_a_member_that_its_epochs_last_update_has_spoiled_fails_alone(toy_data: Path) -> None:
    """One step an epoch, so that validation alone meets its weights."""
    data = load_training_data(toy_data)
    stays = member(toy_data, learning_rate=2e-3, batch_size=64)
    members = {4: stays, 5: member(toy_data, learning_rate=1e30, batch_size=64), 6: stays}
    fused = FusedTraining(members, data, CPU)
    first = fused.epoch()
    assert isinstance(first[5], UserError)
    assert str(first[5]) == "non-finite validation loss after epoch 1"
    assert fused.numbers == [4, 6]
    assert [list(fused.epoch()) for _ in range(3)] == [[4, 6]] * 3
    weights, _ = alone(stays, data)
    for key, value in weights.items():
        torch.testing.assert_close(fused.weights(6)[key], value, rtol=1e-5, atol=1e-5)


def test_dropout_has_each_members_own_rate_and_its_own_masks() -> None:
    rates = torch.tensor([0.0, 0.1, 0.5, 0.9])
    mark = 0.314159265358979
    layer = torch.nn.Dropout(mark)

    def drop(rate: Tensor) -> Tensor:
        with MemberDropout(rate):
            return layer(torch.ones(200, 500))

    torch.manual_seed(0)
    values = torch.func.vmap(drop, randomness="different")(rates)
    for rate, mine in zip(rates.tolist(), values, strict=True):
        assert mine[mine != 0].unique().tolist() == [pytest.approx(1 / (1 - rate))]
        assert (mine == 0).float().mean().item() == pytest.approx(rate, abs=0.005)  # 3.2 standard errors at 0.5
        assert mine.mean().item() == pytest.approx(1.0, abs=0.03)
    twins = torch.func.vmap(drop, randomness="different")(torch.tensor([0.5, 0.5]))
    assert (twins[0] != twins[1]).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_with_dropout_the_training_loss_has_the_distribution_it_has_alone(toy_data: Path) -> None:
    """Loss of the first epoch at a rate too small to learn: each run draws its masks anew. Thirty members share one
    rate, and their mean is that of thirty runs alone, within three standard errors; so is their spread, roughly."""
    data = load_training_data(toy_data)
    recipe: dict[str, Any] = {"learning_rate": 1e-9, "warmup_epochs": 0, "epochs": 1, "dropout": 0.4}
    fused = FusedTraining({i: member(toy_data, **recipe) for i in range(30)}, data, CPU).epoch()
    together = torch.tensor([r.train_loss for r in fused.values() if isinstance(r, EpochReport)], dtype=torch.float64)
    losses = []
    for stream in range(30):
        torch.manual_seed(0)
        settings = member(toy_data, **recipe)
        model = settings.model.build(data.manifest)
        alike = settings.training.model_copy(update={"seed": stream})  # other masks and another order of sessions
        losses.append(next(fit(model, model, data, alike, workers=Workers())).train_loss)
    apart = torch.tensor(losses, dtype=torch.float64)
    error = (together.var() / 30 + apart.var() / 30).sqrt()
    assert (together.mean() - apart.mean()).abs() < 3 * error
    assert 0.5 < (together.std() / apart.std()).item() < 2.0
    assert together.std() > 0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"name": "mult"}, ["mult", "cannot be trained fused", "edu_emotionnet"]),
        ({"seed": 1}, ["training.seed"]),
        ({"batch_size": 4}, ["training.batch_size"]),
        ({"epochs": 9}, ["training.epochs"]),
    ],
)
def test_members_that_cannot_share_a_step_are_refused(
    toy_data: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    members = {0: member(toy_data, **changes), 1: member(toy_data, **({} if "name" not in changes else changes))}
    with pytest.raises(UserError) as error:
        FusedTraining(members, load_training_data(toy_data), CPU)
    for part in parts:
        assert part in str(error.value)
