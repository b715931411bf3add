"""Edu-EmotionNet under many cells at once, exactly.

The cells of a sweep recombine few variants of each modality, and nearly all of the network's work is per modality
or per ordered pair of modalities:

1. every variant is encoded once, with its query, key and value, and the h-part of the MIE's first layer;
2. every (query variant, key variant) pair that occurs is attended once, a "view"; g of a cell is a mean of views.
   The g-part of the MIE's first layer and the z-part of the feedback layer are linear, so they may be applied to
   the views (cheap in a grid, where many cells share a view) or to what a cell makes of them (cheap otherwise);
3. a cell is then two weighted sums of table rows, a ReLU, a dot product and one step of the feedback loop. All
   cells and sessions are stacked on one axis, and the tables are laid out step by step, so that the rows of a
   step stay in cache. ``embedding_bag`` gathers, weighs and adds rows in one pass without a copy of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edu_emotionnet.encoder import ModalityEncoder
from edu_emotionnet.network import EduEmotionNet
from emolab.robustness.corruptions.observed import Variant
from emolab.robustness.encoding import encode_into
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
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (C, B, T, K) and confidence (C, B, T, M), equal to the model's own up to rounding.

    Sessions are taken in chunks; where the tables of a single session exceed the memory, cells are too.
    """
    by_modality = [{variant.modality: variant for variant in cell} for cell in cells]
    ordered = [tuple(cell[name] for name in model.modalities) for cell in by_modality]
    sessions, steps = variants[ordered[0][0]].present.shape
    width = model.config.d_model
    plans = bounded_plans(ordered, pairwise=model.cmaa is not None, steps=steps, width=width, memory_bytes=memory_bytes)
    parts = []
    for plan in plans:
        fitting = memory_bytes // plan.table_bytes(steps=steps, width=width)
        count = max(1, min(sessions, fitting, STEP_ROWS // len(plan.mixtures)))
        stacks: dict[int, StackedCells] = {}
        outputs = []
        for first in range(0, sessions, count):
            taken = slice(first, min(first + count, sessions))
            size = taken.stop - taken.start
            if size not in stacks:  # the last chunk may be smaller
                stacks[size] = StackedCells(model, plan, size, steps)
            outputs.append(stacks[size].run(variants, taken))
        parts.append(tuple(torch.cat(output, dim=1) for output in zip(*outputs, strict=True)))
    return torch.cat([log_p for log_p, _ in parts]), torch.cat([weights for _, weights in parts])


class StackedCells:
    """The cells of one plan on chunks of ``sessions`` sessions; its tables are allocated once for all chunks.

    Row numbers: item i of session b stands at i * sessions + b, whatever the items are.
    """

    def __init__(self, model: EduEmotionNet, plan: CellPlan, sessions: int, steps: int) -> None:
        self.model, self.plan, self.sessions, self.steps = model, plan, sessions, steps
        self.projects = plan.project_views(weighs=model.mie is not None)
        self.like = model.tfl.fused.weight
        width = model.config.d_model
        views = len(plan.views) * sessions
        own = len(plan.variants) * sessions
        self.fused = self.like.new_empty(steps, views, width)  # g of every view, or W_z g + b
        # The h-parts of the MIE stand behind the g-parts of the views, so that one sum takes from both.
        self.hidden = self.like.new_empty(steps, own + (views if self.projects else 0), width)
        self._index()

    def _index(self) -> None:
        plan, device = self.plan, self.like.device
        share = 1.0 / plan.views_per_mixture
        views = torch.tensor([views for _, views in plan.mixtures], device=device)
        own = torch.tensor([variant for variant, _ in plan.mixtures], device=device)
        cells = torch.tensor(plan.cells, device=device)
        self.share = share
        self.mixture_views = self._rows(views)
        self.mixture_own = self._rows(own[:, None] + (len(plan.views) if self.projects else 0))
        self.mixture_all = torch.cat([self.mixture_views, self.mixture_own], dim=1)
        coefficients = [share] * plan.views_per_mixture + [1.0]
        self.mixture_weights = self.like.new_tensor(coefficients).repeat(len(self.mixture_all), 1)
        self.cell_mixtures = self._rows(cells)
        self.cell_views = self._rows(views[cells].flatten(1))

    def _rows(self, items: Tensor) -> Tensor:
        """(N, n) item numbers -> (N * sessions, n) row numbers."""
        session = torch.arange(self.sessions, device=items.device)
        return (items[:, None, :] * self.sessions + session[None, :, None]).flatten(0, 1)

    def run(self, inputs: Mapping[Variant, ModalityInput], taken: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities (C, sessions, T, K) and weights (C, sessions, T, M) for a slice of the batch."""
        h = self._encode(inputs, taken)
        self._fill_own(h)
        self._fill_views(h)
        log_p, weights = self._feedback()
        shape = (self.steps, len(self.plan.cells), self.sessions, -1)
        return log_p.view(shape).permute(1, 2, 0, 3), weights.view(shape).permute(1, 2, 0, 3)

    def _encode(self, inputs: Mapping[Variant, ModalityInput], taken: slice) -> Tensor:
        """(V, sessions, T, d) states of every variant."""
        h = self.like.new_empty(len(self.plan.variants), self.sessions, self.steps, self.like.shape[0])
        for name in self.model.modalities:
            encoder = self.model.encoders[name]
            assert isinstance(encoder, ModalityEncoder)
            sharing: dict[int, list[int]] = {}
            for index, variant in enumerate(self.plan.variants):
                if variant.modality == name:
                    sharing.setdefault(inputs[variant].features.data_ptr(), []).append(index)
            for same in sharing.values():
                chosen = [inputs[self.plan.variants[index]] for index in same]
                present = torch.stack([value.present[taken] for value in chosen])
                encode_into(h, same, encoder, chosen[0].features[taken], present)
        return h

    def _fill_own(self, h: Tensor) -> None:
        mie, width = self.model.mie, h.shape[-1]
        if mie is not None:
            own = F.linear(h, mie.hidden.weight[:, :width], mie.hidden.bias)
            self.hidden[:, -len(self.plan.variants) * self.sessions :] = own.flatten(0, 1).transpose(0, 1)

    def _fill_views(self, h: Tensor) -> None:
        """Attend every view and, where views are projected, apply both linear layers to it."""
        cmaa, position = self.model.cmaa, {v: index for index, v in enumerate(self.plan.variants)}
        if cmaa is None:
            for row, (variant, _) in enumerate(self.plan.views):
                self._store(row, h[position[variant]])
            return
        query, key, value = (part(h) for part in (cmaa.query, cmaa.key, cmaa.value))
        for row, own, others in view_blocks(self.plan, max(1, ATTENDED_STEPS // (self.sessions * self.steps))):
            keys = slice(position[others[0]], position[others[-1]] + 1)
            q = query[position[own]].expand(len(others), -1, -1, -1)
            self._store(row, cmaa.attend(*(part.flatten(0, 1) for part in (q, key[keys], value[keys]))))

    def _store(self, row: int, g: Tensor) -> None:
        """Views (n * sessions, T, d) from view number ``row`` on."""
        rows = slice(row * self.sessions, row * self.sessions + len(g))
        if not self.projects:
            self.fused[:, rows] = g.transpose(0, 1)
            return
        self.fused[:, rows] = self.model.tfl.fused(g).transpose(0, 1)  # the weights sum to one, so b counts once
        if self.model.mie is not None:
            self.hidden[:, rows] = F.linear(g, self.model.mie.hidden.weight[:, g.shape[-1] :]).transpose(0, 1)

    def _feedback(self) -> tuple[Tensor, Tensor]:
        """(T, C * sessions, K) log-probabilities and (T, C * sessions, M) weights, step by step."""
        tfl, rows = self.model.tfl, len(self.cell_mixtures)
        classes, modalities = tfl.classifier.out_features, len(self.model.modalities)
        log_p = self.like.new_empty(self.steps, rows, classes)
        weights = self.like.new_full((self.steps, rows, modalities), 1.0 / modalities)
        belief = self.like.new_full((rows, classes), 1.0 / classes)
        for step in range(self.steps):
            if self.model.mie is not None:
                weights[step] = self._weights(step)
            shares = (weights[step] * self.share).repeat_interleave(self.plan.views_per_mixture, dim=1)
            z = F.embedding_bag(self.cell_views, self.fused[step], per_sample_weights=shares, mode="sum")
            log_p[step] = tfl.step(z if self.projects else tfl.fused(z), belief)
            belief = log_p[step].exp()
        return log_p, weights

    def _weights(self, step: int) -> Tensor:
        """(C * sessions, M) weights of the modalities at a step."""
        mie = self.model.mie
        assert mie is not None
        if self.projects:
            hidden = F.embedding_bag(
                self.mixture_all, self.hidden[step], per_sample_weights=self.mixture_weights, mode="sum"
            )
        else:
            g = F.embedding_bag(self.mixture_views, self.fused[step], mode="mean")
            hidden = self.hidden[step].index_select(0, self.mixture_own[:, 0])
            hidden.addmm_(g, mie.hidden.weight[:, g.shape[1] :].t())
        scores = mie.score(hidden.relu_())[:, 0]
        return mie.weigh(scores[self.cell_mixtures])


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
