"""From sessions to what the engine reads: one padded clean batch, and every variant of it once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.robustness.corruptions.catalog import corruption
from emolab.robustness.corruptions.observed import CLEAN, Observed, Surroundings, Variant, corrupt, group_of
from emolab.robustness.factorised import ModalityInput
from emolab.sessions.schema import Session


def clean_batch(sessions: Sequence[Session]) -> SessionBatch:
    """The sessions padded to the longest, on the CPU."""
    steps = max(session.num_steps for session in sessions)
    labels = np.full((len(sessions), steps), IGNORED_LABEL, dtype=np.int64)
    for row, session in enumerate(sessions):
        labels[row, : session.num_steps] = session.labels
    inputs = {
        name: _padded([_observed(s, name) for s in sessions], steps) for name in group_of([*sessions[0].features])
    }
    return SessionBatch(
        features={name: value.features for name, value in inputs.items()},
        present={name: value.present for name, value in inputs.items()},
        lengths=torch.tensor([session.num_steps for session in sessions]),
        labels=torch.from_numpy(labels),
    )


def build_variants(
    sessions: Sequence[Session],
    batch: SessionBatch,
    variants: Iterable[Variant],
    surroundings: Surroundings | None = None,
) -> dict[Variant, ModalityInput]:
    """Every variant of the batch, on the batch's device.

    A corruption that only hides steps keeps the batch's own feature tensor, since models do not read what is
    hidden; the engine then projects these features once for all such variants.

    Raises:
        UserError: as ``corrupt`` does.
    """
    steps, device = batch.labels.shape[1], batch.labels.device
    built = {}
    for variant in variants:
        name = variant.modality
        observed = [corrupt(session, variant, surroundings) for session in sessions]
        if variant.corruption == CLEAN or corruption(variant.corruption).fill == "zero":
            present = _padded_presence([value.present for value in observed], steps).to(device)
            built[variant] = ModalityInput(features=batch.features[name], present=present)
        else:
            value = _padded(observed, steps)
            built[variant] = ModalityInput(features=value.features.to(device), present=value.present.to(device))
    return built


def _observed(session: Session, name: str) -> Observed:
    return Observed(features=session.features[name], present=session.present[name])


def _padded(observed: Sequence[Observed], steps: int) -> ModalityInput:
    features = np.zeros((len(observed), steps, observed[0].features.shape[1]), dtype=np.float32)
    for row, value in enumerate(observed):
        features[row, : len(value.features)] = value.features
    present = _padded_presence([value.present for value in observed], steps)
    return ModalityInput(features=torch.from_numpy(features), present=present)


def _padded_presence(present: Sequence[NDArray[np.bool_]], steps: int) -> torch.Tensor:
    padded = np.zeros((len(present), steps), dtype=np.bool_)
    for row, value in enumerate(present):
        padded[row, : len(value)] = value
    return torch.from_numpy(padded)
