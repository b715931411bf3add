"""Missing data, protocols P1 to P6.

A missing step is an absent one: its presence mask is false and its features are zero. A model reads neither the
zeros nor what stood there. The exception is `burst_frozen`, a device that repeats its last value: nothing tells
the receiver that the value is stale, so the mask stays true; only before the first value is the step absent.

Rates count observed steps: what the data already lacks stays missing and is not part of the rate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.robustness.corruptions.catalog import RATES, register
from emolab.robustness.corruptions.observed import FeatureRequest, Observed
from emolab.robustness.corruptions.runs import last_before, two_runs
from emolab.robustness.corruptions.streams import hashed_unit


def _without(observed: Observed, missing: NDArray[np.bool_]) -> Observed:
    return Observed(
        features=np.where(missing[:, None], np.float32(0), observed.features),
        present=observed.present & ~missing,
    )


@register(
    "frame_missing",
    label="missing steps",
    unit="rate",
    levels=RATES,
    fill="zero",
    source="P1 and P4: LNLN (2024), MultiBench (2021)",
)
def frame_missing(request: FeatureRequest) -> Observed:
    """Every step on its own, with a probability equal to the rate."""
    draws = request.stream().uniform("steps", request.session.num_steps)
    return _without(request.observed, draws < request.variant.level)


@register(
    "step_missing",
    label="missing steps, never all at once",
    unit="rate",
    levels=RATES[:7],
    fill="zero",
    joint=True,
    leaves_one=True,
    source="P2: GCNet, CPM-Nets",
)
def step_missing(request: FeatureRequest) -> Observed:
    """Modalities of a step go missing, but never all that were observed.

    At each step one observed modality, chosen evenly, is safe; each of the k - 1 others is dropped with a
    probability that makes the expected share of dropped values the rate, as far as (k - 1) / k allows.
    """
    group = request.variant.group or tuple(request.session.features)
    steps = request.session.num_steps
    observed = np.stack([request.session.present[name] for name in group])
    safety = np.stack([request.stream(name).uniform("safety", steps) for name in group])
    safe = np.where(observed, safety, -1.0).argmax(axis=0) == group.index(request.variant.modality)
    count = observed.sum(axis=0)
    probability = np.minimum(1.0, request.variant.level * count / np.maximum(count - 1, 1))
    draws = request.stream().uniform("steps", steps)
    return _without(request.observed, (draws < probability) & ~safe & (count > 1))


@register("absent", label="absent throughout", levels=(1.0,), fill="zero", random=False, source="P3: MMIN (2021)")
def absent(request: FeatureRequest) -> Observed:
    """The whole session lacks the modality; the fixed patterns of P3 are made of it."""
    return _without(request.observed, np.ones(request.session.num_steps, dtype=np.bool_))


@register(
    "burst_missing", label="missing in two runs", unit="rate", fill="zero", source="P5: camera off, muted microphone"
)
def burst_missing(request: FeatureRequest) -> Observed:
    """Two contiguous runs, one in each half of the session, absent."""
    return _without(request.observed, two_runs(request.session.num_steps, request.variant.level, request.stream()))


@register("burst_frozen", label="frozen in two runs", unit="rate", fill="last value", source="P5: frozen device")
def burst_frozen(request: FeatureRequest) -> Observed:
    """Two contiguous runs in which the last value before the run repeats and passes for a real one."""
    frozen = two_runs(request.session.num_steps, request.variant.level, request.stream())
    return repeat_last(request.observed, frozen)


def repeat_last(observed: Observed, frozen: NDArray[np.bool_]) -> Observed:
    """Frozen steps repeat the last observed value before them; with none before, they are absent."""
    source = last_before(observed.present & ~frozen)
    source = np.where(frozen, source, np.arange(len(frozen)))
    features = np.where((source >= 0)[:, None], observed.features[source], np.float32(0))
    return Observed(features=features, present=observed.present & (source >= 0))


@register("label_missing", label="missing by class", unit="rate", fill="zero", source="P6: MultiModN (2023)")
def label_missing(request: FeatureRequest) -> Observed:
    """Missing not at random: every second class (which ones, the seed decides) loses steps first.

    The probability is min(1, 2r) for those classes, max(0, 2r - 1) for the others, so that the mean over balanced
    classes is the rate r; unlabelled steps go missing at the rate itself.
    """
    labels, rate = request.session.labels, request.variant.level
    affected = (labels + request.variant.seed) % 2 == 0
    probability = np.where(affected, *_unequal(rate))
    probability = np.where(labels == IGNORED_LABEL, rate, probability)
    return _without(request.observed, request.stream().uniform("steps", len(labels)) < probability)


@register("speaker_missing", label="missing by speaker", unit="rate", fill="zero", source="P6: MultiModN (2023)")
def speaker_missing(request: FeatureRequest) -> Observed:
    """Missing not at random: about half of the speakers (a function of speaker and seed) lose steps first, with the
    probabilities of `label_missing`."""
    affected = hashed_unit("speaker", request.session.speaker_id, request.variant.seed) < 0.5
    probability = _unequal(request.variant.level)[0 if affected else 1]
    return _without(request.observed, request.stream().uniform("steps", request.session.num_steps) < probability)


def _unequal(rate: float) -> tuple[float, float]:
    return min(1.0, 2 * rate), max(0.0, 2 * rate - 1)
