"""Lemma 1 and Theorem 1 as measurements: against full Jacobians, and where the answer is known by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edu_emotionnet import zoo
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.feedback import TemporalFeedbackLoop
from edu_emotionnet.fixed_points import (
    contraction,
    contraction_bound,
    feedback_inputs,
    fixed_points,
    sampled_beliefs,
)
from edu_emotionnet.network import CrossModalityAlignment, EduEmotionNetConfig
from edu_emotionnet.theory import lipschitz_table, local_lipschitz, step_constants

DIMENSIONS = {"audio": 4, "visual": 3, "text": 2}
LENGTHS = (6, 4)


def small_model(**options) -> nn.Module:
    torch.manual_seed(1)
    config = EduEmotionNetConfig(d_model=8, layers=1, heads=2, **options)
    return zoo.build("edu_emotionnet", config, dimensions=DIMENSIONS, classes=4).double().eval()


def small_batch(seed: int = 0) -> SessionBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    features = {name: torch.randn(*shape, size, generator=generator).double() for name, size in DIMENSIONS.items()}
    present = {name: torch.rand(*shape, generator=generator) > 0.2 for name in DIMENSIONS}
    return SessionBatch(
        features=features,
        present=present,
        lengths=torch.tensor(LENGTHS),
        labels=torch.zeros(shape, dtype=torch.long),
    )


def constants_from_full_jacobian(model, batch, modality, missing, outputs) -> Tensor:
    """Session by session, without padding: build the Jacobian by reverse mode, take its singular values."""
    found = []
    for i, length in enumerate(LENGTHS):
        alone = SessionBatch(
            features={name: x[i : i + 1, :length] for name, x in batch.features.items()},
            present={name: x[i : i + 1, :length] & (name != missing) for name, x in batch.present.items()},
            lengths=torch.tensor([length]),
            labels=batch.labels[i : i + 1, :length],
        )

        def probabilities(features: Tensor, alone=alone) -> Tensor:
            changed = replace(alone, features={**alone.features, modality: features})
            p = model(changed).log_probabilities.exp()[0]
            return p.flatten() if outputs == "all" else p[-1]

        jacobian = torch.autograd.functional.jacobian(probabilities, alone.features[modality])
        assert isinstance(jacobian, Tensor)
        found.append(torch.linalg.matrix_norm(jacobian.flatten(1, -1), ord=2))
    return torch.stack(found)


@pytest.mark.parametrize("outputs", ["all", "last"])
@pytest.mark.parametrize(("modality", "missing"), [("audio", None), ("visual", "text"), ("text", "audio")])
def test_local_constant_is_the_largest_singular_value_of_the_jacobian(modality, missing, outputs):
    model, batch = small_model(), small_batch()
    measured = local_lipschitz(
        model, batch, modality=modality, missing=missing, outputs=outputs, iterations=3000, tolerance=1e-12
    )
    expected = constants_from_full_jacobian(model, batch, modality, missing, outputs)
    assert measured.constants.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert bool(measured.converged.all())
    assert measured.largest == pytest.approx(float(expected.max()), rel=1e-5)


@pytest.mark.parametrize(("modality", "missing"), [("audio", None), ("visual", "text")])
def test_the_constant_of_a_step_is_the_norm_of_its_own_block_of_the_jacobian(modality, missing):
    model, batch = small_model(), small_batch()
    found = step_constants(model, batch, modality=modality, missing=missing)
    observed = batch.present[modality] & batch.real
    assert found.shape == batch.labels.shape and torch.equal(found > 0, observed)
    whole = local_lipschitz(model, batch, modality=modality, missing=missing, iterations=3000, tolerance=1e-12)
    assert bool((found <= whole.constants[:, None] * (1 + 1e-9)).all())  # a block of that Jacobian
    present = {name: x & (name != missing) for name, x in batch.present.items()}
    for i, length in enumerate(LENGTHS):
        for step in range(length):

            def block(features: Tensor, i=i, step=step) -> Tensor:
                moved = batch.features[modality].clone()
                moved[i, step] = features
                changed = replace(batch, present=present, features={**batch.features, modality: moved})
                return model(changed).log_probabilities.exp()[i, step]

            jacobian = torch.autograd.functional.jacobian(block, batch.features[modality][i, step])
            assert isinstance(jacobian, Tensor)
            expected = float(torch.linalg.matrix_norm(jacobian, ord=2))
            assert float(found[i, step]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_every_attention_of_the_network_reads_what_a_layer_norm_has_bounded():
    """Why the network is Lipschitz although dot-product attention is not: however large the features are."""
    model, batch = small_model(), small_batch()
    read: list[Tensor] = []
    alignment = model.cmaa
    assert isinstance(alignment, CrossModalityAlignment)
    inputs = [alignment.query, alignment.key, alignment.value]
    inputs += [module for name, module in model.named_modules() if name.endswith("query_key_value")]
    assert len(inputs) == 6
    for module in inputs:
        module.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].detach()))
    constants = []
    for scale in (1.0, 1e2, 1e4, 1e8):
        larger = replace(batch, features={name: scale * x for name, x in batch.features.items()})
        constants.append(local_lipschitz(model, larger, modality="visual").largest)
        with torch.no_grad():
            model(larger)
    assert max(float(x.norm(dim=-1).max()) for x in read) <= math.sqrt(8) * (1 + 1e-9)  # width 8, fresh LayerNorms
    assert constants == sorted(constants, reverse=True)  # and the slope falls where the features grow


@pytest.mark.parametrize("name", ["cfn_esa", "misa"])
def test_models_without_a_forward_mode_derivative_are_measured_too(name):
    """A packed GRU is one, the fused inference path of nn.TransformerEncoderLayer another."""
    torch.manual_seed(1)
    config = replace(zoo.entry(name).config, d_model=8, layers=1, heads=2)
    model = zoo.build(name, config, dimensions=DIMENSIONS, classes=4).double().eval()
    batch, fused = small_batch(), torch.backends.mha.get_fastpath_enabled()
    measured = local_lipschitz(model, batch, modality="visual", missing="text", iterations=2000, tolerance=1e-11)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    expected = constants_from_full_jacobian(model, batch, "visual", "text", "all")
    assert measured.constants.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


class LinearModel(nn.Module):
    """Probabilities that are a linear function of the audio features: 1/2 + x M, for small x."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, batch: SessionBatch) -> Predictions:
        return Predictions(log_probabilities=(0.5 + batch.features["audio"] @ self.matrix).log())


