"""From views to predictions: what is left to do per cell once every pair of variants has been attended.

A cell takes one mixture per modality, a mixture is the mean g of a few views with the state h of its variant, and
two linear layers stand between these and the cell: the g-part of the MIE's first layer, and the z-part of the
feedback layer. Being linear, they can be applied to the views or to the mixtures and cells.

``StepwiseTables`` applies them to the views, for grids, where many cells share a view. What then remains of a cell
is two weighted sums of table rows, a ReLU, a dot product and one step of the feedback loop. The tables are laid
out step by step, so that the rows of a step stay in cache while all cells read them.

``CellByCell`` applies them to mixtures and cells, where few are shared, and leaves the loop to the model.

Both read rows with ``embedding_bag``, which gathers, weighs and adds in one pass without a copy of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from edu_emotionnet.network import EduEmotionNet
from emolab.robustness.sharing import CellPlan


class Recombination(ABC):
    """Views of one plan on a fixed number of sessions; reused for every chunk of that size."""

    def __init__(self, model: EduEmotionNet, plan: CellPlan, sessions: int, steps: int) -> None:
        self.model, self.plan, self.sessions, self.steps = model, plan, sessions, steps
        self.like = model.tfl.fused.weight  # of the device and precision of everything
        self.width, self.modalities = len(self.like), len(model.modalities)
        self.share = 1.0 / plan.views_per_mixture
        device = self.like.device
        self.mixture_views = torch.tensor([views for _, views in plan.mixtures], device=device)
        self.mixture_own = torch.tensor([variant for variant, _ in plan.mixtures], device=device)
        self.cell_mixtures = torch.tensor(plan.cells, device=device)
        self.cell_views = self.mixture_views[self.cell_mixtures].flatten(1)

    @abstractmethod
    def store(self, row: int, g: Tensor) -> None:
        """Keep views ``row`` to ``row + n``, (n, sessions, T, d)."""

    @abstractmethod
    def combine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """States (V, sessions, T, d) of the variants, with the views stored before -> log-probabilities
        (C, sessions, T, K) and weights (C, sessions, T, M)."""

    def _shares(self, weights: Tensor) -> Tensor:
        """(..., M) weights of the modalities -> the weight of every view, (..., M * views per mixture)."""
        return (weights * self.share).repeat_interleave(self.plan.views_per_mixture, dim=-1)


def recombination(model: EduEmotionNet, plan: CellPlan, sessions: int, steps: int) -> Recombination:
    """The cheaper way for a plan."""
    way = StepwiseTables if plan.project_views(weighs=model.mie is not None) else CellByCell
    return way(model, plan, sessions, steps)


class CellByCell(Recombination):
    """Linear layers on mixtures and cells."""

    def __init__(self, model: EduEmotionNet, plan: CellPlan, sessions: int, steps: int) -> None:
        super().__init__(model, plan, sessions, steps)
        self.tokens = sessions * steps
        self.g = self.like.new_empty(len(plan.views), self.tokens, self.width)

    def store(self, row: int, g: Tensor) -> None:
        self.g[row : row + len(g)] = g.flatten(1, 2)

    def combine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._weights(h.flatten(1, 2))
        table, token = self.g.flatten(0, 1), torch.arange(self.tokens, device=h.device)[:, None]
        z = h.new_empty(len(weights), self.tokens, self.width)
        for cell, views in enumerate(self.cell_views):
            rows = views * self.tokens + token
            z[cell] = F.embedding_bag(rows, table, per_sample_weights=self._shares(weights[cell]), mode="sum")
        log_p = self.model.tfl(z.view(-1, self.steps, self.width))
        shape = (len(weights), self.sessions, self.steps, -1)
        return log_p.view(shape), weights.view(shape)

    def _weights(self, h: Tensor) -> Tensor:
        """(V, tokens, d) -> (C, tokens, M) weights of the modalities."""
        mie = self.model.mie
        if mie is None:
            return h.new_full((len(self.cell_mixtures), self.tokens, self.modalities), 1.0 / self.modalities)
        of_h, of_g = mie.hidden.weight.split(self.width, dim=1)
        of_g = (of_g * self.share).t().contiguous()
        own: dict[int, Tensor] = {}
        scores = h.new_empty(len(self.plan.mixtures), self.tokens)
        for mixture, (variant, views) in enumerate(self.plan.mixtures):
            if variant not in own:
                own[variant] = F.linear(h[variant], of_h, mie.hidden.bias)
            g = self.g[views[0]]
            for view in views[1:]:
                g = g + self.g[view]
            hidden = torch.addmm(own[variant], g, of_g).relu_()
            scores[mixture] = mie.score(hidden)[:, 0]
        return mie.weigh(scores[self.cell_mixtures].transpose(1, 2)).contiguous()


class StepwiseTables(Recombination):
    """Linear layers on views. Item i of session b stands in row i * sessions + b, whatever the items are."""

    def __init__(self, model: EduEmotionNet, plan: CellPlan, sessions: int, steps: int) -> None:
        super().__init__(model, plan, sessions, steps)
        views, own = len(plan.views) * sessions, len(plan.variants) * sessions
        self.fused = self.like.new_empty(steps, views, self.width)
        # The h-parts of the MIE stand behind the g-parts of the views, so that one sum takes from both.
        self.hidden = self.like.new_empty(steps, views + own, self.width)
        behind = self.mixture_own[:, None] + len(plan.views)
        self.mixture_rows = self._rows(torch.cat([self.mixture_views, behind], dim=1))
        coefficients = [self.share] * plan.views_per_mixture + [1.0]
        self.mixture_coefficients = self.like.new_tensor(coefficients).repeat(len(self.mixture_rows), 1)
        self.cell_mixture_rows, self.cell_view_rows = self._rows(self.cell_mixtures), self._rows(self.cell_views)

    def _rows(self, items: Tensor) -> Tensor:
        """(N, n) item numbers -> (N * sessions, n) row numbers."""
        session = torch.arange(self.sessions, device=items.device)
        return (items[:, None, :] * self.sessions + session[None, :, None]).flatten(0, 1)

    def store(self, row: int, g: Tensor) -> None:
        rows = slice(row * self.sessions, (row + len(g)) * self.sessions)
        g = g.flatten(0, 1)
        # The bias is part of every view: the weights of a cell's views sum to one, so it counts once.
        self.fused[:, rows] = self.model.tfl.fused(g).transpose(0, 1)
        if self.model.mie is not None:
            self.hidden[:, rows] = F.linear(g, self.model.mie.hidden.weight[:, self.width :]).transpose(0, 1)

    def combine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mie, tfl, cells = self.model.mie, self.model.tfl, len(self.cell_view_rows)
        if mie is not None:
            own = F.linear(h, mie.hidden.weight[:, : self.width], mie.hidden.bias)
            self.hidden[:, len(self.plan.views) * self.sessions :] = own.flatten(0, 1).transpose(0, 1)
        classes = tfl.classifier.out_features
        log_p = h.new_empty(self.steps, cells, classes)
        weights = h.new_full((self.steps, cells, self.modalities), 1.0 / self.modalities)
        belief = h.new_full((cells, classes), 1.0 / classes)
        for step in range(self.steps):
            if mie is not None:
                weights[step] = self._weights(step)
            shares = self._shares(weights[step])
            z = F.embedding_bag(self.cell_view_rows, self.fused[step], per_sample_weights=shares, mode="sum")
            log_p[step] = tfl.step(z, belief)
            belief = log_p[step].exp()
        shape = (self.steps, len(self.plan.cells), self.sessions, -1)
        return log_p.view(shape).permute(1, 2, 0, 3), weights.view(shape).permute(1, 2, 0, 3)

    def _weights(self, step: int) -> Tensor:
        """(C * sessions, M) weights of the modalities at a step."""
        mie = self.model.mie
        assert mie is not None
        hidden = F.embedding_bag(
            self.mixture_rows, self.hidden[step], per_sample_weights=self.mixture_coefficients, mode="sum"
        )
        scores = mie.score(hidden.relu_())[:, 0]
        return mie.weigh(scores[self.cell_mixture_rows])
