"""The contract of ``Corpus``, held by every registered corpus.

A corpus that needs a folder is tested where the folder is: named by EMOLAB_<NAME>, or ../shared/data/<name>
beside the repository; or on a small copy of its published layout that the tests write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tests.corpora import published_layouts, recorded_layouts, test_mosi
from tests.features.media_files import rendered_media

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.catalog import corpora, corpus_names
from emolab.corpora.corpus import SPLITS, Corpus, RefusedSessionError, SessionReference
from emolab.names import checked_name
from emolab.sessions.schema import Session, to_row

SMALL: dict[str, dict[str, Any]] = {"edusim": {"sessions": 40, "speakers": 7, "mean_steps": 8}}
"""Options that keep a generated corpus quick to list and load."""


def mosi_layout(folder: Path) -> dict[str, Any]:
    return {"source": str(test_mosi.write_folder(folder)), "validation_videos": 1}


LAYOUTS = published_layouts.FIXTURES | recorded_layouts.FIXTURES | {"media": rendered_media, "mosi": mosi_layout}
"""Corpora of which the tests write a small copy; EMOLAB_<NAME> still names a real one."""
_COPIES = tempfile.TemporaryDirectory(prefix="layouts-", ignore_cleanup_errors=True)


def test_every_corpus_is_named_as_its_module() -> None:
    """By which one is found without importing the others."""
    assert corpus_names() == list(corpora())


every_corpus = pytest.mark.parametrize("name", sorted(corpora()))


def build(name: str) -> Corpus:
    """A fresh instance; skips where the corpus's source folder is absent."""
    kind: Any = corpora()[name]
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    options = dict(SMALL.get(name, {}))
    if required & {"source", "manifest"}:
        beside = Path(__file__).parents[3] / "shared" / "data" / name
        there = f"EMOLAB_{name.upper()}" in os.environ or (required == {"source"} and beside.is_dir())
        if name in LAYOUTS and not there:
            return TypeAdapter(kind).validate_python(options | small_copy(name))
        folder = Path(os.environ.get(f"EMOLAB_{name.upper()}", beside))
        if not folder.is_dir():
            pytest.skip(f"corpus {name}: no folder at EMOLAB_{name.upper()} or ../shared/data/{name}")
        options["source"] = str(folder)
    assert required <= set(options), f"name options for {required - set(options)} of corpus {name} in SMALL"
    return kind(**options)


@lru_cache(maxsize=16)
def small_copy(name: str) -> dict[str, Any]:
    """Writes a copy of a published layout; options that read it."""
    return LAYOUTS[name](Path(_COPIES.name) / name)


@lru_cache(maxsize=16)
def shared(name: str) -> Corpus:
    return build(name)


@lru_cache(maxsize=16)
def readable(name: str) -> list[SessionReference]:
    """Sessions that are not refused; a corpus may refuse some (a listed clip that is not there), never most."""
    corpus, found = shared(name), []
    for reference in corpus.references():
        with contextlib.suppress(RefusedSessionError):
            corpus.load(reference)
            found.append(reference)
    assert 2 * len(found) > len(corpus.references())
    return found


def content(session: Session) -> bytes:
    """Every value that a shard stores."""
    row = to_row(session)
    return repr([(key, np.asarray(row[key]).tobytes()) for key in sorted(row)]).encode()


@every_corpus
def test_describes_itself(name: str) -> None:
    corpus = build(name)
    assert corpus.name == name == checked_name(name, what="corpus")
    assert len(corpus.classes) >= 2
    assert len(set(corpus.classes)) == len(corpus.classes)
    assert list(corpus.dimensions) == [each for each in MODALITIES if each in corpus.dimensions]
    assert corpus.dimensions
    assert all(width > 0 for width in corpus.dimensions.values())
    assert json.loads(json.dumps(corpus.provenance())), "provenance must say where the features come from"


@every_corpus
def test_instances_travel_as_options_not_data(name: str) -> None:
    corpus = build(name)
    corpus.load(corpus.references()[0])
    sent = pickle.dumps(corpus)
    assert len(sent) < 4096
    assert pickle.loads(sent) == corpus


@every_corpus
def test_references_are_complete_and_stable(name: str) -> None:
    references = build(name).references()
    assert list(references) == list(build(name).references())
    assert len({each.session_id for each in references}) == len(references) > 0
    for each in references:
        checked_name(each.session_id, what="session")
        checked_name(each.speaker_id, what="speaker")
        assert each.published_split is None or each.published_split in SPLITS


@every_corpus
def test_published_splits_share_no_speaker(name: str) -> None:
    splits: dict[str, set[str | None]] = {}
    for each in build(name).references():
        splits.setdefault(each.speaker_id, set()).add(each.published_split)
    assert all(len(found) == 1 for found in splits.values())


@every_corpus
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_sessions_are_valid(name: str, data: st.DataObject) -> None:
    corpus = shared(name)
    reference = data.draw(st.sampled_from(readable(name)))
    session = corpus.load(reference)
    session.check(classes=len(corpus.classes))
    assert (session.session_id, session.speaker_id) == (reference.session_id, reference.speaker_id)
    assert session.corpus == name
    assert math.isfinite(session.step_seconds)
    assert session.step_seconds > 0
    assert session.labels.dtype == np.int64
    assert {key: values.shape[1] for key, values in session.features.items()} == dict(corpus.dimensions)
    for key in corpus.dimensions:
        assert session.features[key].dtype == np.float32
        assert session.present[key].dtype == np.bool_
    assert set(session.quality) == (set(corpus.dimensions) if corpus.has_quality else set())
    for values in session.quality.values():
        assert values.dtype == np.float32
        assert values.shape == session.labels.shape
        assert ((values >= 0) & (values <= 1)).all()


@every_corpus
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_loading_does_not_depend_on_what_was_loaded_before(name: str, data: st.DataObject) -> None:
    corpus = shared(name)
    chosen = data.draw(st.lists(st.sampled_from(readable(name)), min_size=2, max_size=6, unique=True))
    forwards = {each.session_id: content(corpus.load(each)) for each in chosen}
    np.random.seed(data.draw(st.integers(0, 9)))  # a global stream must not matter
    fresh = build(name)
    backwards = {each.session_id: content(fresh.load(each)) for each in reversed(chosen)}
    assert forwards == backwards


@every_corpus
def test_callers_cannot_spoil_a_session_for_each_other(name: str) -> None:
    corpus = build(name)
    reference = corpus.references()[0]
    first = corpus.load(reference)
    before = content(first)
    for values in (*first.features.values(), first.labels):
        values[:] = 0
    assert content(corpus.load(reference)) == before


@every_corpus
def test_reference_scores_are_numbers(name: str) -> None:
    corpus = build(name)
    for split in SPLITS:
        references = [each for each in corpus.references() if each.published_split in (split, None)]
        scores = corpus.reference_scores(split, references)
        assert scores == corpus.reference_scores(split, references)
        for key, value in scores.items():
            assert isinstance(value, float), key
            assert math.isfinite(value), key
            if key.endswith(("_accuracy", "_f1")):
                assert 0 <= value <= 1, key
        assert corpus.reference_scores(split, []) == {}
