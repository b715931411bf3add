"""What the cells of a sweep share: which views and mixtures occur, and how often each would be recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emolab.robustness.corruptions.observed import Variant

View = tuple[Variant, Variant]
"""(query, key): one variant as seen by another; the same variant twice where nothing is attended."""


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """The distinct parts of a list of cells. Variants are positions in ``variants``, views in ``views``, ..."""

    variants: tuple[Variant, ...]
    """Distinct variants, those of one modality next to each other."""
    views: tuple[View, ...]
    """Distinct views, those of one query next to each other."""
    mixtures: tuple[tuple[int, tuple[int, ...]], ...]
    """Distinct (query variant, its views): what one modality contributes to a cell; g is the mean of the views."""
    cells: tuple[tuple[int, ...], ...]
    """For every cell the mixture of each modality."""

    @property
    def views_per_mixture(self) -> int:
        return len(self.mixtures[0][1])

    def project_views(self, *, weighs: bool) -> bool:
        """Whether the linear layers are better applied to every view (two products each) than once per mixture,
        where modalities are weighed by the MIE, and once per cell."""
        return 2 * len(self.views) < weighs * len(self.mixtures) + len(self.cells)

    def table_bytes(self, *, steps: int, width: int) -> int:
        """Bytes of the engine's tables for one session, float32: views (twice where they are projected), variants
        (states, queries, keys, values and copies), fused cells where they are not, and the rows of a step."""
        projected = self.project_views(weighs=True)
        rows = (1 + projected) * len(self.views) + 6 * len(self.variants) + 2 * (not projected) * len(self.cells)
        return 4 * width * (steps * rows + 2 * (len(self.mixtures) + len(self.cells)))


def plan_cells(cells: Sequence[tuple[Variant, ...]], *, pairwise: bool) -> CellPlan:
    """The parts of cells, each cell one variant per modality.

    Args:
        cells: at least one, all with the same modalities in the same order.
        pairwise: whether a modality is seen by the others (CMAA); else a modality's only view is its own state.
    """
    columns = [dict.fromkeys(cell[i] for cell in cells) for i in range(len(cells[0]))]
    variants = tuple(variant for column in columns for variant in column)
    viewed = [[_views_of(cell, i, pairwise=pairwise) for i in range(len(cell))] for cell in cells]
    views = dict.fromkeys(view for cell in viewed for mixture in cell for view in mixture)
    rank = {variant: index for index, variant in enumerate(variants)}
    in_order = sorted(views, key=lambda view: (rank[view[0]], rank[view[1]]))
    position = {view: index for index, view in enumerate(in_order)}
    mixtures: dict[tuple[int, tuple[int, ...]], int] = {}
    members = []
    for cell in viewed:
        keys = [(rank[mixture[0][0]], tuple(position[view] for view in mixture)) for mixture in cell]
        members.append(tuple(mixtures.setdefault(key, len(mixtures)) for key in keys))
    return CellPlan(variants=variants, views=tuple(in_order), mixtures=tuple(mixtures), cells=tuple(members))


def _views_of(cell: tuple[Variant, ...], i: int, *, pairwise: bool) -> tuple[View, ...]:
    if not pairwise or len(cell) == 1:
        return ((cell[i], cell[i]),)
    return tuple((cell[i], other) for j, other in enumerate(cell) if j != i)


def bounded_plans(
    cells: Sequence[tuple[Variant, ...]], *, pairwise: bool, steps: int, width: int, memory_bytes: int
) -> list[CellPlan]:
    """Plans of consecutive cells whose tables fit for at least one session; one cell at the least per plan."""
    plan = plan_cells(cells, pairwise=pairwise)
    if len(cells) == 1 or plan.table_bytes(steps=steps, width=width) <= memory_bytes:
        return [plan]
    half = len(cells) // 2
    return [
        part
        for some in (cells[:half], cells[half:])
        for part in bounded_plans(some, pairwise=pairwise, steps=steps, width=width, memory_bytes=memory_bytes)
    ]
