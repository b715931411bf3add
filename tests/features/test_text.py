"""BERT features against transformers called directly on the same tokens, with a real encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.features.media_files import bert_folder, real_media

from emolab.features.grid import Word
from emolab.features.text import TOKENS, TextExtractor, TextSettings, steps_of_word
from emolab.features.transcripts import read_words


@pytest.fixture(scope="module")
def chosen() -> TextSettings:
    return TextSettings(model=str(bert_folder()))


@pytest.fixture(scope="module")
def extractor(chosen: TextSettings) -> TextExtractor:
    return chosen.build()


def transformers_states(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(n, D) states of a sentence's tokens without special ones, and the tokens, by the library alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert_folder())
    tokens = tokenizer(" ".join(texts), padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(bert_folder()).eval()(**tokens).last_hidden_state[0].numpy()
    count = int(tokens["attention_mask"].sum())
    return states[1 : count - 1], tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])[1 : count - 1]


def test_features_of_a_real_transcript_are_the_librarys(extractor: TextExtractor) -> None:
    words = read_words(real_media() / "speech" / "sense_and_sensibility_01_austen_64kb-0870.json")
    features, present = extractor(words, 1.0)
    states, tokens = transformers_states([word.text for word in words])
    at = -1
    sums, counts = np.zeros((len(features), states.shape[1])), np.zeros(len(features))
    for state, token in zip(states, tokens, strict=True):
        at += not token.startswith("##")
        step = int((words[at].start + words[at].end) / 2)
        sums[step] += state
        counts[step] += 1
    assert at == len(words) - 1
    assert present.tolist() == (counts > 0).tolist()
    np.testing.assert_allclose(features[present], (sums / counts[:, None])[present], atol=1e-5)


def test_a_long_transcript_is_read_window_by_window(extractor: TextExtractor) -> None:
    pieces = len(transformers_states(["unquestionably"])[0])
    fitting = (TOKENS - 2) // pieces  # whole words per window
    assert pieces > 1
    texts = ["unquestionably"] * (2 * fitting + 3)
    features, present = extractor([Word(i + 0.1, i + 0.9, text) for i, text in enumerate(texts)], 1.0)
    assert present.tolist() == [True] * len(texts)
    for first in range(0, len(texts), fitting):
        states, _ = transformers_states(texts[first : first + fitting])
        expected = states.reshape(-1, pieces, states.shape[1]).mean(axis=1)
        np.testing.assert_allclose(features[first : first + fitting], expected, atol=1e-5)


def test_truncation_as_in_the_paper_is_selectable(chosen: TextSettings) -> None:
    words = [Word(i, i + 1, "word") for i in range(200)]
    literal = TextSettings(model=chosen.model, long_transcripts="truncate").build()
    features, present = literal(words, 1.0)
    assert present.sum() == len(present) == TOKENS - 2
    np.testing.assert_array_equal(features, chosen.build()(words, 1.0)[0][: TOKENS - 2])


def test_silence_blank_words_and_a_monster_word(extractor: TextExtractor) -> None:
    assert extractor([], 1.0)[0].shape == (0, 384)
    assert extractor([Word(0.0, 1.0, "  ")], 1.0)[1].shape == (0,)
    features, present = extractor([Word(0.0, 1.0, "a"), Word(1.0, 2.0, "xq" * 400), Word(2.0, 3.0, "b")], 1.0)
    assert present.tolist() == [True, True, True]
    assert np.isfinite(features).all()


@given(
    st.floats(0, 1000).map(lambda t: round(t, 3)),
    st.floats(0, 20).map(lambda t: round(t, 3)),
    st.sampled_from([0.1, 0.5, 1.0, 3.0]),
)
@settings(max_examples=100, deadline=None)
def test_a_word_counts_where_its_middle_lies_and_where_it_covers_a_middle(
    start: float, length: float, step_seconds: float
) -> None:
    steps = steps_of_word(Word(start, start + length, "x"), step_seconds)
    assert list(steps) == list(range(steps[0], steps[-1] + 1)), "no hole"
    middle = start + length / 2
    assert any(step * step_seconds - 1e-5 <= middle <= (step + 1) * step_seconds + 1e-5 for step in steps)
    for step in steps:
        at = (step + 0.5) * step_seconds
        own = step * step_seconds - 1e-5 <= middle <= (step + 1) * step_seconds + 1e-5
        assert own or start - 1e-6 <= at <= start + length + 1e-6
    covered = [
        t for t in range(int((start + length) / step_seconds) + 2) if start < (t + 0.5) * step_seconds < start + length
    ]
    assert set(covered) <= set(steps)


def test_it_says_what_it_was_made_with(chosen: TextSettings, extractor: TextExtractor) -> None:
    said = chosen.provenance()
    assert (said["extractor"], said["tokens"], said["long_transcripts"]) == ("bert", 128, "windows")
    assert set(said["sha256"]) >= {"model.safetensors", "config.json", "tokenizer.json", "vocab.txt"}
    assert chosen.width == extractor.width == 384