def test_a_linear_map_has_its_matrix_norm_as_constant():
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.25])).double() / 100
    batch = small_batch()
    present = {name: torch.ones_like(x) for name, x in batch.present.items()}
    model = LinearModel(matrix).eval()
    measured = local_lipschitz(model, replace(batch, present=present), modality="audio", tolerance=1e-10)
    assert measured.constants.tolist() == pytest.approx([0.03, 0.03], rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_no_small_perturbation_moves_the_probabilities_by_more_than_the_constant_allows(seed):
    model, batch = small_model(), small_batch(seed)
    measured = local_lipschitz(model, batch, modality="visual", iterations=3000, tolerance=1e-10)
    generator = torch.Generator().manual_seed(seed + 1)
    step = 1e-6 * torch.randn(batch.features["visual"].shape, generator=generator).double()
    step = step.masked_fill(~(batch.present["visual"] & batch.real)[..., None], 0.0)
    moved = replace(batch, features={**batch.features, "visual": batch.features["visual"] + step})
    with torch.no_grad():
        change = model(moved).log_probabilities.exp() - model(batch).log_probabilities.exp()
    change = change.masked_fill(~batch.real[..., None], 0.0).flatten(1).norm(dim=1)
    assert bool((change <= measured.constants * step.flatten(1).norm(dim=1) * (1 + 1e-3)).all())


def test_what_was_not_observed_has_no_influence_and_may_be_anything():
    model, batch = small_model(), small_batch()
    nowhere = {**batch.present, "audio": torch.zeros_like(batch.present["audio"])}
    assert local_lipschitz(model, replace(batch, present=nowhere), modality="audio").constants.tolist() == [0, 0]

    gaps = (~(batch.present["audio"] & batch.real))[..., None]
    spoilt = {**batch.features, "audio": batch.features["audio"].masked_fill(gaps, math.nan)}
    clean = local_lipschitz(model, batch, modality="audio")
    dirty = local_lipschitz(model, replace(batch, features=spoilt), modality="audio")
    assert torch.equal(clean.constants, dirty.constants)


def test_the_table_holds_every_case_of_the_lemma_once():
    cases = [(row.modality, row.missing) for row in lipschitz_table(small_model(), small_batch())]
    assert len(cases) == len(set(cases)) == 9
    assert all(modality != missing for modality, missing in cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": "smell"}, "modality must be among audio, visual, text"),
        ({"modality": "audio", "missing": "audio"}, "missing must be another modality"),
        ({"modality": "audio", "outputs": "first"}, "outputs must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        local_lipschitz(small_model(), small_batch(), **arguments)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        local_lipschitz(small_model().train(), small_batch(), modality="audio")
    with pytest.raises(ValueError, match="training mode"):
        step_constants(small_model().train(), small_batch(), modality="audio")


def echo(gain: float, classes: int = 4) -> TemporalFeedbackLoop:
    """A loop that ignores z: y -> softmax(gain * y). Its Jacobian at the uniform belief is gain/K on the tangent."""
    loop = TemporalFeedbackLoop(classes, classes)
    assert loop.previous is not None
    with torch.no_grad():
        loop.fused.weight.zero_()
        loop.fused.bias.zero_()
        loop.previous.weight.copy_(torch.eye(classes))
        loop.classifier.weight.copy_(gain * torch.eye(classes))
        loop.classifier.bias.zero_()
    return loop


def random_loop(seed: int, scale: float) -> tuple[TemporalFeedbackLoop, Tensor]:
    torch.manual_seed(seed)
    loop = TemporalFeedbackLoop(6, 3)
    assert loop.previous is not None
    with torch.no_grad():
        loop.previous.weight.mul_(scale)
    return loop, torch.randn(5, 6)


def test_contraction_factor_of_a_known_map():
    measured = contraction(echo(2.0), torch.zeros(1, 4))
    assert float(measured.factors[0, 0]) == pytest.approx(2.0 / 4)  # the first belief sampled is the uniform one
    assert measured.upper_bound == pytest.approx(2.0 / 2)
    assert measured.contracts


def test_contraction_factor_is_the_norm_of_the_projected_jacobian():
    loop, z = random_loop(3, 2.0)
    beliefs = sampled_beliefs(3, 8, 0)
    measured = contraction(loop, z, samples=8, seed=0)
    exact, projector = loop.double(), torch.eye(3).double() - 1 / 3
    for n in range(len(z)):
        for s in range(len(beliefs)):
            jacobian = torch.autograd.functional.jacobian(
                lambda y, n=n: exact.step(exact.fused(z[n : n + 1].double()), y[None])[0].exp(), beliefs[s]
            )
            assert isinstance(jacobian, Tensor)
            expected = torch.linalg.matrix_norm(jacobian @ projector, ord=2)
            assert float(measured.factors[n, s]) == pytest.approx(float(expected), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 20.0))
def test_factors_stay_below_the_bound_and_the_bound_means_one_fixed_point(seed, scale):
    loop, z = random_loop(seed, scale)
    measured = contraction(loop, z, samples=16)
    assert bool((measured.supremum <= measured.upper_bound * (1 + 1e-9)).all())
    if measured.upper_bound < 0.95:
        assert bool(fixed_points(loop, z, starts=6).unique.all())


def test_a_weak_feedback_converges_at_the_rate_of_its_jacobian():
    found = fixed_points(echo(2.0), torch.zeros(2, 4))
    assert bool(found.unique.all())
    assert found.limits.flatten(0, 1).tolist() == [pytest.approx([0.25] * 4, abs=1e-6)] * 32
    assert found.rates.tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert 0 < int(found.steps.max()) < 30  # 0.5^20 is 1e-6


def test_a_strong_feedback_has_several_fixed_points_and_does_not_contract():
    loop = echo(20.0)
    assert not contraction(loop, torch.zeros(1, 4)).contracts
    assert contraction_bound(loop) > 1
    found = fixed_points(loop, torch.zeros(1, 4))
    assert bool((found.steps > 0).all())  # every start settles, but not on one point
    assert not bool(found.unique.any())
    assert float(found.spread[0]) == pytest.approx(math.sqrt(2), abs=0.01)


def test_a_feedback_that_swings_never_settles():
    found = fixed_points(echo(-20.0, classes=2), torch.zeros(1, 2), steps=200)
    assert bool((found.steps[0, 1:] == -1).all())  # all but the start on the unstable point itself
    assert not bool(found.unique.any())


def test_without_feedback_one_step_is_enough():
    loop = TemporalFeedbackLoop(6, 3, feedback=False)
    z = torch.randn(4, 6)
    assert float(contraction(loop, z).supremum.max()) == 0.0
    assert contraction_bound(loop) == 0.0
    found = fixed_points(loop, z)
    assert bool(found.unique.all()) and int(found.steps.max()) == 2  # the second step changes nothing


def test_the_measured_loop_is_left_as_it_was():
    loop, z = random_loop(0, 1.0)
    before = {name: value.clone() for name, value in loop.state_dict().items()}
    contraction(loop, z)
    fixed_points(loop, z)
    assert all(torch.equal(value, before[name]) for name, value in loop.state_dict().items())
    assert loop.fused.weight.dtype == torch.float32


def test_inputs_of_the_loop_are_those_of_the_real_steps():
    model, batch = small_model(), small_batch()
    z = feedback_inputs(model, batch)
    assert z.shape == (sum(LENGTHS), 8)
    tfl = model.tfl
    assert isinstance(tfl, TemporalFeedbackLoop)
    first_session = tfl(z[None, : LENGTHS[0]])[0]
    assert torch.allclose(first_session, model(batch).log_probabilities[0], atol=1e-12)
    with pytest.raises(ValueError, match="one temporal feedback loop, found 0"):
        feedback_inputs(nn.Linear(2, 2), batch)
    with pytest.raises(ValueError, match=r"shape \(N, 8\)"):
        contraction(tfl, z[None])
