"""Any split but the test split, for those who evaluate models; training and tuning cannot reach this module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.sessions.loading import SessionStore, load_split
from emolab.sessions.manifest import Manifest

SplitLoader = Callable[[Path, Manifest, Split], SessionStore]
"""How whoever evaluates reads a split: as ``load_selection_split`` does, or with leave to open the test split."""


def load_selection_split(folder: Path, manifest: Manifest, split: Split) -> SessionStore:
    """Sessions of a split that models may be chosen by.

    Raises:
        UserError: the split is the test split, which only a robustness study opens, and records it.
    """
    if split == "test":
        raise UserError("the test split is opened by a robustness study alone, which records it")
    return load_split(folder, manifest, split)
