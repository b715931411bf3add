"""A corpus in a module of its own: the processes that write it import this one, and not a registry and PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tests.conftest import ToyCorpus

from emolab.corpora.corpus import SessionReference
from emolab.sessions.schema import Session


@dataclass(frozen=True, kw_only=True)
class TwoSignals(ToyCorpus):
    """Audio tells the class clearly, visual a little less so, text not at all."""

    def load(self, reference: SessionReference) -> Session:
        session = super().load(reference)
        generator = np.random.default_rng([self.seed, 1, int(reference.session_id[1:])])
        truth = np.rint(np.clip(session.features["audio"][:, 0] / 5.0, 0, 2)).astype(np.int64)
        session.features["visual"][:, 0] += 3.0 * np.where(session.labels >= 0, session.labels, truth)
        session.features["audio"][:, 0] += generator.normal(size=session.num_steps) * 0.5
        return session
