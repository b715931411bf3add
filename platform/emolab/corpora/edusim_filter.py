"""The exact filter of EduSim: class probabilities given all that was observed so far, knowing the generator.

A forward algorithm over the joint hidden state: dominant class, class, and the condition of every modality.
No predictor that works step by step, without looking ahead, is right more often on average.

Axes below: B sessions, T steps, S joint states of class and conditions, Q = C * K states of class and one
modality's condition, L dominant classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.edusim_process import CLASSES, PROCESSES, ModalityProcess, class_start, class_steps
from emolab.sessions.schema import Session

Array = NDArray[np.float64]
SpeakerMeans = Callable[[str, str], Array]
"""(speaker id, modality) -> (C, K, D): what that speaker shows without noise, by class and condition."""

_SESSIONS_AT_ONCE = 32
"""Bounds the memory of one pass to about 50 MB at 64 features and 40 steps."""


def class_posteriors(
    sessions: Sequence[Session], means: SpeakerMeans, *, modalities: Sequence[str] = MODALITIES
) -> list[Array]:
    """Per session, (T, C) class probabilities at each step given the modalities named, up to that step."""
    posteriors: list[Array] = []
    for begin in range(0, len(sessions), _SESSIONS_AT_ONCE):
        posteriors += _forward(sessions[begin : begin + _SESSIONS_AT_ONCE], means, modalities)
    return posteriors


def _forward(sessions: Sequence[Session], means: SpeakerMeans, modalities: Sequence[str]) -> list[Array]:
    counts = [len(CLASSES), *(len(PROCESSES[name].scales) for name in modalities)]
    state_class, *conditions = np.indices(counts).reshape(len(counts), -1)
    log_start, log_step = _condition_laws(state_class, conditions, modalities)
    indices = [
        state_class * len(PROCESSES[name].scales) + condition
        for name, condition in zip(modalities, conditions, strict=True)
    ]
    evidence = [_pair_evidence(sessions, name, means) for name in modalities]
    steps = max(session.num_steps for session in sessions)

    # (B, L, S) log joint probability of the hidden state and everything observed so far, up to a constant per
    # session
    log_joint = log_start + np.log(class_start())[:, state_class]
    log_joint = np.broadcast_to(log_joint, (len(sessions), *log_joint.shape))
    results = np.empty((len(sessions), steps, len(CLASSES)))
    for step in range(steps):
        pairs = np.zeros((len(sessions), 1, 1))
        for values, index in zip(evidence, indices, strict=True):
            pairs = pairs + values[:, step][:, index[:, None], index[None, :]]
        if step == 0:
            # no earlier step: the evidence is the same in every row, so any one row will do
            log_joint = log_joint + (pairs[:, :1] if modalities else pairs)
        else:
            log_joint = _advance(log_joint, pairs + log_step)
        log_joint = log_joint - log_joint.max(axis=(1, 2), keepdims=True)
        by_class = np.exp(log_joint).sum(axis=1).reshape(len(sessions), len(CLASSES), -1).sum(axis=2)
        results[:, step] = by_class / by_class.sum(axis=1, keepdims=True)
    return [result[: session.num_steps] for result, session in zip(results, sessions, strict=True)]


def _condition_laws(
    state_class: NDArray[np.int64], conditions: Sequence[NDArray[np.int64]], modalities: Sequence[str]
) -> tuple[Array, Array]:
    """(S,) and (S, S): log probability of the first conditions, and of the next given the class entered."""
    log_start = np.zeros(len(state_class))
    log_step = np.zeros((len(state_class), len(state_class)))
    with np.errstate(divide="ignore"):  # some conditions exclude each other: log 0 is meant
        for name, condition in zip(modalities, conditions, strict=True):
            process = PROCESSES[name]
            log_start += np.log(process.start[state_class, condition])
            log_step += np.log(process.step[state_class[None, :], condition[:, None], condition[None, :]])
    return log_start, log_step


def _advance(log_joint: Array, log_pairs: Array) -> Array:
    """One step of the chain: (B, L, S) log joint and (B, S, S) log weights from state to state -> (B, L, S).

    Exponentials are taken relative to the largest term of each state *entered*, so that nothing which matters
    underflows however far apart the likelihoods are. Class transitions, the only ones that depend on the
    dominant class, are applied to the C x C blocks.
    """
    sessions, dominants, states = log_joint.shape
    classes = len(CLASSES)
    best = log_joint.max(axis=1)  # (B, S)
    relative = np.exp(log_joint - np.where(np.isneginf(best), 0.0, best)[:, None])
    weights = log_pairs + best[:, :, None]
    peak = weights.max(axis=1)  # (B, S) of the states entered
    weights = np.exp(weights - np.where(np.isneginf(peak), 0.0, peak)[:, None])
    # sum over the conditions left, separately for every class left: (B, C, L, rest) @ (B, C, rest, S)
    left = relative.reshape(sessions, dominants, classes, -1).swapaxes(1, 2)
    blocks = left @ weights.reshape(sessions, classes, states // classes, states)
    blocks = blocks.reshape(sessions, classes, dominants, classes, -1)
    entered = np.einsum("bcldr,lcd->bldr", blocks, class_steps()).reshape(sessions, dominants, states)
    with np.errstate(divide="ignore"):
        return np.log(entered) + peak[:, None]


def _pair_evidence(sessions: Sequence[Session], modality: str, means: SpeakerMeans) -> Array:
    """(B, T, Q, Q): log likelihood of an observation given its states at the step before and at this one.

    Constants shared by all states are dropped. Zero throughout a session that lacks the modality: whether it
    is recorded at all is independent of the class, and so are its conditions as long as nothing was observed.
    """
    process = PROCESSES[modality]
    features, present = _padded(sessions, modality)
    speaker = np.stack([means(session.speaker_id, modality) for session in sessions])
    scales = np.tile(process.scales, len(CLASSES))  # (Q,)
    flat = speaker.reshape(len(sessions), 1, len(scales), -1)
    noise = (features[:, :, None] - flat) / scales[:, None]  # (B, T, Q, D)
    evidence = _log_density(noise, present, scales, process)
    observed = np.tile(process.observed, len(CLASSES))
    with np.errstate(divide="ignore"):
        absent = np.log(1 - observed)
    evidence = np.where(present[:, :, None, None], evidence + np.log(observed), absent)
    real = np.arange(present.shape[1]) < np.array([[session.num_steps] for session in sessions])
    recorded = present.any(axis=1, keepdims=True)
    return np.where((real & recorded)[:, :, None, None], evidence, 0.0)


def _log_density(noise: Array, present: NDArray[np.bool_], scales: Array, process: ModalityProcess) -> Array:
    """(B, T, Q, Q) log density of (B, T, Q, D) noise given the step before, stationary after a gap."""
    width, rho = noise.shape[-1], process.correlation
    squares = np.square(noise).sum(axis=-1)  # (B, T, Q)
    volume = width * np.log(scales)
    alone = np.broadcast_to((-squares / 2 - volume)[:, :, None, :], (*squares.shape, len(scales)))
    cross = noise[:, :-1] @ noise[:, 1:].swapaxes(-1, -2)  # (B, T-1, Q, Q)
    innovation = squares[:, 1:, None, :] - 2 * rho * cross + rho**2 * squares[:, :-1, :, None]
    spread = 1 - rho**2
    after = -innovation / (2 * spread) - width / 2 * np.log(spread) - volume
    continues = (present[:, 1:] & present[:, :-1])[:, :, None, None]
    return np.concatenate([alone[:, :1], np.where(continues, after, alone[:, 1:])], axis=1)


def _padded(sessions: Sequence[Session], modality: str) -> tuple[Array, NDArray[np.bool_]]:
    """(B, T, D) features and (B, T) presence, zero and absent behind the end of shorter sessions."""
    steps = max(session.num_steps for session in sessions)
    width = sessions[0].features[modality].shape[1]
    features = np.zeros((len(sessions), steps, width))
    present = np.zeros((len(sessions), steps), dtype=np.bool_)
    for row, session in enumerate(sessions):
        features[row, : session.num_steps] = session.features[modality]
        present[row, : session.num_steps] = session.present[modality]
    return features, present
