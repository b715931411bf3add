"""What the single baselines promise, against direct computations from their papers' formulas."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.model.random_batches import CLASSES, DIMENSIONS, random_batch, small_config, small_model
from torch import Tensor

from edu_emotionnet import zoo
from edu_emotionnet.baselines.cfn_esa import EmotionShift
from edu_emotionnet.baselines.misa import moment_discrepancy, overlap
from edu_emotionnet.baselines.self_mm import Centroids, generated_label


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("mult", "attention_dropout", 1.0),
        ("mult", "embedding_dropout", -0.1),
        ("cfn_esa", "shift_span", 0),
        ("cfn_esa", "shift_weight", -1.0),
        ("cfn_esa", "recurrent_layers", 0),
        ("self_mm", "centroid_momentum", 1.0),
        ("self_mm", "unimodal_width", 0),
        ("self_mm", "warm_up_updates", -1),
        ("misa", "similarity_weight", -0.5),
    ],
)
def test_impossible_options_are_refused_by_name(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        replace(zoo.entry(name).config, **{option: value})


def test_the_recurrent_width_is_split_over_two_directions() -> None:
    with pytest.raises(ValueError, match="d_model must be even"):
        small_config("cfn_esa", d_model=15, heads=3)


def test_late_fusion_is_the_mean_of_the_votes() -> None:
    batch, model = random_batch(seed=0), small_model("late_fusion")
    votes = [head(h).exp() for head, h in zip(model.classifiers, model.encoders(batch), strict=True)]
    torch.testing.assert_close(model(batch).log_probabilities.exp(), sum(votes) / 3)


@pytest.mark.parametrize("modality", ["audio", "visual", "text"])
def test_a_unimodal_model_reads_its_modality_alone(modality: str) -> None:
    batch, model = random_batch(seed=0), small_model(f"{modality}_only")
    alone = replace(batch, features={modality: batch.features[modality]}, present={modality: batch.present[modality]})
    assert torch.equal(model(batch).log_probabilities, model(alone).log_probabilities)


def test_mult_has_the_published_shape() -> None:
    model: Any = zoo.build("mult", dimensions=DIMENSIONS, classes=CLASSES)
    assert len(model.crossmodal) == 6
    assert {len(stack.blocks) for stack in model.crossmodal.values()} == {5}
    assert model.classifier.in_features == 180
    dropouts = {key: stack.blocks[0].attention.dropout for key, stack in model.crossmodal.items()}
    assert dropouts["audio_from_text"] == 0.1
    assert dropouts["text_from_audio"] == dropouts["text_from_visual"] == 0.0


def test_mult_streams_read_the_source_as_it_entered() -> None:
    """Keys of every layer come from the source itself, not from a source rewritten along with the target."""
    model = small_model("mult", layers=2)
    stack = model.crossmodal["audio_from_text"]
    seen: list[Tensor] = []
    for block in stack.blocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    stack(torch.randn(1, 3, 16).double(), torch.randn(1, 3, 16).double())
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_the_shift_loss_equals_a_loop_over_pairs() -> None:
    torch.manual_seed(0)
    head = EmotionShift(width=6, hidden=8, span=3).double()
    h = torch.randn(2, 6, 6).double()
    labels = torch.tensor([[0, 0, 1, -100, 1, 2], [3, -100, 3, 0, -100, -100]])
    weight = torch.cat([head.later.weight, head.earlier.weight], dim=1)
    expected = torch.zeros(()).double()
    for row in range(2):
        for t in range(6):
            losses = []
            for s in range(max(0, t - 3), t):
                if labels[row, t] >= 0 and labels[row, s] >= 0:
                    pair = torch.cat([h[row, t], h[row, s]])
                    logits = head.output(F.relu(weight @ pair + head.later.bias))
                    losses.append(F.cross_entropy(logits, (labels[row, t] != labels[row, s]).long()))
            if losses:
                expected = expected + torch.stack(losses).mean()
    torch.testing.assert_close(head(h, labels), expected)


def test_the_shift_loss_of_a_single_step_is_zero() -> None:
    head = EmotionShift(width=6, hidden=8, span=3)
    assert head(torch.randn(2, 1, 6), torch.tensor([[1], [2]])) == 0


def test_moment_discrepancy_equals_the_formula_on_each_session() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 5, 3).double(), torch.rand(2, 5, 3).double()
    counted = torch.tensor([[True] * 5, [True, False, True, True, False]])
    for row in range(2):
        a, b = x[row][counted[row]], y[row][counted[row]]
        expected = (a.mean(0) - b.mean(0)).norm()
        for order in (2, 3, 4, 5):
            moments = [((part - part.mean(0)) ** order).mean(0) for part in (a, b)]
            expected = expected + (moments[0] - moments[1]).norm()
        torch.testing.assert_close(moment_discrepancy(x, y, counted)[row], expected)
    assert (moment_discrepancy(x, x, counted) == 0).all()


def test_overlap_is_zero_for_orthogonal_subspaces_alone() -> None:
    steps = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])[None].double()
    counted = torch.ones(1, 4, dtype=torch.bool)
    assert overlap(steps[..., :1], steps[..., 1:], counted).item() == pytest.approx(0.0, abs=1e-12)
    assert overlap(steps, steps, counted).item() > 0.1


def test_two_classes_give_the_published_relative_distance() -> None:
    centroids = Centroids(2, 4, momentum=0.9)
    centroids.centre.copy_(torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 0, 0]]))
    delta = centroids.relative_distance(torch.tensor([[[0.5, 0.0, 0.0, 0.0]]]))[0, 0]
    own, other = 0.5 / 2, 1.5 / 2  # Euclidean distance over sqrt(4)
    torch.testing.assert_close(delta, torch.tensor([(other - own) / own, (own - other) / other]), rtol=1e-4, atol=0)


def test_centroids_start_at_the_first_mean_and_then_move_by_momentum() -> None:
    centroids = Centroids(2, 1, momentum=0.75)
    weight = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    centroids.update(torch.tensor([[[1.0], [3.0]]]), weight)
    assert centroids.centre[:, 0].tolist() == [2.0, 0.0] and centroids.seen.tolist() == [True, False]
    centroids.update(torch.tensor([[[6.0], [6.0]]]), weight)
    assert centroids.centre[:, 0].tolist() == [3.0, 0.0]


def test_a_generated_label_is_a_distribution_and_the_human_label_where_both_spaces_agree() -> None:
    torch.manual_seed(0)
    human = F.one_hot(torch.randint(0, CLASSES, (3, 5)), CLASSES).double()
    fused, unimodal = torch.randn(3, 5, CLASSES).double(), torch.randn(3, 5, CLASSES).double()
    torch.testing.assert_close(generated_label(human, fused, fused), human)
    label = generated_label(human, fused, unimodal)
    assert (label >= 0).all() and not torch.allclose(label, human)
    torch.testing.assert_close(label.sum(-1), torch.ones(3, 5).double())


def test_self_mm_waits_for_its_warm_up_and_for_every_class() -> None:
    batch = random_batch(seed=1, sessions=16)
    one_class = replace(batch, labels=torch.where(batch.labelled, 0, batch.labels))
    model = small_model("self_mm", warm_up_updates=2).train()
    assert [model(batch).auxiliary_loss.item() > 0 for _ in range(4)] == [False, False, True, True]
    narrow = small_model("self_mm", warm_up_updates=0).train()
    assert not any(narrow(one_class).auxiliary_loss.item() for _ in range(3))


def test_self_mm_moves_its_state_in_training_alone_and_keeps_its_size() -> None:
    batch, model = random_batch(seed=1, sessions=16), small_model("self_mm")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.train()(batch)
    after = model.state_dict()
    assert after["updates"] == 1
    assert {key: value.shape for key, value in after.items()} == {key: v.shape for key, v in before.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"updates"} | {key for key in before if "centroids" in key}


def test_self_mm_learns_its_centroids_from_labelled_steps_alone() -> None:
    batch = random_batch(seed=1, sessions=16)
    early = torch.arange(batch.labels.shape[1]) < 4
    batch = replace(batch, labels=batch.labels.masked_fill(~early, -100))
    other = replace(
        batch,
        features={m: torch.where(early[:, None], value, value + 5.0) for m, value in batch.features.items()},
    )
    first, second = small_model("self_mm").train(), small_model("self_mm").train()
    for _ in range(4):  # generated labels are in use from the second update on
        assert first(batch).auxiliary_loss.isfinite() and second(other).auxiliary_loss.isfinite()
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value)
