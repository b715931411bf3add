"""A cell: one condition under which a model is evaluated, as a variant of every modality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emolab.names import checked_name
from emolab.robustness.corruptions.observed import CLEAN, Variant


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One condition. Cells of a curve share everything but ``level``; the clean cell is its level 0."""

    id: str
    """Stable name, fit for a metric's key, a file or a URL."""
    variants: tuple[Variant, ...]
    """One per modality of the data, in their canonical order."""
    corruption: str = CLEAN
    """Name of the corruption; for cells of a joint grid the names by modality."""
    level: float = 0.0
    """Rate or severity; for cells of a joint grid the mean over modalities."""
    modalities: tuple[str, ...] = ()
    """The modalities that are corrupted."""
    seed: int = 0
    validation_only: bool = False

    @property
    def is_clean(self) -> bool:
        return all(variant.corruption == CLEAN for variant in self.variants)


def clean_cell(modalities: Sequence[str]) -> Cell:
    """The cell without any corruption."""
    return Cell(id=CLEAN, variants=tuple(Variant(modality=name) for name in modalities))


def cell_id(corruption: str, level: float, modalities: Iterable[str], seed: int) -> str:
    """`frame_missing-0.3.audio-text.seed0`."""
    return checked_name(f"{corruption}-{level:g}.{'-'.join(modalities)}.seed{seed}", what="cell id")


def grid_cell_id(variants: Sequence[Variant], seed: int) -> str:
    """`audio-frame_missing-0.3.text-gaussian-2.seed0`; clean modalities are left out."""
    parts = [f"{v.modality}-{v.corruption}-{v.level:g}" for v in variants if v.corruption != CLEAN]
    return checked_name(".".join([*parts, f"seed{seed}"]), what="cell id")


def distinct_variants(cells: Iterable[Cell]) -> list[Variant]:
    """Every variant that some cell needs, once, in order of first use."""
    return list(dict.fromkeys(variant for cell in cells for variant in cell.variants))
