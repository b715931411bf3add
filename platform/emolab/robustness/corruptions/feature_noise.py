"""Noise for sessions that arrive as features, severities 1 to 5. Absent steps stay absent."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from emolab.names import UserError
from emolab.robustness.corruptions.catalog import register
from emolab.robustness.corruptions.missingness import repeat_last
from emolab.robustness.corruptions.observed import FeatureRequest, Observed
from emolab.robustness.corruptions.runs import one_run

Value = TypeVar("Value")

GAUSSIAN_SCALE = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Standard deviation of the noise, in training standard deviations of each feature."""
LAG_STEPS = (1, 2, 3, 5, 8)
FROZEN_PROBABILITY = (0.1, 0.2, 0.4, 0.6, 0.8)
SWAPPED_FRACTION = (0.2, 0.4, 0.6, 0.8, 1.0)
SPECKLE_SCALE = (0.15, 0.3, 0.5, 0.75, 1.0)
LOST_FEATURES = (0.1, 0.2, 0.3, 0.5, 0.7)


def _at(table: tuple[Value, ...], request: FeatureRequest) -> Value:
    return table[int(request.variant.level) - 1]


def _normal(request: FeatureRequest) -> NDArray[np.float32]:
    """(T, D) standard normal numbers, the same at every severity."""
    generator = request.stream().generator("noise")
    return np.asarray(generator.standard_normal(request.observed.features.shape, dtype=np.float32), dtype=np.float32)


@register("gaussian", label="Gaussian noise", source="features: k training standard deviations")
def gaussian(request: FeatureRequest) -> Observed:
    """Additive noise, independent for every step and feature."""
    clean = request.observed
    noise = _normal(request)
    scale = (request.std() * _at(GAUSSIAN_SCALE, request)).astype(np.float32)
    return Observed(features=np.asarray(clean.features + scale * noise, dtype=np.float32), present=clean.present)


@register(
    "time_shift", label="arriving late", random=False, source="features: the stream arrives 1, 2, 3, 5 or 8 steps late"
)
def time_shift(request: FeatureRequest) -> Observed:
    """Step t holds what belongs to an earlier step; the first steps, for which nothing has arrived, are absent."""
    clean = request.observed
    lag = min(_at(LAG_STEPS, request), len(clean.present))
    kept = len(clean.present) - lag
    features, present = np.zeros_like(clean.features), np.zeros_like(clean.present)
    features[lag:], present[lag:] = clean.features[:kept], clean.present[:kept]
    return Observed(features=features, present=present)


@register("frozen_steps", fill="last value", source="features: a stuttering sensor")
def frozen_steps(request: FeatureRequest) -> Observed:
    """Every step on its own repeats the last good value, with probability 0.1, 0.2, 0.4, 0.6 or 0.8."""
    draws = request.stream().uniform("steps", request.session.num_steps)
    return repeat_last(request.observed, draws < _at(FROZEN_PROBABILITY, request))


@register(
    "session_swap", label="another session's values", source="features: 20 to 100 % of the session from another one"
)
def session_swap(request: FeatureRequest) -> Observed:
    """A contiguous run holds the values of a donor session at the same steps (repeated if the donor is shorter).

    Raises:
        UserError: no donor was provided, or its features have another width.
    """
    if request.surroundings.donor is None:
        raise UserError("corruption 'session_swap' needs a donor session: give Surroundings a donor")
    clean, name = request.observed, request.variant.modality
    donor = request.surroundings.donor(request.session.session_id, request.variant.seed)
    if name not in donor.features or donor.features[name].shape[1] != clean.features.shape[1]:
        raise UserError(f"session {donor.session_id!r} cannot be a donor of {name}: it lacks it or has another width")
    steps = request.session.num_steps
    taken = round(_at(SWAPPED_FRACTION, request) * steps)
    swapped = one_run(steps, taken, request.stream().uniform("anchor", 1)[0])
    source = np.arange(steps) % donor.num_steps
    return Observed(
        features=np.where(swapped[:, None], donor.features[name][source], clean.features),
        present=np.where(swapped, donor.present[name][source], clean.present),
    )


@register(
    "speckle", label="speckle noise", validation_only=True, source="ImageNet-C's held-out speckle noise, on features"
)
def speckle(request: FeatureRequest) -> Observed:
    """Multiplicative noise, independent for every step and feature."""
    clean = request.observed
    noise = _normal(request)
    factor = 1 + np.float32(_at(SPECKLE_SCALE, request)) * noise
    return Observed(features=np.asarray(clean.features * factor, dtype=np.float32), present=clean.present)


@register("lost_features", validation_only=True, source="features: dead channels of a sensor")
def lost_features(request: FeatureRequest) -> Observed:
    """A share of the features is zero throughout the session, though the modality counts as present."""
    clean = request.observed
    draws = request.stream().uniform("features", clean.features.shape[1])
    lost = draws < _at(LOST_FEATURES, request)
    return Observed(features=np.where(lost, np.float32(0), clean.features), present=clean.present)
