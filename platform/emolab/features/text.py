"""Features of words: the embeddings that a BERT (Devlin et al. 2019) gives them in their sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from emolab.configuration import Settings
from emolab.features.grid import StepMeans, Word, steps_of
from emolab.features.weights import (
    ModelName,
    Weights,
    device,
    find_model,
    hidden_size,
    load_transformer,
    said,
    versions,
)
from emolab.names import UserError

TOKENS = 128
"""Length to which a window of tokens is padded (section IV of the paper)."""
_WINDOWS_AT_A_TIME = 8


class TextSettings(Settings):
    """How words become features."""

    extractor: Literal["bert", "none"] = Field(default="bert", description="none leaves the words out")
    model: ModelName = Field(
        default="google-bert/bert-base-uncased",
        validate_default=True,
        description="a folder or a name in the hub cache",
    )
    revision: str | None = Field(default=None, description="of a name in the hub cache; null: main")
    long_transcripts: Literal["windows", "truncate"] = Field(
        default="windows", description="after 128 tokens: begin another window, or drop the rest"
    )

    @property
    def used(self) -> bool:
        return self.extractor != "none"

    @property
    def uses_gpu(self) -> bool:
        return self.used

    @property
    def width(self) -> int:
        """Features per step."""
        return hidden_size(self._weights())

    def build(self) -> TextExtractor:
        """The extractor, its weights loaded.

        Raises:
            UserError: the weights are not on this machine, or not those of the model.
        """
        return TextExtractor(self._weights(), long_transcripts=self.long_transcripts)

    def identity(self) -> dict[str, Any]:
        """What decides the features, wherever the weights lie."""
        if not self.used:
            return {"extractor": "none"}
        parameters = {"extractor": self.extractor, "tokens": TOKENS, "long_transcripts": self.long_transcripts}
        return parameters | self._weights().identity()

    def provenance(self) -> dict[str, Any]:
        """Model, revision, digests, parameters, library versions; JSON values."""
        origin = self._weights().origin() if self.used else {}
        return self.identity() | origin | {"libraries": versions("torch", "transformers", "tokenizers")}

    def _weights(self) -> Weights:
        return find_model(self.model, option="text.model", revision=self.revision)


class TextExtractor:
    """Words -> per step, the mean of the token embeddings of the words spoken in it.

    Words are cut into windows of as many whole words as fit into 128 tokens with the two special ones, and padded to
    128; each window is read on its own. The paper truncates to 128 tokens, which would silence every session after its
    first minute; that reading is ``long_transcripts="truncate"``.
    """

    def __init__(self, weights: Weights, *, long_transcripts: Literal["windows", "truncate"]) -> None:
        """Load model and tokenizer.

        Raises:
            UserError: the files do not hold both.
        """
        from transformers import AutoModel, AutoTokenizer

        self.model = load_transformer(AutoModel, weights)
        self.width: int = self.model.config.hidden_size
        self.most_windows = 1 if long_transcripts == "truncate" else None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(weights.folder, local_files_only=True, use_fast=True)
            self.tokenizer(["a"], is_split_into_words=True).word_ids(0)
        except Exception as error:  # a missing or damaged tokenizer fails in many ways
            raise UserError(
                f"options.{weights.option}: {weights.folder} lacks a usable tokenizer ({said(error)}): "
                "download it with the model"
            ) from None

    def __call__(self, words: Sequence[Word], step_seconds: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(T, D) embeddings and (T,) presence; a step without a word is absent."""
        means = StepMeans(self.width, step_seconds)
        windows = list(self._windows([word for word in words if word.text.strip()]))[: self.most_windows]
        for first in range(0, len(windows), _WINDOWS_AT_A_TIME):
            some = windows[first : first + _WINDOWS_AT_A_TIME]
            embedded = self.encode([[word.text for word in window] for window in some])
            for window, (vectors, places) in zip(some, embedded, strict=True):
                for place, word in enumerate(window):
                    of_word = vectors[places == place]
                    for step in steps_of_word(word, step_seconds):
                        means.add_to_steps(np.full(len(of_word), step), of_word)
        return means.result()

    @torch.inference_mode()
    def encode(self, windows: Sequence[Sequence[str]]) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Per window of words: (n, D) embeddings of its tokens without special ones, and (n,) the word of each."""
        tokens = self.tokenizer(
            [list(words) for words in windows],
            is_split_into_words=True,
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        states = self.model(**tokens.to(device())).last_hidden_state.cpu().numpy()
        embedded = []
        for row, vectors in enumerate(states):
            places = np.array([-1 if place is None else place for place in tokens.word_ids(row)], dtype=np.int64)
            embedded.append((vectors[places >= 0], places[places >= 0]))
        return embedded

    def _windows(self, words: Sequence[Word]) -> Iterator[Sequence[Word]]:
        """As many words as fit, again and again; a word that alone does not fit is truncated by ``encode``."""
        if not words:
            return
        tokens = self.tokenizer([word.text for word in words], add_special_tokens=False, is_split_into_words=True)
        lengths = np.bincount([place for place in tokens.word_ids(0) if place is not None], minlength=len(words))
        room = TOKENS - self.tokenizer.num_special_tokens_to_add()
        first, used = 0, 0
        for place, length in enumerate(lengths):
            if used and used + length > room:
                yield words[first:place]
                first, used = place, 0
            used += length
        yield words[first:]


def steps_of_word(word: Word, step_seconds: float) -> Sequence[int]:
    """The step of the word's middle, and every further step whose middle the word covers.

    So a word counts where it is mostly heard, and a long word leaves no hole between short steps.
    """
    middle = int(steps_of([(word.start + word.end) / 2], step_seconds)[0])
    first = math.ceil(word.start / step_seconds - 0.5)
    last = math.ceil(word.end / step_seconds - 0.5) - 1
    return range(min(first, middle), max(last, middle) + 1)
