"""Speaker-independent splits: nobody is heard in training and scored in testing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from emolab.corpora.corpus import SPLITS, SessionReference, Split
from emolab.names import UserError
from emolab.sessions.protocol import Protocol
from emolab.sessions.shards import claim_session

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


def assign_splits(
    references: Sequence[SessionReference], *, seed: int, protocol: Protocol | None = None
) -> dict[Split, list[SessionReference]]:
    """Published splits where the corpus has them and the protocol keeps them, otherwise 70/10/20 % of the speakers.

    Raises:
        UserError: a session id twice, or a speaker in two splits.
    """
    ignored = protocol is not None and protocol.split == "speakers"
    published = not ignored and all(reference.published_split is not None for reference in references)
    chosen = {} if published else split_by_speaker([r.speaker_id for r in references], seed=seed)
    seen: dict[str, str] = {}
    speakers: dict[str, str] = {}
    splits: dict[Split, list[SessionReference]] = {split: [] for split in SPLITS}
    for reference in references:
        own = None if ignored else reference.published_split
        split = own or chosen[reference.speaker_id]
        claim_session(reference.session_id, reference.speaker_id, split, seen, speakers)
        splits[split].append(reference)
    return splits
