"""Every corpus by name. A module of this package that defines a corpus is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
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
    for module in _modules():
        importlib.import_module(f"emolab.corpora.{module.name}")
    return dict(sorted(_CORPORA.items()))


def corpus_names() -> list[str]:
    """The names of all corpora, none of which is imported: a module that registers one has its name."""
    (folder,) = emolab.corpora.__path__
    sources = {module.name: Path(folder) / f"{module.name}.py" for module in _modules()}
    registering = [name for name, path in sources.items() if "\n@register\n" in path.read_text(encoding="utf-8")]
    return sorted({*registering, *_CORPORA})


def _modules() -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(emolab.corpora.__path__)


def corpus_class(name: str) -> type[Corpus]:
    """The class of a corpus.

    Raises:
        UserError: no such corpus.
    """
    known = corpus_names()
    if name not in known:
        raise UserError(f"unknown corpus {name!r}{nearest(name, known)} (corpora: {', '.join(known)})")
    if name not in _CORPORA:
        importlib.import_module(f"emolab.corpora.{name}")  # it alone: all of them take seconds
    return _CORPORA[name]
