"""Lemma 1 and Theorem 1 in a comparison: records of models, rows over seeds, and what the page says of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from edu_emotionnet import zoo
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.network import EduEmotionNetConfig
from emolab.reports.comparison_theory import theory_sections, theory_tables
from emolab.studies.comparison_results import Comparison
from emolab.studies.comparison_theory import feedback_rows, lipschitz_rows
from emolab.studies.theory import (
    FeedbackMeasured,
    LipschitzCase,
    TheoryRecord,
    TheorySettings,
    measure_theory,
)

DIMENSIONS = {"audio": 4, "visual": 3, "text": 2}
FEW = TheorySettings(sessions=2, iterations=5, inputs=4)


def batch() -> SessionBatch:
    generator = torch.Generator().manual_seed(0)
    return SessionBatch(
        features={name: torch.randn(2, 5, size, generator=generator) for name, size in DIMENSIONS.items()},
        present={name: torch.ones(2, 5, dtype=torch.bool) for name in DIMENSIONS},
        lengths=torch.tensor([5, 3]),
        labels=torch.zeros(2, 5, dtype=torch.long),
    )


def small(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = EduEmotionNetConfig(d_model=8, layers=1, heads=2, **options) if name == "edu_emotionnet" else None
    return zoo.build(name, config, dimensions=DIMENSIONS, classes=4).eval()


def measured(model: nn.Module, settings: TheorySettings = FEW) -> TheoryRecord:
    return measure_theory(model, batch(), settings, split="validation", session_ids=["s0", "s1"])


def test_a_record_survives_the_tracker_and_holds_every_case() -> None:
    record = measured(small("edu_emotionnet"))
    assert TheoryRecord.model_validate_json(record.model_dump_json(indent=1)) == record
    assert len({(case.modality, case.missing) for case in record.lipschitz}) == 9
    assert all(len(case.constants) == 2 and min(case.constants) > 0 for case in record.lipschitz)
    assert record.feedback is not None
    assert record.feedback.inputs == 4 == len(record.feedback.factors) == len(record.feedback.steps)
    assert max(record.feedback.factors) <= record.feedback.upper_bound
    assert record.feedback.changes[-1] < record.feedback.changes[0]


def test_a_model_that_feeds_nothing_back_has_no_feedback_map() -> None:
    assert measured(small("edu_emotionnet", tfl=False)).feedback is None


class WithoutDerivative(nn.Module):
    """Its operation can be run and not differentiated."""

    def forward(self, batch: SessionBatch) -> Predictions:
        if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
            raise RuntimeError("no forward derivative")
        rounded = _Rounded.apply(batch.features["audio"])
        return Predictions(log_probabilities=cast("torch.Tensor", rounded).log_softmax(-1))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("rounding has no derivative")


def test_a_model_that_cannot_be_measured_is_listed_with_the_reason() -> None:
    record = measured(WithoutDerivative().eval())
    assert record.lipschitz == () and record.not_measured == "rounding has no derivative"
    table = theory_tables(comparison({"odd": [record]}))["Lemma 1"]
    assert [row[0] for row in table.rows] == ["odd"]
    assert table.rows[0][-1] == "not measured: rounding has no derivative"


def comparison(records: dict[str, Sequence[TheoryRecord | None]]) -> Comparison:
    """As much of a comparison as the rows read."""
    cells = [SimpleNamespace(model=name, theory=record) for name, found in records.items() for record in found]
    return cast("Comparison", SimpleNamespace(models=tuple(records), cells=cells))


def record(constants: tuple[float, ...], **feedback: Any) -> TheoryRecord:
    values = {"inputs": 2, "upper_bound": 2.0, "unique": 2, "rates": (0.5, None), "changes": (0.5, 0.1)}
    case = LipschitzCase(modality="audio", missing=None, constants=constants, converged=1)
    found = FeedbackMeasured.model_validate(values | feedback) if feedback else None
    return TheoryRecord(split="validation", session_ids=("s0", "s1"), lipschitz=(case,), feedback=found)


def test_rows_against_values_by_hand() -> None:
    one = record((1.0, 3.0), factors=(0.2, 1.5), steps=(10, 20))
    two = record((4.0, 4.0), factors=(0.4, 0.6), steps=(-1, 30), unique=1, upper_bound=3.0, changes=(0.7, 0.05))
    both = comparison({"ours": [one, two, None], "other": [record((1.0, 1.0))]})
    first, second = lipschitz_rows(both)
    assert (first.model, first.modality, first.missing) == ("ours", "audio", None)
    assert (first.typical.mean, first.typical.deviation) == pytest.approx((3.0, 2**0.5))
    assert (first.largest, first.converged, second.largest) == (4.0, 0.5, 1.0)
    (row,) = feedback_rows(both)
    assert (row.seeds, row.inputs, row.largest_factor, row.upper_bound) == (2, 4, 1.5, 3.0)
    assert (row.factor, row.contracting, row.unique) == pytest.approx((0.5, 0.75, 0.75))
    assert (row.steps, row.rate, row.changes) == (25.0, 0.5, (0.7, 0.1))
    assert (row.most_steps, row.proven) == (None, 0)  # one start never settles; no bound lies below one


def test_the_most_steps_and_the_seeds_with_a_proof_stand_beside_the_medians() -> None:
    """A median of six says nothing of the slowest input, nor the largest bound of the seeds that have a smaller one."""
    found = [
        record((1.0, 1.0), factors=(0.1, 0.1), steps=(2, steps), upper_bound=bound)
        for steps, bound in ((6, 0.7), (40, 1.14), (3, 0.99))
    ]
    (row,) = feedback_rows(comparison({"ours": found}))
    assert (row.steps, row.most_steps, row.upper_bound, row.proven) == (2.5, 40, 1.14, 2)
    table = theory_tables(comparison({"ours": found}))["Theorem 1"]
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert (shown["steps"], shown["most steps"], shown["bound"], shown["bound below 1"]) == (2.5, 40, 1.14, "2/3")
    text = theory_sections(comparison({"ours": found}))[1].text
    assert text.endswith("A unique limit is seen at every input for ours (proven for 2 of 3 seeds).")


def test_the_page_says_what_the_theorem_is_worth_for_these_weights() -> None:
    def verdict(**feedback: Any) -> str:
        values: dict[str, Any] = {"factors": (0.1, 0.2), "steps": (3, 3)}
        return theory_sections(comparison({"ours": [record((1.0, 1.0), **(values | feedback))]}))[1].text

    assert verdict(upper_bound=0.9).endswith("A unique limit is proven by the bound for ours.")
    assert verdict(upper_bound=1.1).endswith("A unique limit is seen at every input for ours.")
    assert verdict(upper_bound=1.1, unique=1).endswith("A unique limit is contradicted for ours.")
    assert theory_sections(comparison({"ours": [None]})) == []
