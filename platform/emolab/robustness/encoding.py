"""Encoding many variants of one modality, with what they have in common computed once.

The numbers are those of ``ModalityEncoder`` in evaluation mode, and so are its parts. Three things are saved, none
of them approximate: variants that differ in presence alone share the projection of their features and, since every
token is then either the clean one or the absent one of its position, the first block's query, key and value;
sequences in which the modality is never present are equal and encoded once; and the blocks work in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from edu_emotionnet.encoder import CausalBlock, ModalityEncoder

ENCODED_STEPS = 400
"""Steps encoded at a time: enough for full matrix products, few enough for the activations to stay in cache."""


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Input of the first block and its query, key and value, for steps that are present or absent."""

    x: Tensor
    """(B, T, d), or (1, T, d) for the absent tokens, which no session changes."""
    query_key_value: Tensor
    """(B, T, 3d)"""

    @classmethod
    def of(cls, x: Tensor, first: CausalBlock) -> _Tokens:
        return cls(x=x, query_key_value=first.query_key_value(first.attention_norm(x)))

    def where(self, mask: Tensor, absent: _Tokens) -> _Tokens:
        """These tokens where the mask (B, T, 1) is true, else the absent ones."""
        return _Tokens(
            x=torch.where(mask, self.x, absent.x),
            query_key_value=torch.where(mask, self.query_key_value, absent.query_key_value),
        )

    def __getitem__(self, sessions: slice) -> _Tokens:
        return _Tokens(x=self.x[sessions], query_key_value=self.query_key_value[sessions])


def encode_into(h: Tensor, places: Sequence[int], encoder: ModalityEncoder, features: Tensor, present: Tensor) -> None:
    """Encode variants of one feature tensor: features (B, T, D), present (V, B, T) -> h[places], (V, B, T, d)."""
    blocks = causal_blocks(encoder)
    # Hidden values may be anything, NaN too: each stays in its own row, and the row is not selected below.
    standardised = encoder.standardise(features).to(encoder.absent.dtype)
    clean = _Tokens.of(encoder.place(encoder.project(standardised)), blocks[0])
    absent = _Tokens.of(encoder.place(encoder.absent.expand(1, features.shape[1], -1)), blocks[0])
    heard = present.any(dim=2)
    some = max(1, ENCODED_STEPS // features.shape[1])
    # One buffer for the widest activation of all passes: fresh memory costs as much as the arithmetic on it.
    wide = encoder.absent.new_empty(min(some, len(features)) * features.shape[1], _widen(blocks[0]).out_features)
    silence = None if heard.all() else contextualise(encoder, blocks, replace(absent, x=absent.x.clone()), wide)
    for place, mask, sounds in zip(places, present, heard.tolist(), strict=True):
        for sessions in runs_of(sounds, some):
            if sounds[sessions.start]:
                tokens = clean[sessions].where(mask[sessions, :, None], absent)
                h[place, sessions] = contextualise(encoder, blocks, tokens, wide)
            else:
                assert silence is not None
                h[place, sessions] = silence


def runs_of(values: Sequence[bool], longest: int) -> list[slice]:
    """Slices of at most ``longest`` consecutive equal values, in order, that cover all of them."""
    starts = [0]
    for index in range(1, len(values)):
        if values[index] != values[index - 1] or index - starts[-1] == longest:
            starts.append(index)
    return [slice(*pair) for pair in pairwise([*starts, len(values)])]


def causal_blocks(encoder: ModalityEncoder) -> list[CausalBlock]:
    return [block for block in encoder.blocks if isinstance(block, CausalBlock)]


def contextualise(encoder: ModalityEncoder, blocks: Sequence[CausalBlock], tokens: _Tokens, wide: Tensor) -> Tensor:
    """``ModalityEncoder.contextualise`` without fresh memory: overwrites ``tokens.x`` and the buffer ``wide``, which
    has at least B * T rows."""
    shape = tokens.x.shape
    x = tokens.x.flatten(0, 1)
    query_key_value = tokens.query_key_value
    for number, block in enumerate(blocks):
        if number:
            query_key_value = block.query_key_value(block.attention_norm(x)).view(*shape[:2], -1)
        _add_linear(x, block.output, block.attend(query_key_value).flatten(0, 1))
        widen, narrow = _widen(block), block.feedforward[-1]
        assert isinstance(narrow, nn.Linear)
        active = torch.addmm(widen.bias, block.feedforward_norm(x), widen.weight.t(), out=wide[: len(x)])
        _add_linear(x, narrow, torch.ops.aten.gelu_(active))
    return encoder.norm(x).view(shape)


def _widen(block: CausalBlock) -> nn.Linear:
    layer = block.feedforward[0]
    assert isinstance(layer, nn.Linear)
    return layer


def _add_linear(x: Tensor, layer: nn.Linear, inputs: Tensor) -> None:
    """x += layer(inputs), both (N, ...), without a buffer for the product."""
    x.addmm_(inputs, layer.weight.t()).add_(layer.bias)
