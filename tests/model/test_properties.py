"""Properties that every model of the zoo has, whatever its architecture."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.random_batches import DIMENSIONS, NAMES, random_batch, same_on_real_steps, small_model

from edu_emotionnet import zoo
from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.losses import combined_loss

EVERY_MODEL = pytest.mark.parametrize("name", NAMES)
CAUSAL = [name for name in NAMES if zoo.entry(name).causal]
few_examples = settings(max_examples=6, deadline=None)
seeds = st.integers(0, 10_000)


def changed_after(batch: SessionBatch, step: int, *, seed: int) -> SessionBatch:
    """The same sessions until `step`, other values and other presence afterwards."""
    other = random_batch(seed=seed, sessions=len(batch.lengths), longest=batch.labels.shape[1])

    def splice(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([old[:, :step], new[:, step:]], dim=1)

    return replace(
        batch,
        features={name: splice(value, other.features[name]) for name, value in batch.features.items()},
        present={name: splice(value, other.present[name]) for name, value in batch.present.items()},
    )


def padded(batch: SessionBatch, extra: int, filling: float) -> SessionBatch:
    """The same sessions with `extra` more steps at the end and garbage on every step that does not exist."""

    def extend(value: torch.Tensor, fill: float) -> torch.Tensor:
        tail = value.new_full((value.shape[0], extra, *value.shape[2:]), fill)
        return torch.cat([value, tail], dim=1)

    longer = SessionBatch(
        features={name: extend(value, 0.0) for name, value in batch.features.items()},
        present={name: extend(mask, False) for name, mask in batch.present.items()},
        lengths=batch.lengths,
        labels=extend(batch.labels, -100),
    )
    void = ~longer.real
    seemingly_present = math.isfinite(filling)  # a finite value may even claim to be an observation
    return replace(
        longer,
        features={m: value.masked_fill(void[..., None], filling) for m, value in longer.features.items()},
        present={m: mask.masked_fill(void, seemingly_present) for m, mask in longer.present.items()},
    )


def gradients(model: torch.nn.Module, batch: SessionBatch) -> dict[str, Any]:
    model.zero_grad()
    combined_loss(model(batch), batch).total(kl_weight=0.3).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@EVERY_MODEL
@few_examples
@given(seed=seeds)
def test_predictions_are_distributions(name: str, seed: int) -> None:
    batch = random_batch(seed=seed)
    predictions = small_model(name, seed=seed)(batch)
    total = predictions.log_probabilities.exp().sum(-1)
    assert total.shape == batch.labels.shape
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.0, atol=1e-6)
    weights = predictions.confidence
    if weights is not None:
        assert weights.shape == (*batch.labels.shape, len(DIMENSIONS))
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(total), rtol=0.0, atol=1e-6)
    if predictions.auxiliary_loss is not None:
        assert predictions.auxiliary_loss.shape == ()
        assert predictions.auxiliary_loss.isfinite() and predictions.auxiliary_loss >= 0


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in CAUSAL]
    + [("edu_emotionnet", {"alignment": alignment}) for alignment in ("history", "step", "window:3")],
)
@few_examples
@given(seed=seeds, step=st.integers(1, 6))
def test_causal_models_do_not_see_the_future(name: str, options: dict[str, Any], seed: int, step: int) -> None:
    batch = random_batch(seed=seed)
    model = small_model(name, seed=seed, **options)
    before = batch.real.clone()
    before[:, step:] = False
    same_on_real_steps(model(batch), model(changed_after(batch, step, seed=seed + 1)), before)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CAUSAL)))
def test_models_that_say_they_are_not_causal_do_look_ahead(name: str) -> None:
    batch, model = random_batch(seed=0), small_model(name)
    first = model(batch).log_probabilities[0, :3]
    other = model(changed_after(batch, 3, seed=1)).log_probabilities[0, :3]
    assert (first - other).abs().max() > 1e-4


@EVERY_MODEL
@few_examples
@given(seed=seeds, extra=st.integers(0, 4), filling=st.sampled_from([100.0, float("nan"), float("inf")]))
def test_padding_changes_nothing(name: str, seed: int, extra: int, filling: float) -> None:
    batch, model = random_batch(seed=seed), small_model(name, seed=seed)
    longer = padded(batch, extra, filling)
    plain, other = model(batch), model(longer)
    real = batch.real
    steps = batch.labels.shape[1]
    trimmed = replace(
        other,
        log_probabilities=other.log_probabilities[:, :steps],
        confidence=None if other.confidence is None else other.confidence[:, :steps],
    )
    same_on_real_steps(plain, trimmed, real)
    a, b = gradients(model, batch), gradients(model, longer)
    for parameter in a:
        torch.testing.assert_close(a[parameter], b[parameter], rtol=1e-6, atol=1e-6)


@EVERY_MODEL
@few_examples
@given(seed=seeds)
def test_the_order_and_company_of_sessions_change_nothing(name: str, seed: int) -> None:
    batch, model = random_batch(seed=seed, sessions=5), small_model(name, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3]
    chosen = SessionBatch(
        features={modality: value[order] for modality, value in batch.features.items()},
        present={modality: value[order] for modality, value in batch.present.items()},
        lengths=batch.lengths[order],
        labels=batch.labels[order],
    )
    whole, part = model(batch), model(chosen)
    reordered = replace(
        whole,
        log_probabilities=whole.log_probabilities[order],
        confidence=None if whole.confidence is None else whole.confidence[order],
    )
    same_on_real_steps(reordered, part, chosen.real)


@EVERY_MODEL
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf"), -float("inf")])
def test_values_under_a_false_mask_are_never_read(name: str, garbage: float) -> None:
    batch, model = random_batch(seed=3), small_model(name)

    def filled(value: float) -> SessionBatch:
        masked = {
            modality: features.masked_fill(~batch.present[modality][..., None], value).requires_grad_()
            for modality, features in batch.features.items()
        }
        return replace(batch, features=masked)

    clean, dirty = filled(0.0), filled(garbage)
    same_on_real_steps(model(clean), model(dirty), batch.real, within=0.0)
    expected, got = gradients(model, clean), gradients(model, dirty)
    for parameter in expected:
        assert got[parameter].isfinite().all(), parameter
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=0.0, atol=0.0)
    for features in dirty.features.values():
        assert features.grad is None or features.grad.isfinite().all()


@EVERY_MODEL
def test_a_session_without_any_observation_is_finite(name: str) -> None:
    batch, model = random_batch(seed=4), small_model(name)
    blind = replace(batch, present={m: torch.zeros_like(mask) for m, mask in batch.present.items()})
    assert model(blind).log_probabilities[batch.real].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, blind).values())


@EVERY_MODEL
def test_features_are_standardised_inside(name: str) -> None:
    batch = random_batch(seed=5)
    statistics = FeatureStatistics(
        mean={modality: [3.0 + i for i in range(size)] for modality, size in DIMENSIONS.items()},
        std={modality: [0.5 + i for i in range(size)] for modality, size in DIMENSIONS.items()},
    )
    raw = {
        modality: value * torch.tensor(statistics.std[modality]) + torch.tensor(statistics.mean[modality])
        for modality, value in batch.features.items()
    }
    plain, standardising = small_model(name), small_model(name, statistics=statistics)
    same_on_real_steps(plain(batch), standardising(replace(batch, features=raw)), batch.real)
    assert any(key.endswith("standardise.mean") for key in standardising.state_dict())


@EVERY_MODEL
def test_every_parameter_receives_a_gradient(name: str) -> None:
    """What averaging gradients over processes needs; some gradients may be zero, none may be missing."""
    batch, model = random_batch(seed=6), small_model(name).train()
    for _ in range(3):  # Self-MM uses other labels from the second update on
        missing = [parameter for parameter, gradient in gradients(model, batch).items() if gradient is None]
        assert not missing
    unlabelled = replace(batch, labels=torch.full_like(batch.labels, -100))
    assert all(gradient.isfinite().all() for gradient in gradients(model, unlabelled).values())


@EVERY_MODEL
def test_an_auxiliary_loss_is_a_sum_over_sessions(name: str) -> None:
    """A sum can be split over batches and processes; a mean over the batch cannot."""
    batch, model = random_batch(seed=7, sessions=4), small_model(name)
    if model(batch).auxiliary_loss is None:
        assert name not in ("self_mm", "cfn_esa", "misa")
        return
    model.train()
    model(batch)
    model(batch)
    model.eval()
    whole = model(batch).auxiliary_loss
    halves = [
        SessionBatch(
            features={modality: value[rows] for modality, value in batch.features.items()},
            present={modality: value[rows] for modality, value in batch.present.items()},
            lengths=batch.lengths[rows],
            labels=batch.labels[rows],
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert whole > 0
    torch.testing.assert_close(sum(model(half).auxiliary_loss for half in halves), whole)


@EVERY_MODEL
def test_a_checkpoint_restores_the_model(name: str) -> None:
    batch, model = random_batch(seed=8), small_model(name)
    model.train()
    model(batch)
    model.eval()
    restored = small_model(name, seed=99)
    restored.load_state_dict(model.state_dict())
    same_on_real_steps(model(batch), restored(batch), batch.real, within=0.0)
    first, second = model(batch).auxiliary_loss, restored(batch).auxiliary_loss
    assert (first is None) == (second is None)
    assert first is None or second is None or torch.equal(first, second)
