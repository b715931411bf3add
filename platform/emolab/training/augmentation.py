"""Training with missing modalities, reported apart from clean training (protocols, section 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from edu_emotionnet.batch import SessionBatch


def drop_steps(batch: SessionBatch, session_ids: Sequence[str], *, share: float, seed: int, epoch: int) -> SessionBatch:
    """Modality dropout after LNLN (NeurIPS 2024): a rate r ~ U(0, 1) per session and modality, redrawn every epoch.

    A ``share`` of the sessions is hit (0.5 in LNLN); each step of modality m is then missing with probability
    r_m. The draw is a function of (session id, modality, seed, epoch), not of the batch.
    """
    present = {name: mask.clone() for name, mask in batch.present.items()}
    for row, session_id in enumerate(session_ids):
        steps = int(batch.lengths[row])
        draw = _generator(session_id, "session", seed, epoch)
        if draw.random() >= share:
            continue
        for name, mask in present.items():
            stream = _generator(session_id, name, seed, epoch)
            kept = stream.random(steps) >= stream.random()
            mask[row, :steps] &= torch.from_numpy(kept)
    return replace(batch, present=present)


def add_noise(
    batch: SessionBatch,
    session_ids: Sequence[str],
    *,
    std: Mapping[str, Sequence[float]],
    largest: float,
    seed: int,
    epoch: int,
) -> SessionBatch:
    """Gaussian noise of k standard deviations on every feature, k ~ U(0, largest) per session and modality, redrawn
    every epoch. Keyed as ``drop_steps``."""
    features = {name: values.clone() for name, values in batch.features.items()}
    for row, session_id in enumerate(session_ids):
        steps = int(batch.lengths[row])
        for name, values in features.items():
            stream = _generator(session_id, f"noise-{name}", seed, epoch)
            noise = stream.normal(size=(steps, values.shape[2])) * np.asarray(std[name]) * (largest * stream.random())
            values[row, :steps] += torch.from_numpy(noise.astype(np.float32))
    return replace(batch, features=features)


def _generator(session_id: str, stream: str, seed: int, epoch: int) -> np.random.Generator:
    key = hashlib.blake2b(f"{session_id}/{stream}/{seed}/{epoch}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
