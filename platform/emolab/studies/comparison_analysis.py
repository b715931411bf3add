"""What a comparison shows: scores over seeds, differences from the reference and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from emolab.studies import bootstrap
from emolab.studies.bootstrap import CurveInterval, DifferenceInterval, Interval, Metric
from emolab.studies.comparison_results import Comparison
from emolab.studies.resampling import FEWEST_CLUSTERS
from emolab.studies.statistics import MeanAndDeviation, PairedTTest, holm, mean_and_deviation, paired_t_test

ALPHA = 0.05
CLAIMED_FIRST = "edu_emotionnet"
"""The paper's own model, first in its tables I and II and above its ablations in III."""
OPPONENT = "hybrid_fusion"
"""The baseline of Fig. 4."""
LARGEST = 1.0
"""Difference that two scores can have."""
METRICS: tuple[Metric, ...] = ("accuracy", "macro_f1")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One model's row in the tables."""

    model: str
    scores: Mapping[Metric, MeanAndDeviation]
    """Over seeds."""
    seeds: int
    parameters: int
    training_seconds: float
    """Mean over seeds."""
    run_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Reference minus another model, in one metric."""

    model: str
    by_session: DifferenceInterval | None
    """None where the test split has too few sessions."""
    by_speaker: DifferenceInterval | None
    """None where every session has a speaker of its own, or fewer than FEWEST_CLUSTERS spoke."""
    t_test: PairedTTest | None
    """Over the seeds that both models have; None below two."""
    adjusted_p: float | None
    """Of the bootstrap over sessions, after Holm over all models compared."""
    adjusted_t_p: float | None

    @property
    def verdict(self) -> str:
        """In words, at 5 % after Holm: a model is better where other sessions and other seeds would say so too."""
        if self.adjusted_p is None or self.by_session is None or self.adjusted_p > ALPHA:
            return "undecided"
        word = "better" if self.by_session.value > 0 else "worse"
        return f"reference {word}" if self._seeds_agree else f"{word} (these weights)"

    @property
    def _seeds_agree(self) -> bool:
        """Whether the t-test over seeds finds the difference as well. Not with a single seed; hardly with two."""
        if self.adjusted_t_p is None or self.t_test is None or self.by_session is None:
            return False
        return self.adjusted_t_p <= ALPHA and self.t_test.difference * self.by_session.value > 0


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything the report prints, computed once."""

    comparison: Comparison
    standings: Mapping[str, Standing]
    """Model -> row, best mean macro-F1 first; models without a result are missing."""
    differences: Mapping[Metric, tuple[Difference, ...]]
    opponent: str | None
    """The baseline of Fig. 4: HybridFusion, else the best of the others."""
    class_f1: Mapping[str, list[Interval]]
    """Per class, of the reference and its opponent."""
    weights: CurveInterval | None
    """(steps, modalities) weights of the reference, averaged over seeds (Fig. 3)."""

    def ranking_sentence(self) -> str:
        """Whether the paper's claim, the full model first, came out."""
        if CLAIMED_FIRST not in self.standings:
            return f"The paper's ranking cannot be judged: {CLAIMED_FIRST} has no result here."
        order = list(self.standings)
        scores = {model: row.scores["macro_f1"].mean for model, row in self.standings.items()}
        place = 1 + sum(score > scores[CLAIMED_FIRST] for score in scores.values())
        found = "came out" if place == 1 else "did not come out"
        leader = "" if place == 1 else f", behind {order[0]} ({scores[order[0]]:.4f})"
        verdicts = [difference.verdict for difference in self.differences["macro_f1"]]
        return (
            f"The paper's ranking, {CLAIMED_FIRST} first, {found}: it is number {place} of {len(order)} by mean test "
            f"macro-F1 ({scores[CLAIMED_FIRST]:.4f}){leader}; of the {len(verdicts)} differences from "
            f"{self.comparison.reference}, {verdicts.count('reference better')} favour {self.comparison.reference} and "
            f"{verdicts.count('reference worse')} the other model at {ALPHA:.0%}, over sessions (bootstrap) and over "
            f"seeds (paired t-test) alike, both after Holm.{self._reservation(verdicts)}"
        )

    def _reservation(self, verdicts: Sequence[str]) -> str:
        """What differences between these very weights do not show of their models, and what the seeds could show."""
        for_it, against_it = verdicts.count("better (these weights)"), verdicts.count("worse (these weights)")
        unsettled = for_it + against_it
        if not unsettled:
            return ""
        tests = [difference.t_test for difference in self.differences["macro_f1"] if difference.t_test is not None]
        return (
            f" {unsettled} more hold{'s' * (unsettled == 1)} for these very weights (bootstrap) and not for other "
            f"seeds, {for_it} in favour of {self.comparison.reference} and {against_it} of the other model: "
            f"{_ability(tests)}."
        )

    def trained_late(self) -> int:
        """Cells whose training ended after the test split was first opened: the comparison was extended."""
        cells = [cell for cell in self.comparison.cells if cell.sessions is not None]
        first = min(datetime.fromisoformat(cell.first_opened).timestamp() for cell in cells)
        return sum(cell.ended is not None and cell.ended > first for cell in cells)


