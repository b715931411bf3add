"""Edu-EmotionNet and its loss, equation by equation, against direct computations."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.random_batches import CLASSES, random_batch, small_model
from torch import Tensor

from edu_emotionnet import zoo
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL
from edu_emotionnet.feedback import TemporalFeedbackLoop
from edu_emotionnet.losses import combined_loss
from edu_emotionnet.network import (
    CrossModalityAlignment,
    EduEmotionNetConfig,
    EncoderConfig,
    ModalityImportanceEstimator,
)

WIDTH, HEADS, STEPS = 8, 2, 6


def representations(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, STEPS, WIDTH).double() for _ in range(3)]


def alignment_at(cmaa: CrossModalityAlignment, h_i: Tensor, h_j: Tensor, t: int, first: int) -> Tensor:
    """Equation 4 at one step, head by head, over keys first..t: (B, d)."""
    d_k = WIDTH // HEADS
    heads = []
    for head in range(HEADS):
        columns = slice(head * d_k, (head + 1) * d_k)
        q = cmaa.query(h_i)[:, t, columns]
        k = cmaa.key(h_j)[:, first : t + 1, columns]
        v = cmaa.value(h_j)[:, first : t + 1, columns]
        weights = ((k @ q[..., None]).squeeze(-1) / math.sqrt(d_k)).softmax(-1)
        heads.append((weights[..., None] * v).sum(1))
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize(("alignment", "span"), [("history", STEPS), ("window:1", 1), ("window:3", 3), ("step", 1)])
def test_alignment_follows_equations_4_and_5(alignment: str, span: int) -> None:
    h = representations()
    cmaa = CrossModalityAlignment(WIDTH, HEADS, alignment, dropout=0.0).double()
    g = cmaa(h)
    for i in range(3):
        for t in range(STEPS):
            views = [alignment_at(cmaa, h[i], h[j], t, max(0, t - span + 1)) for j in range(3) if j != i]
            torch.testing.assert_close(g[i][:, t], (views[0] + views[1]) / 2)


def test_the_literal_reading_of_equation_4_is_the_mean_of_the_others_values() -> None:
    h = representations()
    cmaa = CrossModalityAlignment(WIDTH, HEADS, "step", dropout=0.0).double()
    g = cmaa(h)
    torch.testing.assert_close(g[0], (cmaa.value(h[1]) + cmaa.value(h[2])) / 2)
    torch.testing.assert_close(g[1], (cmaa.value(h[0]) + cmaa.value(h[2])) / 2)
    torch.testing.assert_close(g[2], (cmaa.value(h[0]) + cmaa.value(h[1])) / 2)


@given(scores=st.lists(st.floats(-30, 30), min_size=3, max_size=3))
def test_confidence_is_a_sigmoid_divided_by_its_sum(scores: list[float]) -> None:
    """Equation 6."""
    raw = torch.tensor(scores, dtype=torch.float64)
    sigma = torch.sigmoid(raw)
    mie = ModalityImportanceEstimator(WIDTH, "sigmoid")
    torch.testing.assert_close(mie.weigh(raw), sigma / sigma.sum())
    torch.testing.assert_close(ModalityImportanceEstimator(WIDTH, "softmax").weigh(raw), raw.softmax(-1))


def test_confidence_survives_scores_at_which_every_sigmoid_underflows() -> None:
    weights = ModalityImportanceEstimator(WIDTH, "sigmoid").weigh(torch.tensor([-200.0, -200.0, -201.0]))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, -1.0]).softmax(-1))


@pytest.mark.parametrize("confidence", ["sigmoid", "softmax"])
def test_the_network_composes_equations_4_to_9(confidence: str) -> None:
    batch, model = random_batch(seed=0), small_model("edu_emotionnet", confidence=confidence)
    h = [model.encoders[name](batch.features[name], batch.present[name]) for name in model.modalities]
    g = model.cmaa(h)
    joined = [torch.cat(pair, dim=-1) for pair in zip(h, g, strict=True)]
    scores = torch.cat([model.mie.score(F.relu(model.mie.hidden(x))) for x in joined], dim=-1)
    weights = model.mie.weigh(scores)
    z = (weights[..., None] * torch.stack(g, dim=2)).sum(2)
    predictions = model(batch)
    torch.testing.assert_close(predictions.confidence, weights)
    torch.testing.assert_close(predictions.log_probabilities, literal_feedback(model.tfl, z))
    assert weights[batch.real].std(0).min() > 0  # the weights differ from step to step


def test_without_mie_every_modality_weighs_the_same() -> None:
    weights = small_model("edu_emotionnet-mie")(random_batch(seed=0)).confidence
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


def test_the_ablations_remove_the_component_they_name() -> None:
    for part in ("cmaa", "mie"):
        assert getattr(small_model(f"edu_emotionnet-{part}"), part) is None
    assert small_model("edu_emotionnet-tfl").tfl.previous is None
    full = small_model("edu_emotionnet")
    assert full.cmaa is not None and full.mie is not None and full.tfl.previous is not None


def literal_feedback(tfl: TemporalFeedbackLoop, z: Tensor) -> Tensor:
    """Equations 8 and 9 as written: a linear layer on [z_t, y_{t-1}], then the classifier; y_0 is uniform."""
    assert tfl.previous is not None
    weight = torch.cat([tfl.fused.weight, tfl.previous.weight], dim=1)
    belief = torch.full((z.shape[0], CLASSES), 1 / CLASSES, dtype=z.dtype)
    rows = []
    for t in range(z.shape[1]):
        joined = torch.cat([z[:, t], belief], dim=-1)
        logits = tfl.classifier(F.relu(F.linear(joined, weight, tfl.fused.bias)))
        belief = logits.softmax(-1)
        rows.append(logits.log_softmax(-1))
        if tfl.detach:
            belief = belief.detach()
    return torch.stack(rows, dim=1)


def feedback_loop(*, detach: bool) -> TemporalFeedbackLoop:
    torch.manual_seed(1)
    return TemporalFeedbackLoop(WIDTH, CLASSES, detach=detach).double()


@pytest.mark.parametrize("detach", [False, True])
@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 9), sessions=st.integers(1, 4))
def test_the_feedback_loop_equals_the_concatenation(detach: bool, steps: int, sessions: int) -> None:
    tfl = feedback_loop(detach=detach)
    z = torch.randn(sessions, steps, WIDTH, dtype=torch.float64, requires_grad=True)
    fast, literal = tfl(z), literal_feedback(tfl, z)
    torch.testing.assert_close(fast, literal)
    probe = torch.randn_like(fast)
    inputs = [z, *tfl.parameters()]
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((literal * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_detaching_changes_gradients_and_nothing_else() -> None:
    batch = random_batch(seed=0)
    flowing, cut = (small_model("edu_emotionnet", detach_feedback=detach) for detach in (False, True))
    assert torch.equal(flowing(batch).log_probabilities, cut(batch).log_probabilities)
    gradients = []
    for model in (flowing, cut):
        combined_loss(model(batch), batch).total(kl_weight=0.0).backward()
        gradients.append(model.tfl.fused.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


def test_feedback_reaches_later_predictions() -> None:
    """A prediction depends on an earlier step through y_{t-1} even if nothing else carries it."""
    tfl = feedback_loop(detach=False)
    z = torch.randn(1, 3, WIDTH).double()
    other = z.clone()
    other[:, 0] += 3.0
    assert (tfl(z)[:, 2] - tfl(other)[:, 2]).abs().max() > 1e-8
    tfl.previous = None
    torch.testing.assert_close(tfl(z)[:, 1:], tfl(other)[:, 1:])


def loss_by_loops(log_p: Tensor, batch: SessionBatch) -> tuple[float, float, int]:
    """Equation 10 read aloud: cross-entropy of labelled steps, KL(y_{t-1} || y_t) for t >= 2, their count."""
    cross_entropy, smoothness, steps = 0.0, 0.0, 0
    for row, length in enumerate(batch.lengths.tolist()):
        for t in range(length):
            label = int(batch.labels[row, t])
            if label != IGNORED_LABEL:
                cross_entropy -= log_p[row, t, label].item()
                steps += 1
            if t > 0:
                p, q = log_p[row, t - 1].exp(), log_p[row, t].exp()
                smoothness += sum((a * math.log(a / b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    return cross_entropy, smoothness, steps


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), longest=st.integers(1, 8), kl_weight=st.floats(0.0, 2.0))
def test_the_loss_equals_equation_10_over_ragged_sessions(seed: int, longest: int, kl_weight: float) -> None:
    batch = random_batch(seed=seed, longest=longest)
    torch.manual_seed(seed)
    log_p = torch.randn(*batch.labels.shape, CLASSES).double().log_softmax(-1)
    auxiliary = torch.tensor(2.5, dtype=torch.float64)
    sums = combined_loss(Predictions(log_probabilities=log_p, auxiliary_loss=auxiliary), batch)
    cross_entropy, smoothness, steps = loss_by_loops(log_p, batch)
    assert sums.cross_entropy.item() == pytest.approx(cross_entropy)
    assert sums.smoothness.item() == pytest.approx(smoothness, abs=1e-12)
    assert sums.steps.item() == steps
    assert sums.total(kl_weight).item() == pytest.approx(cross_entropy + kl_weight * smoothness + 2.5)


def test_padding_takes_no_part_in_the_loss() -> None:
    batch = random_batch(seed=2)
    assert not batch.real.all()
    log_p = torch.randn(*batch.labels.shape, CLASSES).double().log_softmax(-1)
    other = torch.where(batch.real[..., None], log_p, torch.randn_like(log_p).log_softmax(-1))
    first, second = (combined_loss(Predictions(log_probabilities=value), batch) for value in (log_p, other))
    assert torch.equal(first.total(0.7), second.total(0.7))
    assert first.auxiliary == 0


def test_an_absent_step_enters_as_the_learned_vector() -> None:
    batch, model = random_batch(seed=0), small_model("edu_emotionnet")
    blind = replace(batch, present={**batch.present, "audio": torch.zeros_like(batch.present["audio"])})
    before = model(blind).log_probabilities
    with torch.no_grad():
        model.encoders["audio"].absent[0] += 1.0  # one unit: LayerNorm ignores the same shift of all
    assert (model(blind).log_probabilities - before)[batch.real].abs().max() > 1e-6
    fresh = zoo.build("edu_emotionnet", dimensions={"audio": 3}, classes=CLASSES).state_dict()
    assert (fresh["encoders.audio.absent"] == 0).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alignment", "future"),
        ("alignment", "window:0"),
        ("alignment", "window:"),
        ("confidence", "linear"),
        ("d_model", 0),
        ("d_model", 30),
        ("layers", 0),
        ("heads", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_invalid_configurations_name_the_field(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        EduEmotionNetConfig(**{"heads": 4, option: value})


def test_the_defaults_are_the_papers() -> None:
    config = EncoderConfig()
    assert (config.d_model, config.layers, config.heads, config.dropout) == (256, 4, 4, 0.2)
    assert config.d_model // config.heads == 64
    model = zoo.build("edu_emotionnet", dimensions={"audio": 40, "visual": 64, "text": 48}, classes=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(10e6, rel=0.03)
