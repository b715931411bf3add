"""Speaker-independent splits: nobody is heard in training and scored in testing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from emolab.corpora.corpus import Split
from emolab.names import UserError

SHARES: dict[Split, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Of speakers: 35/5/10 of 50 in the paper (section V.A)."""


def split_by_speaker(speakers: Iterable[str], *, seed: int) -> dict[str, Split]:
    """Speaker -> split; a function of the set of speakers and the seed.

    Raises:
        UserError: fewer than three speakers, so that a split would be empty.
    """
    names = sorted(set(speakers))
    if len(names) < 3:
        raise UserError(f"a speaker-independent split needs at least 3 speakers, got {len(names)}")
    order = [names[i] for i in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    validation = max(1, round(SHARES["validation"] * len(names)))
    test = max(1, round(SHARES["test"] * len(names)))
    train = len(names) - validation - test
    return {
        name: "train" if i < train else "validation" if i < train + validation else "test"
        for i, name in enumerate(order)
    }