def _ability(tests: Sequence[PairedTTest]) -> str:
    """How large a difference must be for the t-tests over seeds to find it; each model has its own deviation."""
    if not tests:
        return "with one seed there is no test"
    seeds, found = min(test.seeds for test in tests), [test.detectable_difference for test in tests]
    least, most = f"{min(found):.3f}", f"{max(found):.3f}"
    span = f"{least} to {most}, depending on the model" if most != least else least
    beyond = sum(size > LARGEST for size in found)
    never = f"; for {beyond} of {len(found)} models that is more than {LARGEST:g}, the largest there can be"
    return (
        f"with {seeds} seeds the smallest difference that the t-test finds (power 0.8) is {span}"
        f"{never if beyond else ''}"
    )


def analyse(comparison: Comparison, *, resamples: int = bootstrap.RESAMPLES) -> Analysis:
    """All tables and intervals of a comparison; equal comparisons give equal numbers."""
    standings = {model: _standing(comparison, model) for model in comparison.models if comparison.tested(model)}
    standings = dict(sorted(standings.items(), key=lambda item: -item[1].scores["macro_f1"].mean))
    others = [model for model in comparison.models if model in standings and model != comparison.reference]
    if comparison.reference not in standings:
        others = []
    opponent = OPPONENT if OPPONENT in others else next((model for model in standings if model in others), None)
    drawn = [model for model in (comparison.reference, opponent) if model in standings]
    enough = len(comparison.sessions.session_ids) >= FEWEST_CLUSTERS
    return Analysis(
        comparison=comparison,
        standings=standings,
        differences={metric: _differences(comparison, others, metric, resamples) for metric in METRICS},
        opponent=opponent,
        class_f1={
            model: bootstrap.class_f1_intervals(comparison.confusion(model), resamples=resamples)
            for model in drawn
            if model and enough
        },
        weights=_weights(comparison, resamples) if enough else None,
    )


def _standing(comparison: Comparison, model: str) -> Standing:
    cells = comparison.tested(model).values()
    counts = comparison.confusion(model).sum(axis=1)
    return Standing(
        model=model,
        scores={metric: mean_and_deviation(bootstrap.METRICS[metric](counts)) for metric in METRICS},
        seeds=len(cells),
        parameters=round(next(iter(cells)).metrics["trainable_parameters"]),
        training_seconds=float(np.mean([cell.metrics["training_seconds"] for cell in cells])),
        run_ids=tuple(cell.run_id for cell in cells),
    )


def _differences(comparison: Comparison, others: list[str], metric: Metric, resamples: int) -> tuple[Difference, ...]:
    tests = {model: _t_test(comparison, model, metric) for model in others}
    sessions = {model: _bootstrap(comparison, model, metric, resamples, speakers=None) for model in others}
    by_speaker = _speakers(comparison)
    adjusted = holm({model: interval.p for model, interval in sessions.items() if interval is not None})
    adjusted_t = holm({model: test.p for model, test in tests.items() if test is not None})
    return tuple(
        Difference(
            model=model,
            by_session=sessions[model],
            by_speaker=_bootstrap(comparison, model, metric, resamples, speakers=by_speaker) if by_speaker else None,
            t_test=tests[model],
            adjusted_p=adjusted.get(model),
            adjusted_t_p=adjusted_t.get(model),
        )
        for model in others
    )


def _bootstrap(
    comparison: Comparison, model: str, metric: Metric, resamples: int, *, speakers: tuple[str, ...] | None
) -> DifferenceInterval | None:
    if len(comparison.sessions.session_ids) < FEWEST_CLUSTERS:
        return None
    first, second = comparison.confusion(comparison.reference), comparison.confusion(model)
    return bootstrap.metric_difference(first, second, metric=metric, speakers=speakers, resamples=resamples)


def _speakers(comparison: Comparison) -> tuple[str, ...] | None:
    """Speakers of the sessions, where resampling them says something else than resampling sessions."""
    speakers = comparison.sessions.speaker_ids
    return speakers if FEWEST_CLUSTERS <= len(set(speakers)) < len(speakers) else None


def _t_test(comparison: Comparison, model: str, metric: Metric) -> PairedTTest | None:
    score = bootstrap.METRICS[metric]
    ours, theirs = comparison.tested(comparison.reference), comparison.tested(model)
    common = [seed for seed in ours if seed in theirs]
    if len(common) < 2:
        return None
    by_seed = [
        dict(zip(cells, score(comparison.confusion(name).sum(axis=1)), strict=True))
        for name, cells in ((comparison.reference, ours), (model, theirs))
    ]
    return paired_t_test(*([float(scores[seed]) for seed in common] for scores in by_seed))


def _weights(comparison: Comparison, resamples: int) -> CurveInterval | None:
    kept = [cell.sessions.confidence for cell in comparison.tested(comparison.reference).values() if cell.sessions]
    weights = [values for values in kept if values is not None]
    if not weights or len(weights) < len(kept):
        return None
    return bootstrap.curve_interval(np.mean(weights, axis=0), comparison.sessions.observed, resamples=resamples)
