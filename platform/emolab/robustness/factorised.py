"""Edu-EmotionNet under many cells at once, exactly.

The cells of a sweep recombine few variants of each modality, and nearly all of the network's work is per modality
or per ordered pair of modalities:

1. every variant is encoded once (``encoding``), with its query, key and value;
2. every (query variant, key variant) pair that occurs is attended once, a "view"; g of a cell is a mean of views;
3. per cell only the weights of the modalities, their sum and the feedback loop are left (``recombination``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edu_emotionnet.encoder import ModalityEncoder
from edu_emotionnet.network import EduEmotionNet
from emolab.robustness.corruptions.observed import Variant
from emolab.robustness.encoding import encode_into
from emolab.robustness.recombination import Recombination, recombination
from emolab.robustness.sharing import CellPlan, bounded_plans

MEMORY_BYTES = 1 << 28
"""Default bound of the tables; larger ones gain nothing, since sessions share no work."""
STEP_ROWS = 400
"""Rows of one step, mixtures times sessions, that are worked on at a time: as many as stay in cache."""
ATTENDED_STEPS = 400
"""Steps attended at a time, so that a view is projected while it is in cache."""


@dataclass(frozen=True, kw_only=True)
class ModalityInput:
    """One variant of one modality for a batch."""

    features: Tensor
    """(B, T, D) float32. Variants that differ in presence alone should share one tensor: it is projected once."""
    present: Tensor
    """(B, T) bool."""


def evaluate_factorised(
    model: EduEmotionNet,
    cells: Sequence[Sequence[Variant]],
    variants: Mapping[Variant, ModalityInput],
    *,
    encoders: nn.ModuleDict | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (C, B, T, K) and confidence (C, B, T, M), equal to the model's own up to rounding.

    ``encoders`` stand in for the model's own, in another precision. Sessions are taken in chunks; where the tables of
    a single session exceed the memory, cells are too.
    """
    by_modality = [{variant.modality: variant for variant in cell} for cell in cells]
    ordered = [tuple(cell[name] for name in model.modalities) for cell in by_modality]
    sessions, steps = variants[ordered[0][0]].present.shape
    width = model.config.d_model
    plans = bounded_plans(ordered, pairwise=model.cmaa is not None, steps=steps, width=width, memory_bytes=memory_bytes)
    parts = []
    for plan in plans:
        fitting = memory_bytes // plan.table_bytes(steps=steps, width=width)
        chunk = max(1, min(sessions, fitting, STEP_ROWS // len(plan.mixtures)))
        parts.append(_evaluate_plan(model, plan, variants, chunk, encoders if encoders is not None else model.encoders))
    return torch.cat([log_p for log_p, _ in parts]), torch.cat([weights for _, weights in parts])


def encoders_in_bfloat16(model: EduEmotionNet) -> nn.ModuleDict:
    """Copies of the encoders that compute in bfloat16 what lies behind the standardisation, nine tenths of all work.

    What they return joins tables in the model's own precision, as does all that follows.
    """
    encoders = copy.deepcopy(model.encoders).bfloat16()
    for encoder in encoders.values():
        assert isinstance(encoder, ModalityEncoder)
        encoder.standardise.to(model.tfl.fused.weight.dtype)
    return encoders


def _evaluate_plan(
    model: EduEmotionNet,
    plan: CellPlan,
    variants: Mapping[Variant, ModalityInput],
    chunk: int,
    encoders: nn.ModuleDict,
) -> tuple[Tensor, Tensor]:
    """All sessions under the cells of a plan, ``chunk`` sessions at a time; tables are allocated once per size."""
    sessions, steps = variants[plan.variants[0]].present.shape
    like = model.tfl.fused.weight
    tables: dict[int, tuple[Recombination, Tensor]] = {}
    outputs = []
    for first in range(0, sessions, chunk):
        taken = slice(first, min(first + chunk, sessions))
        size = taken.stop - taken.start
        if size not in tables:
            h = like.new_empty(len(plan.variants), size, steps, len(like))
            tables[size] = recombination(model, plan, size, steps), h
        table, h = tables[size]
        _encode_variants(h, encoders, plan, variants, taken)
        for row, g in _views(model, plan, h):
            table.store(row, g)
        outputs.append(table.combine(h))
    return torch.cat([log_p for log_p, _ in outputs], dim=1), torch.cat([weights for _, weights in outputs], dim=1)


def _encode_variants(
    h: Tensor, encoders: nn.ModuleDict, plan: CellPlan, inputs: Mapping[Variant, ModalityInput], taken: slice
) -> None:
    """The states of every variant of a plan, for a slice of the sessions, into h (V, sessions, T, d)."""
    for name, encoder in encoders.items():
        assert isinstance(encoder, ModalityEncoder)
        sharing: dict[int, list[int]] = {}
        for index, variant in enumerate(plan.variants):
            if variant.modality == name:
                sharing.setdefault(inputs[variant].features.data_ptr(), []).append(index)
        for same in sharing.values():
            chosen = [inputs[plan.variants[index]] for index in same]
            present = torch.stack([value.present[taken] for value in chosen])
            encode_into(h, same, encoder, chosen[0].features[taken], present)


def _views(model: EduEmotionNet, plan: CellPlan, h: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first view, g of consecutive views (n, sessions, T, d)), until all views were there."""
    cmaa, position = model.cmaa, {variant: index for index, variant in enumerate(plan.variants)}
    if cmaa is None:
        yield from ((row, h[position[variant]][None]) for row, (variant, _) in enumerate(plan.views))
        return
    query, key, value = (part(h) for part in (cmaa.query, cmaa.key, cmaa.value))
    size = max(1, ATTENDED_STEPS // (h.shape[1] * h.shape[2]))
    for row, own, others in view_blocks(plan, size):
        keys = slice(position[others[0]], position[others[-1]] + 1)
        q = query[position[own]].expand(len(others), -1, -1, -1)
        g = cmaa.attend(*(part.flatten(0, 1) for part in (q, key[keys], value[keys])))
        yield row, g.unflatten(0, (len(others), -1))


def view_blocks(plan: CellPlan, size: int) -> list[tuple[int, Variant, list[Variant]]]:
    """(first view, query, keys) of runs of at most ``size`` views with one query and consecutive keys."""
    position = {variant: index for index, variant in enumerate(plan.variants)}
    blocks: list[tuple[int, Variant, list[Variant]]] = []
    for row, (own, other) in enumerate(plan.views):
        follows = blocks and blocks[-1][1] == own and position[blocks[-1][2][-1]] + 1 == position[other]
        if follows and len(blocks[-1][2]) < size:
            blocks[-1][2].append(other)
        else:
            blocks.append((row, own, [other]))
    return blocks
