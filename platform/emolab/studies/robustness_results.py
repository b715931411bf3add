"""What a sweep says: curves, summaries and comparisons, computed from counts per session."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emolab.corpora.corpus import Split
from emolab.registry.lookup import KeptModel
from emolab.robustness.cells import Cell, cell_id
from emolab.robustness.corruptions.catalog import corruption
from emolab.robustness.corruptions.observed import group_of
from emolab.robustness.metrics import (
    TOLERATED_LOSS,
    area_under_curve,
    effective_robustness,
    expected_calibration_error,
    largest_tolerated_rate,
    mean_corruption_error,
    relative_mean_corruption_error,
    scores_by_group,
    worst,
)
from emolab.robustness.tally import Tally
from emolab.sessions.manifest import Manifest, canonical_json
from emolab.studies.bootstrap import METRICS, DifferenceInterval, Interval, Metric, metric_difference, metric_interval
from emolab.studies.resampling import FEWEST_CLUSTERS
from emolab.studies.statistics import holm
from emolab.training.recipe import fingerprint

MODELS_FILE = "models.json"
"""Artifact of a sweep's run: training run id -> digest of the weights that were evaluated."""
CELLS_FILE = "cells.parquet"
"""Artifact of a sweep's run: one row per model and cell, with its scores."""

CLEAN_TRAINING = "clean"
"""The regime without any defence."""

DEFENCES = {"modality_dropout": "modality dropout", "feature_noise": "feature noise"}
"""Training settings that prepare a model for bad input, and what they are called."""

