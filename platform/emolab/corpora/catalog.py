"""Every corpus by name. A module of this package that defines a corpus is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

import emolab.corpora
from emolab.corpora.corpus import Corpus
from emolab.names import UserError, nearest

Registered = TypeVar("Registered", bound=Corpus)

_CORPORA: dict[str, type[Corpus]] = {}


def register(corpus: type[Registered]) -> type[Registered]:
    """Class decorator: offer a corpus, a frozen keyword-only dataclass of its options, under its ``name``."""
    if corpus.name in _CORPORA:
        raise ValueError(f"corpus {corpus.name!r} is registered twice")
    _CORPORA[corpus.name] = corpus
    return corpus


def corpora() -> dict[str, type[Corpus]]:
    """Name -> class of every corpus."""
    for module in pkgutil.iter_modules(emolab.corpora.__path__):
        importlib.import_module(f"emolab.corpora.{module.name}")
    return dict(sorted(_CORPORA.items()))


def corpus_class(name: str) -> type[Corpus]:
    """The class of a corpus.

    Raises:
        UserError: no such corpus.
    """
    known = corpora()
    if name not in known:
        raise UserError(f"unknown corpus {name!r}{nearest(name, known)} (corpora: {', '.join(known)})")
    return known[name]
