"""What a process of a sweep does: it holds the sessions and a model, and leaves a file for every unit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.robustness.cells import Cell
from emolab.robustness.corruptions.observed import Surroundings, choose_donor
from emolab.robustness.engine import INEXACT, best_engine
from emolab.robustness.metrics import weight_quality_correlation
from emolab.robustness.records import write_agreement, write_tally
from emolab.robustness.sweep_plan import Unit
from emolab.robustness.tally import evaluate_sessions
from emolab.sessions.loading import SessionStore
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.selection import SplitLoader
from emolab.training.train import load_model

SESSIONS_PER_BATCH = 16


class Evaluator:
    """Holds the sessions and the model at hand, and computes one unit after another."""

    def __init__(self, data: Path, split: Split, folder: Path, load: SplitLoader, device: str) -> None:
        torch.set_num_threads(1)
        self.folder, self.device, self.manifest = folder, device, read_manifest(data)
        self.store = load(data, self.manifest, split)
        self.surroundings = surroundings_of(self.store, self.manifest)
        self.model: tuple[Path, nn.Module] | None = None

    def work(self, unit: Unit, model: Path, cells: Sequence[Cell], *, bfloat16: bool) -> None:
        """Compute a unit and write its file."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "the cluster gave a GPU that PyTorch cannot use there: `emolab` says what it finds; or gpus=0"
            )
        if self.model is None or self.model[0] != model:  # units come model by model
            self.model = (model, load_model(model)[0].to(self.device))
        if not cells:
            found = agreement(self.model[1], self.store, self.manifest, device=self.device)
            write_agreement(self.folder / unit.file, found)
            return
        sessions = [self.store.session(index, self.manifest) for index in unit.sessions]
        batches = [
            sessions[first : first + SESSIONS_PER_BATCH] for first in range(0, len(sessions), SESSIONS_PER_BATCH)
        ]
        engine = best_engine(self.model[1])
        if engine == "factorised" and bfloat16:
            engine = INEXACT
        tally = evaluate_sessions(
            self.model[1], batches, cells, surroundings=self.surroundings, device=self.device, engine=engine
        )
        write_tally(self.folder / unit.file, tally)


def surroundings_of(store: SessionStore, manifest: Manifest) -> Surroundings:
    """Training statistics, and donors out of the sessions that are evaluated."""
    ids = sorted(store.session_ids)
    position = {name: index for index, name in enumerate(store.session_ids)}
    return Surroundings(
        std={name: np.asarray(values) for name, values in manifest.statistics.std.items()},
        donor=lambda session_id, seed: store.session(position[choose_donor(session_id, seed, ids)], manifest),
    )


@torch.no_grad()
def agreement(
    model: nn.Module, store: SessionStore, manifest: Manifest, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Modality -> Spearman correlation of its weight with its true quality, over the clean steps at which it was
    observed; empty where the model has no weights or the corpus does not know the quality."""
    weights: dict[str, list[Any]] = {name: [] for name in manifest.dimensions}
    qualities: dict[str, list[Any]] = {name: [] for name in manifest.dimensions}
    for index in range(len(store)):
        session = store.session(index, manifest)
        confidence = model(store.batch([index]).to(device)).confidence
        if confidence is None or not session.quality:
            return {}
        for column, name in enumerate(session.features):
            seen = session.present[name]
            weights[name].append(confidence[0, :, column].cpu().numpy()[seen])
            qualities[name].append(session.quality[name][seen])
    return {
        name: weight_quality_correlation(np.concatenate(weights[name]), np.concatenate(qualities[name]))
        for name in weights
    }