Key = tuple[str, tuple[str, ...]]
"""(corruption, corrupted modalities): what the points of a curve share."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Models that differ in their training seed alone."""

    model: str
    """Name in the zoo."""
    regime: str
    """How it was trained: CLEAN_TRAINING, or with which defence; only equal regimes are compared."""
    variant: str = ""
    """What sets it apart from another group of the same model and regime, if there is one."""
    run_ids: Sequence[str]
    tallies: Sequence[Tally]
    engine: str
    agreement: dict[str, float]
    """Modality -> correlation of its weight with its true quality, mean over the models; empty where unknown."""

    @property
    def label(self) -> str:
        """The group for people."""
        return f"{self.model}{f' ({self.variant})' if self.variant else ''}, {self.regime}"

    @property
    def trained_clean(self) -> bool:
        return self.regime == CLEAN_TRAINING

    @property
    def slug(self) -> str:
        """The label as part of a metric's name."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", self.label)

    def counts(self, cells: Sequence[int]) -> NDArray[np.int64]:
        """(models x cells, sessions, K, K): seeds of training and of corruption alike are repetitions."""
        return np.concatenate([tally.confusion[list(cells)] for tally in self.tallies])

    def score(self, cells: Sequence[int], metric: Metric = "macro_f1") -> float:
        """A metric over all sessions, mean over the repetitions."""
        return float(METRICS[metric](self.counts(cells).sum(axis=1)).mean())

    def calibration(self, cells: Sequence[int]) -> float:
        """Expected calibration error over all sessions, mean over the repetitions: an overconfident seed and an
        underconfident one do not make a calibrated pair."""
        tables = np.concatenate([tally.calibration[list(cells)].sum(axis=1) for tally in self.tallies])
        return float(np.mean([expected_calibration_error(table) for table in tables]))

    def brier(self, cells: Sequence[int]) -> float:
        """Mean squared distance from the one-hot label."""
        errors = sum(float(tally.squared_error[list(cells)].sum()) for tally in self.tallies)
        return errors / max(1, int(self.counts(cells).sum()))


def grouped(
    models: Sequence[KeptModel], tallies: Sequence[Tally], agreement: Sequence[Mapping[str, float]]
) -> list[Group]:
    """Models that differ in their seed alone are one group; other differences are part of the group's label."""
    groups: dict[str, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault(canonical_json(model.settings), []).append(number)
    firsts = [models[members[0]] for members in groups.values()]
    return [
        Group(
            model=first.name,
            regime=_regime(first),
            variant=_variant(first, [o for o in firsts if (o.name, _regime(o)) == (first.name, _regime(first))]),
            run_ids=[models[i].run_id for i in members],
            tallies=[tallies[i] for i in members],
            engine=tallies[members[0]].engine,
            agreement={n: float(np.mean([agreement[i][n] for i in members])) for n in agreement[members[0]]},
        )
        for first, members in zip(firsts, groups.values(), strict=True)
    ]


def _regime(model: KeptModel) -> str:
    defences = [text for key, text in DEFENCES.items() if model.settings.get(f"training.{key}")]
    return " and ".join(defences) or CLEAN_TRAINING


def _variant(model: KeptModel, namesakes: Sequence[KeptModel]) -> str:
    """The settings in which a model differs from its namesakes, a few by name, many by their digest."""
    differing = [
        key for key, value in model.settings.items() if any(other.settings.get(key) != value for other in namesakes)
    ]
    if len(differing) > 3:
        return f"settings {fingerprint({key: model.settings[key] for key in differing})[:6]}"
    return ", ".join(f"{key.rsplit('.')[-1]}={model.settings[key]}" for key in differing)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The reference against another group at one point of a curve."""

    other: str
    difference: DifferenceInterval
    adjusted_p: float
    """After Holm's correction over the other groups."""


@dataclass(frozen=True, kw_only=True)
class RobustnessResults:
    """A finished sweep."""

    name: str
    run_id: str
    manifest: Manifest
    split: Split
    cells: Sequence[Cell]
    reference: str
    groups: Sequence[Group]

    @property
    def clean(self) -> list[int]:
        """The clean cell, as a list like those of a curve's levels."""
        return [index for index, cell in enumerate(self.cells) if cell.is_clean]

    def curves(self) -> dict[Key, dict[float, list[int]]]:
        """(corruption, modalities) -> level -> cells (one per corruption seed); level 0 is the clean cell.

        Cells of a joint grid belong to no curve.
        """
        found: dict[Key, dict[float, list[int]]] = {}
        for index, cell in enumerate(self.cells):
            if _on_curve(cell):
                levels = found.setdefault((cell.corruption, cell.modalities), {0.0: self.clean})
                levels.setdefault(cell.level, []).append(index)
        return {key: dict(sorted(levels.items())) for key, levels in found.items()}

    def main_curve(self) -> tuple[Key, dict[float, list[int]]] | None:
        """The curve that is drawn: over the missing rate where there is one, else the longest."""
        return self.missing_rate_curve() or max(self.curves().items(), key=lambda item: len(item[1]), default=None)

    def missing_rate_curve(self) -> tuple[Key, dict[float, list[int]]] | None:
        """Steps missing in every modality at the same rate (Fig. 5)."""
        key, curves = ("frame_missing", group_of([*self.manifest.dimensions])), self.curves()
        return (key, curves[key]) if key in curves else None

    @property
    def has_intervals(self) -> bool:
        """Whether there are sessions enough for the bootstrap."""
        return len(self.groups[0].tallies[0].session_ids) >= FEWEST_CLUSTERS

    def intervals(self, group: Group, levels: dict[float, list[int]], metric: Metric = "macro_f1") -> list[Interval]:
        """The score at each level, with its session-clustered interval; only where the results have intervals."""
        return [metric_interval(group.counts(cells), metric=metric) for cells in levels.values()]

    def summary(self, group: Group) -> dict[str, float]:
        """The figures of protocols section 4 for one group; those over the missing rate where there is its curve."""
        missing, clean = self.missing_rate_curve(), self.clean
        values = {
            "clean_accuracy": group.score(clean, "accuracy"),
            "clean_macro_f1": group.score(clean),
            "clean_calibration_error": group.calibration(clean),
            "clean_brier": group.brier(clean),
        }
        if missing is not None:
            rates, scores = [*missing[1]], [*self.points(group, missing[1]).values()]
            values |= {
                "area_under_curve": area_under_curve(rates, scores),
                "largest_tolerated_rate": largest_tolerated_rate(rates, scores),
            }
            late = self._late_fusion(group)
            if late is not None:
                values["effective_robustness"] = effective_robustness(scores, [*self.points(late, missing[1]).values()])
        values |= self._corruption_errors(group)
        values["worst_speaker_macro_f1"] = self.worst_speaker(group)[1]
        return values

    def points(self, group: Group, levels: dict[float, list[int]], metric: Metric = "macro_f1") -> dict[float, float]:
        """Level -> score."""
        return {level: group.score(cells, metric) for level, cells in levels.items()}

    def worst_condition(self, group: Group) -> tuple[str, float] | None:
        """The condition with the lowest mean macro-F1 over its levels, in words; None without any curve."""
        scores = {
            self.condition(key): float(np.mean([*self.points(group, levels).values()][1:]))
            for key, levels in self.curves().items()
        }
        return worst(scores) if scores else None

    def condition(self, key: Key) -> str:
        """What is done to which modalities, for people."""
        name, modalities = key
        everything = modalities == group_of([*self.manifest.dimensions]) and len(modalities) > 1
        return f"{corruption(name).label} ({'all modalities' if everything else ', '.join(modalities)})"

    def worst_speaker(self, group: Group) -> tuple[str, float]:
        """The speaker with the lowest clean macro-F1."""
        return worst(self._by_speaker(group, self.clean))

    @property
    def chance(self) -> Mapping[Metric, float]:
        """The scores of always answering with the training split's most frequent class."""
        prior, macro_f1 = self.manifest.class_prior_on(self.split)
        return {"accuracy": prior, "macro_f1": macro_f1}

    def near_chance(self, group: Group) -> bool:
        """Whether a group could lose no more than is tolerated before it were at chance: it tolerates everything."""
        return group.score(self.clean) - self.chance["macro_f1"] <= TOLERATED_LOSS

    def compared(self, level: float, metric: Metric = "accuracy") -> list[Comparison]:
        """The reference against every group that was trained the same way, at one rate of the main curve; empty
        where there is no such rate, or no interval."""
        main = self.main_curve()
        if main is None or level not in main[1] or not self.has_intervals:
            return []
        cells = main[1][level]
        found: list[Comparison] = []
        for members in self._regimes().values():
            mine = next((group for group in members if group.model == self.reference), None)
            if mine is None:
                continue
            differences = {
                other.label: metric_difference(mine.counts(cells), other.counts(cells), metric=metric)
                for other in members
                if other is not mine
            }
            adjusted = holm({label: difference.p for label, difference in differences.items()})
            found += [Comparison(other=k, difference=d, adjusted_p=adjusted[k]) for k, d in differences.items()]
        return found

    def lines(self) -> Iterator[str]:
        """The results for a terminal."""
        for group in self.groups:
            values = self.summary(group)
            area = f", area under the curve {values['area_under_curve']:.4f}" if "area_under_curve" in values else ""
            models = f"{counted_models(len(group.run_ids))}, {group.engine} engine"
            prior = f"class prior {self.chance['macro_f1']:.4f}{', near chance' if self.near_chance(group) else ''}"
            yield f"{group.label} ({models}): clean macro-F1 {values['clean_macro_f1']:.4f} ({prior}){area}"

    def _regimes(self) -> dict[str, list[Group]]:
        regimes: dict[str, list[Group]] = {}
        for group in self.groups:
            regimes.setdefault(group.regime, []).append(group)
        return regimes

    def _late_fusion(self, group: Group) -> Group | None:
        """Our own late fusion, trained as the group was."""
        return next((o for o in self.groups if o.model == "late_fusion" and o.regime == group.regime), None)

    def _corruption_errors(self, group: Group) -> dict[str, float]:
        """mCE and relative mCE of 1 - macro-F1, every curve counting the same however many levels it has."""
        late, curves = self._late_fusion(group), self.curves().values()
        if late is None or not curves:
            return {}
        plain, relative = [], []
        for levels in curves:
            (clean, *ours), (late_clean, *theirs) = (
                [1.0 - score for score in self.points(g, levels).values()] for g in (group, late)
            )
            plain.append(mean_corruption_error([ours], [theirs]))
            relative.append(relative_mean_corruption_error([ours], [theirs], clean=clean, reference_clean=late_clean))
        return {
            "mean_corruption_error": float(np.mean(plain)),
            "relative_mean_corruption_error": float(np.mean(relative)),
        }

    def _by_speaker(self, group: Group, cells: Sequence[int]) -> dict[str, float]:
        return scores_by_group(group.counts(cells).sum(axis=0), group.tallies[0].speaker_ids)


def counted_models(count: int) -> str:
    """So many models, in words."""
    return f"{count} model{'s' * (count != 1)}"


def _on_curve(cell: Cell) -> bool:
    """Whether a cell comes from a sweep over levels; cells of a joint grid are named by modality instead."""
    return not cell.is_clean and cell.id == cell_id(cell.corruption, cell.level, cell.modalities, cell.seed)
