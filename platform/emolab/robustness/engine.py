"""Evaluation of one batch of sessions under many cells: one interface, two ways to the same numbers.

``factorised`` (an Edu-EmotionNet): every variant of a modality is encoded once, see ``factorised``.
``plain`` (any other model): the model runs once per cell.

A third way, ``factorised-bfloat16``, encodes in half the precision and has to be asked for: it is not exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.network import EduEmotionNet
from emolab.robustness.cells import Cell
from emolab.robustness.corruptions.observed import Variant
from emolab.robustness.factorised import MEMORY_BYTES, ModalityInput, encoders_in_bfloat16, evaluate_factorised

Engine = Literal["factorised", "factorised-bfloat16", "plain"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
INEXACT: Engine = "factorised-bfloat16"


@dataclass(frozen=True, kw_only=True)
class CellPredictions:
    """What a model says of B sessions of up to T steps under C cells."""

    log_probabilities: Tensor
    """(C, B, T, K); rows of padding are meaningless."""
    confidence: Tensor | None
    """(C, B, T, M) weights of the modalities; None where the model has none."""
    engine: Engine
    """Which way the numbers were computed."""


@torch.inference_mode()
def evaluate_cells(
    model: nn.Module,
    batch: SessionBatch,
    cells: Sequence[Cell],
    variants: Mapping[Variant, ModalityInput],
    *,
    engine: Engine | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> CellPredictions:
    """Predictions under every cell.

    Args:
        model: maps a SessionBatch to Predictions; in evaluation mode.
        batch: the clean sessions; lengths and labels are taken from it.
        cells: at least one; each names one variant per modality of the batch.
        variants: variant -> its features and presence for the whole batch (``assembly.build_variants``).
        engine: forces one; by default the factorised one wherever it is exact.
        memory_bytes: the factorised engine splits sessions and cells so that its tables stay below this.

    Raises:
        ValueError: the model is in training mode, a variant is missing, there are no cells, or the factorised
            engine is asked for with a model that it does not know.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before evaluating it")
    if not cells:
        raise ValueError("there are no cells to evaluate")
    lacking = {variant for cell in cells for variant in cell.variants} - set(variants)
    if lacking:
        raise ValueError(f"{len(lacking)} variants were not built, for instance {min(lacking)}")
    chosen = engine or best_engine(model)
    if chosen == "plain":
        return _evaluate_plain(model, batch, cells, variants)
    if not isinstance(model, EduEmotionNet) or best_engine(model) == "plain":
        raise ValueError(f"{type(model).__name__} cannot be factorised: use the plain engine")
    encoders = model.encoders if chosen == "factorised" else encoders_in_bfloat16(model)
    log_p, confidence = evaluate_factorised(
        model, [cell.variants for cell in cells], variants, encoders=encoders, memory_bytes=memory_bytes
    )
    return CellPredictions(log_probabilities=log_p, confidence=confidence, engine=chosen)


def best_engine(model: nn.Module) -> Engine:
    """`factorised` for an Edu-EmotionNet and its ablations; a subclass may compute something else, so it is not."""
    return "factorised" if type(model) is EduEmotionNet else "plain"


def _evaluate_plain(
    model: nn.Module, batch: SessionBatch, cells: Sequence[Cell], variants: Mapping[Variant, ModalityInput]
) -> CellPredictions:
    outputs: list[Predictions] = []
    for cell in cells:
        inputs = {variant.modality: variants[variant] for variant in cell.variants}
        corrupted = replace(
            batch,
            features={name: value.features for name, value in inputs.items()},
            present={name: value.present for name, value in inputs.items()},
        )
        outputs.append(model(corrupted))
    weights = [output.confidence for output in outputs if output.confidence is not None]
    return CellPredictions(
        log_probabilities=torch.stack([output.log_probabilities for output in outputs]),
        confidence=torch.stack(weights) if len(weights) == len(outputs) else None,
        engine="plain",
    )
