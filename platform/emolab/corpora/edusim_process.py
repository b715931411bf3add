"""The stochastic process behind EduSim: what the simulator samples from and its exact filter inverts.

A session has one hidden *dominant class* d. Given d, the learner's class c_t is a Markov chain. Every
modality m has a hidden *condition* k_t of its own: 0 is clean, anything above is degraded and comes in
bursts. Class and condition together choose what the modality shows:

    x_t = offset_speaker + gain_speaker * mean[c_t, k_t] P + scale[k_t] u_t
    u_t = rho u_{t-1} + sqrt(1 - rho^2) e_t

with P a fixed random projection of the signal plane to the D features and e_t white in all D of them. The
noise is a function of two neighbouring observations and the hidden states at those two steps, which is what
lets a forward algorithm over the joint hidden state be exact. A run of noise ends where the modality is
absent: the next observation draws u anew from its stationary distribution.

The strengths, rates and scales below are set by the exact filter alone (visual before audio before text,
pairs that one modality cannot tell apart, a joint ceiling near 0.85); no trained model had a say in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import MODALITIES

CLASSES = ("confused", "curious", "bored", "frustrated")
SIGNAL_WIDTH = 3
"""Coordinates of the signal before projection: two carry the class, the third marks a stale picture."""

OFFSET_DEVIATION = 0.6
"""Standard deviation of a speaker's offset on every feature, in units of the clean noise."""
GAIN_DEVIATION = 0.2
"""Standard deviation of the logarithm of a speaker's gain."""
LACKING_PROBABILITY = 0.06
"""Share of sessions that lack one whole modality, each of the three equally often."""
LENGTH_RANGE = (0.6, 1.4)
"""Shortest and longest session, as multiples of the mean."""

_DOMINANT_START = 0.7
_DOMINANT_STAY = 0.94
_OTHER_STAY = (0.76, 0.82, 0.86, 0.80)
"""By class, where it is not the dominant one; boredom lasts, confusion is soon resolved or soured."""
_PULL = 3.0
"""How much likelier a move into the dominant class is than the table below says, before normalisation."""

# Rows: the class left; columns: the class entered, in the order of CLASSES. After D'Mello & Graesser,
# "Dynamics of affective states during complex learning" (2012): engagement (curious) and confusion feed each
# other, unresolved confusion turns into frustration, persistent frustration into boredom.
_MOVES = np.array(
    [
        [0.00, 0.60, 0.05, 0.35],
        [0.85, 0.00, 0.10, 0.05],
        [0.30, 0.35, 0.00, 0.35],
        [0.30, 0.10, 0.60, 0.00],
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModalityProcess:
    """Laws of one modality with K conditions; C is the number of classes."""

    start: NDArray[np.float64]
    """(C, K) probability of the first condition, given the class at that step."""
    step: NDArray[np.float64]
    """(C, K, K) probability of the next condition (last axis), given the class entered and the one left."""
    observed: NDArray[np.float64]
    """(K,) probability that a step is observed at all, in a session that has the modality."""
    means: NDArray[np.float64]
    """(C, K, SIGNAL_WIDTH) what is shown, before gain, projection and offset."""
    scales: NDArray[np.float64]
    """(K,) standard deviation of the noise on every feature."""
    correlation: float
    """rho, the correlation of the noise between neighbouring steps."""


def class_start() -> NDArray[np.float64]:
    """(dominant, C) probability of the first class."""
    count = len(CLASSES)
    start = np.full((count, count), (1 - _DOMINANT_START) / (count - 1))
    np.fill_diagonal(start, _DOMINANT_START)
    return start


def class_steps() -> NDArray[np.float64]:
    """(dominant, C, C) probability of the next class (last axis), given the present one.

    The dominant class is left more rarely than the others and entered more often than _MOVES says.
    """
    steps = np.empty((len(CLASSES), *_MOVES.shape))
    for dominant in range(len(CLASSES)):
        moves = _MOVES.copy()
        moves[:, dominant] *= _PULL
        stay = np.array(_OTHER_STAY)
        stay[dominant] = _DOMINANT_STAY
        steps[dominant] = (1 - stay)[:, None] * moves / moves.sum(axis=1, keepdims=True) + np.diag(stay)
    return steps


def _bursts(
    looks: NDArray[np.float64], *, onset: float, recovery: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``start`` and ``step`` of a condition that is clean or, until a burst ends, one degraded look.

    looks: (C, K - 1) probability of each degraded look for a burst that begins in that class.
    """
    classes, degraded = looks.shape
    share = onset / (onset + recovery)
    start = np.concatenate([np.full((classes, 1), 1 - share), share * looks], axis=1)
    step = np.zeros((classes, 1 + degraded, 1 + degraded))
    step[:, 0, 0] = 1 - onset
    step[:, 0, 1:] = onset * looks
    step[:, 1:, 0] = recovery
    step[:, 1:, 1:] = (1 - recovery) * np.eye(degraded)
    return start, step


def _signal(strength: float, prototypes: Mapping[str, tuple[float, float]]) -> NDArray[np.float64]:
    """(C, SIGNAL_WIDTH) of the clean classes, in the order of CLASSES."""
    return strength * np.array([(*prototypes[name], 0.0) for name in CLASSES])


def _audio() -> ModalityProcess:
    """A voice: curious and frustrated, equally aroused, sound the same. Degraded: noise on everything."""
    clean = _signal(
        1.0,
        {"confused": (0.0, 1.0), "curious": (1.0, -0.4), "bored": (-1.0, -0.4), "frustrated": (1.0, -0.4)},
    )
    start, step = _bursts(np.ones((len(CLASSES), 1)), onset=0.04, recovery=0.16)
    return ModalityProcess(
        start=start,
        step=step,
        observed=np.ones(2),
        means=np.stack([clean, clean], axis=1),
        scales=np.array([1.0, 2.5]),
        correlation=0.6,
    )


def _visual() -> ModalityProcess:
    """A face: confused and bored look much alike. Degraded: a stale picture of another class.

    The stale picture is paler than a live one and has a weak mark of its own, so it can be suspected but not
    proven.
    """
    clean = _signal(
        1.5,
        {"confused": (-0.6, -0.35), "curious": (1.0, -0.2), "bored": (-0.6, 0.05), "frustrated": (0.1, 1.0)},
    )
    count = len(CLASSES)
    stale = 0.8 * clean + np.array([0.0, 0.0, 1.0])
    start, step = _bursts((1 - np.eye(count)) / (count - 1), onset=0.04, recovery=0.16)
    return ModalityProcess(
        start=start,
        step=step,
        observed=np.ones(1 + count),
        means=np.concatenate([clean[:, None], np.broadcast_to(stale, (count, *stale.shape))], axis=1),
        scales=np.ones(1 + count),
        correlation=0.6,
    )


def _text() -> ModalityProcess:
    """Words: curious and bored learners speak alike. Degraded: filler words without content, or silence."""
    clean = _signal(
        1.0,
        {"confused": (1.0, 0.2), "curious": (-0.5, -0.5), "bored": (-0.5, -0.5), "frustrated": (-0.1, 1.0)},
    )
    start, step = _bursts(np.ones((len(CLASSES), 1)), onset=0.05, recovery=0.15)
    return ModalityProcess(
        start=start,
        step=step,
        observed=np.array([0.7, 0.3]),
        means=np.stack([clean, np.zeros_like(clean)], axis=1),
        scales=np.ones(2),
        correlation=0.4,
    )


PROCESSES: Mapping[str, ModalityProcess] = dict(zip(MODALITIES, (_audio(), _visual(), _text()), strict=True))
"""Modality -> its laws."""
