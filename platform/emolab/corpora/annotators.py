"""Several annotators: majority vote, and how far they agree beyond chance.

Judgements are integers: (items, annotators), the class given by each annotator to each item, -1 where an annotator
did not judge it. An item is whatever was judged: an utterance, a clip, a step of a session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.features.grid import step_labels

NOT_JUDGED = -1

Judgements = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Chance-corrected agreement: Cohen's kappa for two annotators, Fleiss' kappa for more."""

    statistic: Literal["cohen_kappa", "fleiss_kappa"]
    kappa: float | None
    """None where it is undefined: nobody ever used a second class."""
    per_class: Mapping[str, float | None]
    """The same statistic for each class against all others."""
    annotators: int
    items: int
    """Items that the statistic is taken over."""
    items_left_out: int
    """Items judged by too few, or (Fleiss' kappa needs one number for all) by another number of annotators."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judgement_matrix(votes: Mapping[str, Mapping[str, str]], classes: Sequence[str]) -> Judgements:
    """(items, annotators) of item -> annotator -> class; items in their order, annotators sorted by name."""
    names = sorted({annotator for given in votes.values() for annotator in given})
    places, columns = {name: place for place, name in enumerate(classes)}, {name: i for i, name in enumerate(names)}
    judged = np.full((len(votes), len(names)), NOT_JUDGED, dtype=np.int64)
    for item, given in enumerate(votes.values()):
        for annotator, label in given.items():
            judged[item, columns[annotator]] = places[label]
    return judged


def judgements_per_step(
    spans: Mapping[str, Sequence[tuple[float, float, int]]], *, steps: int, seconds: float, step_seconds: float
) -> Judgements:
    """(T, annotators) of each annotator's (start s, end s, class) spans; see ``features.grid.step_labels``.

    Annotators are sorted by name.
    """
    judged = [
        step_labels(spans[annotator], steps=steps, seconds=seconds, step_seconds=step_seconds)
        for annotator in sorted(spans)
    ]
    matrix = np.stack(judged, axis=1) if judged else np.empty((steps, 0), dtype=np.int64)
    return np.where(matrix == IGNORED_LABEL, NOT_JUDGED, matrix)


def majority(judged: Judgements, classes: int) -> tuple[NDArray[np.int64], int]:
    """(items,) class with the most votes, and the number of ties.

    An item whose first place is shared is unlabelled (-100) and counts as a tie; one that nobody judged is
    unlabelled and does not.
    """
    counts = _counts(judged, classes)
    most = counts.max(axis=1, initial=0)
    first = (counts == most[:, None]) & (counts > 0)
    tied = first.sum(axis=1) > 1
    return np.where(tied | (most == 0), IGNORED_LABEL, counts.argmax(axis=1)), int(tied.sum())


def agreement(judged: Judgements, classes: Sequence[str]) -> Agreement | None:
    """Cohen's kappa over the items that both of two annotators judged; Fleiss' for more than two annotators.

    Fleiss' kappa (Psychological Bulletin 76(5), 1971) is defined for a constant number of judgements per item, so it
    is taken over the items with the most frequent number of judgements, of equals the larger. Different items may
    have been judged by different annotators.

    Returns:
        None where no item was judged twice.
    """
    judged = judged[:, (judged != NOT_JUDGED).any(axis=0)]
    per_item = (judged != NOT_JUDGED).sum(axis=1)
    repeated = per_item[per_item >= 2]
    if not len(repeated):
        return None
    frequency = np.bincount(repeated)
    number = int(len(frequency) - 1 - np.argmax(frequency[::-1]))
    chosen = judged[per_item == number]
    two = judged.shape[1] == 2
    statistic = cohen_kappa if two else fleiss_kappa
    return Agreement(
        statistic="cohen_kappa" if two else "fleiss_kappa",
        kappa=statistic(chosen),
        per_class={name: statistic(_against_others(chosen, place)) for place, name in enumerate(classes)},
        annotators=judged.shape[1],
        items=len(chosen),
        items_left_out=len(judged) - len(chosen),
    )


def cohen_kappa(judged: Judgements) -> float | None:
    """Cohen's kappa of (items, 2) judgements, none missing; None where only one class was ever given."""
    if len(np.unique(judged)) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score  # takes a second to import, and few jobs need it

    return float(cohen_kappa_score(judged[:, 0], judged[:, 1]))


def fleiss_kappa(judged: Judgements) -> float | None:
    """Fleiss' kappa of (items, annotators) judgements, equally many per item; None where only one class was given."""
    counts = _counts(judged, int(judged.max(initial=0)) + 1).astype(np.float64)
    number = counts[0].sum()
    observed = ((np.square(counts).sum(axis=1) - number) / (number * (number - 1))).mean()
    expected = np.square(counts.sum(axis=0) / counts.sum()).sum()
    return None if np.count_nonzero(counts.sum(axis=0)) < 2 else float((observed - expected) / (1 - expected))


def _against_others(judged: Judgements, place: int) -> Judgements:
    return np.where(judged == NOT_JUDGED, NOT_JUDGED, (judged == place).astype(np.int64))


def _counts(judged: Judgements, classes: int) -> NDArray[np.int64]:
    """(items, classes) how many annotators gave each class."""
    return np.stack([(judged == place).sum(axis=1) for place in range(classes)], axis=1, dtype=np.int64)
