from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.network import EduEmotionNet, EduEmotionNetConfig
from edu_emotionnet.zoo import build
from emolab.names import UserError
from emolab.robustness.assembly import build_variants, clean_batch
from emolab.robustness.cells import Cell, clean_cell, distinct_variants
from emolab.robustness.corruptions.observed import Surroundings, Variant
from emolab.robustness.engine import best_engine, evaluate_cells
from emolab.robustness.factorised import ModalityInput
from emolab.robustness.sharing import bounded_plans, plan_cells
from emolab.robustness.suites import expand, parse_suite

MODALITIES = ("audio", "visual", "text")
SIZES = {"audio": 5, "visual": 7, "text": 3}
MISSING = (
    "frame_missing",
    "step_missing",
    "absent",
    "burst_missing",
    "burst_frozen",
    "label_missing",
    "speaker_missing",
)


def network(modalities=MODALITIES, *, seed: int = 0, **changes) -> EduEmotionNet:
    torch.manual_seed(seed)
    config = EduEmotionNetConfig(d_model=16, layers=2, heads=2, dropout=0.3, **changes)
    model = build("edu_emotionnet", config, dimensions={m: SIZES[m] for m in modalities}, classes=4)
    return model.eval()


def exaggerated(model: EduEmotionNet) -> EduEmotionNet:
    """In double precision and with large random weights: initial zeros and small values would hide a mistake."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def double(inputs: dict[Variant, ModalityInput]) -> dict[Variant, ModalityInput]:
    shared = {value.features.data_ptr(): value.features.double() for value in inputs.values()}
    return {v: replace(value, features=shared[value.features.data_ptr()]) for v, value in inputs.items()}


def assert_engines_agree(model, batch, cells, inputs, *, tolerance: float = 1e-6, **options) -> None:
    fast = evaluate_cells(model, batch, cells, inputs, engine="factorised", **options)
    slow = evaluate_cells(model, batch, cells, inputs, engine="plain")
    real = batch.real.expand(len(cells), -1, -1)
    for ours, theirs in zip(
        (fast.log_probabilities, fast.log_probabilities.exp(), fast.confidence),
        (slow.log_probabilities, slow.log_probabilities.exp(), slow.confidence),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert (ours - theirs)[real].abs().max() <= tolerance
    best, others = slow.log_probabilities[real].topk(2, dim=-1).values.unbind(-1)
    clear = best - others > tolerance
    assert (fast.log_probabilities[real].argmax(-1) == slow.log_probabilities[real].argmax(-1))[clear].all()


RATES = st.floats(0.0, 0.7).map(lambda rate: round(rate, 3))


@st.composite
def sweeps(draw):
    some = draw(st.sets(st.sampled_from(MODALITIES), min_size=1))
    modalities = tuple(m for m in MODALITIES if m in some)
    values = {"name": "drawn", "seeds": draw(st.sampled_from([[0], [0, 3]])), "sweeps": [], "grids": []}
    for name in draw(st.sets(st.sampled_from(MISSING), max_size=3)):
        levels = [1.0] if name == "absent" else draw(st.lists(RATES, min_size=1, max_size=2))
        chosen = draw(st.sampled_from(["together", "each", "subsets"]))
        values["sweeps"].append({"corruption": name, "levels": levels, "modalities": chosen})
    if draw(st.booleans()):
        instances = [{"corruption": "frame_missing", "levels": [0.2, 1.0]}, {"corruption": "gaussian", "levels": [3]}]
        values["grids"].append({"instances": instances[: draw(st.integers(1, 2))]})
    try:
        return modalities, expand(parse_suite(values), modalities)
    except UserError:  # nothing but the clean cell
        return modalities, [clean_cell(modalities)]


@settings(max_examples=30, deadline=None)
@given(
    sweep=sweeps(),
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    alignment=st.sampled_from(["history", "step", "window:3"]),
    confidence=st.sampled_from(["sigmoid", "softmax"]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    memory=st.sampled_from([50_000, 1 << 28]),
    seed=st.integers(0, 3),
)
def test_factorised_equals_plain(session, sweep, lengths, alignment, confidence, parts, memory, seed):
    modalities, cells = sweep
    model = network(
        modalities, seed=seed, alignment=alignment, confidence=confidence, cmaa=parts[0], mie=parts[1], tfl=parts[2]
    )
    sessions = [session(number, steps, modalities) for number, steps in enumerate(lengths)]
    batch = clean_batch(sessions)
    deviations = Surroundings(std={m: torch.ones(SIZES[m]).numpy() for m in modalities})
    inputs = build_variants(sessions, batch, distinct_variants(cells), deviations)
    assert_engines_agree(model, batch, cells, inputs, memory_bytes=memory)
    assert_engines_agree(exaggerated(model), batch, cells, double(inputs), memory_bytes=memory, tolerance=1e-11)


def test_bfloat16_encoders_are_close_and_leave_the_model_as_it_was(session):
    sessions = [session(number, 12) for number in range(3)]
    batch = clean_batch(sessions)
    cells = expand(parse_suite({"name": "s", "sweeps": [{"corruption": "frame_missing", "modalities": "each"}]}), SIZES)
    inputs = build_variants(sessions, batch, distinct_variants(cells))
    model = network()
    half = evaluate_cells(model, batch, cells, inputs, engine="factorised-bfloat16")
    exact = evaluate_cells(model, batch, cells, inputs)
    assert (half.engine, exact.engine) == ("factorised-bfloat16", "factorised")
    assert half.log_probabilities.dtype == torch.float32 == model.encoders["audio"].absent.dtype
    assert 1e-6 < float((half.log_probabilities - exact.log_probabilities).abs().max()) < 0.05


def test_both_ways_of_projecting_are_exercised_and_agree(session):
    sessions = [session(number, 9) for number in range(3)]
    batch = clean_batch(sessions)
    grid = {"name": "g", "grids": [{"instances": [{"corruption": "frame_missing", "levels": [0.2, 0.4, 0.6, 0.8]}]}]}
    single = {"name": "s", "sweeps": [{"corruption": "frame_missing", "modalities": "each"}]}
    ways = []
    for values in (grid, single):
        cells = expand(parse_suite(values), MODALITIES)
        ways.append(plan_cells([cell.variants for cell in cells], pairwise=True).project_views(weighs=True))
        inputs = build_variants(sessions, batch, distinct_variants(cells))
        assert_engines_agree(network(), batch, cells, inputs)
    assert ways == [True, False]


def test_values_that_are_hidden_are_never_read(session):
    """Garbage under a false mask, NaN included, changes nothing, though variants share one feature tensor."""
    sessions = [session(number, 12) for number in range(2)]
    batch = clean_batch(sessions)
    cells = expand(parse_suite({"name": "s", "sweeps": [{"corruption": "frame_missing"}]}), MODALITIES)
    inputs = build_variants(sessions, batch, distinct_variants(cells))
    spoilt = {m: batch.features[m].masked_fill(~batch.present[m][..., None], float("nan")) for m in MODALITIES}
    garbage = {v: replace(value, features=spoilt[v.modality]) for v, value in inputs.items()}
    clean, dirty = (evaluate_cells(network(), batch, cells, some) for some in (inputs, garbage))
    assert torch.equal(clean.log_probabilities, dirty.log_probabilities)


def test_a_batch_of_one_session_gives_the_same_as_a_large_one(session):
    cells = expand(parse_suite({"name": "s", "sweeps": [{"corruption": "step_missing"}]}), MODALITIES)
    sessions = [session(number, 5 + 4 * number) for number in range(4)]

    def log_p(chosen):
        batch = clean_batch(chosen)
        return evaluate_cells(
            network(), batch, cells, build_variants(chosen, batch, distinct_variants(cells))
        ).log_probabilities

    together = log_p(sessions)
    for row, one in enumerate(sessions):
        torch.testing.assert_close(together[:, row : row + 1, : one.num_steps], log_p([one]), atol=2e-6, rtol=2e-6)


def test_views_and_variants_are_distinct():
    levels = [Variant(modality=m, corruption="x", level=i) for m in MODALITIES for i in range(3)]
    columns = [[v for v in levels if v.modality == m] for m in MODALITIES]
    plan = plan_cells(list(itertools.product(*columns)), pairwise=True)
    assert (len(plan.variants), len(plan.views), len(plan.mixtures), len(plan.cells)) == (9, 6 * 9, 3 * 27, 27)
    assert len(plan_cells(list(itertools.product(*columns)), pairwise=False).views) == 9


@settings(max_examples=20, deadline=None)
@given(memory=st.integers(1, 300_000))
def test_plans_stay_within_memory_or_hold_one_cell(memory):
    levels = [[Variant(modality=m, corruption="x", level=i) for i in range(4)] for m in MODALITIES]
    cells = list(itertools.product(*levels))
    plans = bounded_plans(cells, pairwise=True, steps=10, width=16, memory_bytes=memory)
    assert sum(len(plan.cells) for plan in plans) == len(cells)
    for plan in plans:
        assert len(plan.cells) == 1 or plan.table_bytes(steps=10, width=16) <= memory


class Louder(EduEmotionNet):
    """A subclass may compute something else."""

    def forward(self, batch):
        predictions = super().forward(batch)
        return replace(predictions, log_probabilities=predictions.log_probabilities * 2)


def test_other_models_fall_back_to_plain_and_say_so(session):
    sessions = [session(0, 6), session(1, 4)]
    batch = clean_batch(sessions)
    cells = expand(parse_suite({"name": "s", "sweeps": [{"corruption": "frame_missing"}]}), MODALITIES)
    inputs = build_variants(sessions, batch, distinct_variants(cells))
    original = network()
    other = Louder(original.config, dimensions=SIZES, classes=4, statistics=FeatureStatistics.identity(SIZES)).eval()
    other.load_state_dict(original.state_dict())
    plain = evaluate_cells(original, batch, cells, inputs, engine="plain")
    result = evaluate_cells(other, batch, cells, inputs)
    assert (best_engine(original), result.engine, plain.engine) == ("factorised", "plain", "plain")
    torch.testing.assert_close(result.log_probabilities, 2 * plain.log_probabilities)
    with pytest.raises(ValueError, match="cannot be factorised"):
        evaluate_cells(other, batch, cells, inputs, engine="factorised")


def test_a_late_fusion_model_without_shared_weights_runs(session):
    sessions = [session(0, 6)]
    batch = clean_batch(sessions)
    model = build("late_fusion", dimensions=SIZES, classes=4).eval()
    cells = expand(parse_suite({"name": "s", "sweeps": [{"corruption": "frame_missing", "levels": [0.5]}]}), MODALITIES)
    inputs = build_variants(sessions, batch, distinct_variants(cells))
    result = evaluate_cells(model, batch, cells, inputs)
    assert result.engine == "plain" and result.log_probabilities.shape == (2, 1, 6, 4)


def test_mistakes(session):
    batch = clean_batch([session(0, 6)])
    model = network()
    clean = tuple(Variant(modality=m) for m in MODALITIES)
    inputs = {v: ModalityInput(features=batch.features[v.modality], present=batch.present[v.modality]) for v in clean}
    cell = Cell(id="clean", variants=clean)
    with pytest.raises(ValueError, match="no cells"):
        evaluate_cells(model, batch, [], inputs)
    with pytest.raises(ValueError, match="1 variants were not built"):
        evaluate_cells(model, batch, [cell], {v: inputs[v] for v in clean[:2]})
    with pytest.raises(ValueError, match="training mode"):
        evaluate_cells(model.train(), batch, [cell], inputs)
