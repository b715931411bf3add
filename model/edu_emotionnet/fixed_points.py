"""Theorem 1 of the paper (section III.F), measured on a trained model instead of assumed.

The theorem supposes that predictions converge and concludes that their limit is unique; its proof compares the
limit with itself. What would make both true is that the map y -> TFL(z, y) contracts the probability simplex
(Banach). So the contraction factor is measured and bounded from above, and the loop is run from many starts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.feedback import TemporalFeedbackLoop


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """How much the feedback map y -> TFL(z, y) shrinks differences between beliefs, one row per z (Theorem 1)."""

    factors: Tensor
    """(N, S) local factor at S beliefs: spectral norm of the K x K Jacobian on the simplex's tangent space."""
    supremum: Tensor
    """(N,) largest of them: a lower bound of the map's Lipschitz constant on the simplex."""
    upper_bound: float
    """A bound that holds for every z and y; below one, Banach's theorem gives one fixed point for every input."""

    @property
    def contracts(self) -> bool:
        """No sampled belief of any z contradicts contraction. Proven only where ``upper_bound`` is below one too."""
        return bool((self.supremum < 1.0).all())


def contraction(loop: TemporalFeedbackLoop, z: Tensor, *, samples: int = 256, seed: int = 0) -> Contraction:
    """Contraction factors of the feedback map at constant inputs z, (N, width).

    Beliefs sampled: the uniform one, the K corners, and Dirichlet draws of which half lie near the faces, where a
    ReLU or a corner of the simplex is met that the middle never shows. Computed in double precision.

    Raises:
        ValueError: z is not a matrix of the loop's width.
    """
    exact, inputs = _double(loop, z)
    classes = exact.classifier.out_features
    beliefs = sampled_beliefs(classes, samples, seed).to(inputs)
    basis = _tangent_basis(classes).to(inputs)

    def feed(hoisted: Tensor, belief: Tensor) -> Tensor:
        return exact.step(hoisted[None], belief[None])[0].exp()

    jacobian = vmap(vmap(jacrev(feed, argnums=1), in_dims=(None, 0)), in_dims=(0, None))
    with torch.no_grad():
        matrices = jacobian(exact.fused(inputs), beliefs)
        factors = torch.linalg.matrix_norm(basis.t() @ matrices @ basis, ord=2)
    return Contraction(factors=factors, supremum=factors.amax(1), upper_bound=contraction_bound(exact))


def contraction_bound(loop: TemporalFeedbackLoop) -> float:
    """|U^T W_c| |W_y U| / 2, an upper bound of the contraction factor for every input and belief.

    U is an orthonormal basis of the tangent space. The softmax's Jacobian diag(y) - y y^T has norm at most 1/2 and
    sees logits only up to a constant; the ReLU's mask has norm at most 1.
    """
    if loop.previous is None:
        return 0.0
    basis = _tangent_basis(loop.classifier.out_features).to(loop.classifier.weight)
    outward = torch.linalg.matrix_norm(basis.t() @ loop.classifier.weight.detach(), ord=2)
    inward = torch.linalg.matrix_norm(loop.previous.weight.detach() @ basis, ord=2)
    return float(outward * inward / 2)


def sampled_beliefs(classes: int, samples: int, seed: int) -> Tensor:
    """(1 + K + samples, K) points of the probability simplex: centre, corners, and Dirichlet(1 and 0.1) draws."""
    fixed = torch.cat([torch.full((1, classes), 1.0 / classes), torch.eye(classes)]).double()
    draw = np.random.default_rng(seed).dirichlet
    drawn = [draw(np.full(classes, 0.1 if i % 2 else 1.0)) for i in range(samples)]
    return torch.cat([fixed, torch.from_numpy(np.array(drawn).reshape(samples, classes))])


def _tangent_basis(classes: int) -> Tensor:
    """(K, K-1) orthonormal columns orthogonal to the vector of ones, the directions along the simplex."""
    directions = torch.eye(classes, classes - 1, dtype=torch.double) - 1.0 / classes
    return torch.linalg.qr(directions).Q


def _double(loop: TemporalFeedbackLoop, z: Tensor) -> tuple[TemporalFeedbackLoop, Tensor]:
    width = loop.fused.in_features
    if z.dim() != 2 or z.shape[1] != width:
        raise ValueError(f"z must have shape (N, {width}), one fused feature per row, got {tuple(z.shape)}")
    return copy.deepcopy(loop).double(), z.detach().double()


@dataclass(frozen=True, kw_only=True)
class FixedPoints:
    """The feedback loop left to itself: z constant, R starts per z (Theorem 1)."""

    changes: Tensor
    """(N, R, S) Euclidean norm of y_{t+1} - y_t, t = 0 .. S-1."""
    limits: Tensor
    """(N, R, K) beliefs after the last step."""
    steps: Tensor
    """(N, R) number of steps until the belief changes by less than the tolerance for good; -1 where it never does."""
    rates: Tensor
    """(N,) estimated linear rate, the typical ratio of successive changes; NaN where none is left to measure."""
    spread: Tensor
    """(N,) largest distance between the limits of two starts."""
    unique: Tensor
    """(N,) bool: every start settled, and on the same point."""


def fixed_points(
    loop: TemporalFeedbackLoop,
    z: Tensor,
    *,
    starts: int = 16,
    steps: int = 500,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> FixedPoints:
    """Iterate y <- TFL(z, y) in double precision from several starts for each constant input z, (N, width).

    Limits count as one point if they lie within 100 tolerances of each other, since a slow iteration is still on
    its way when a step has become smaller than the tolerance.

    Raises:
        ValueError: z is not a matrix of the loop's width.
    """
    exact, inputs = _double(loop, z)
    beliefs = sampled_beliefs(exact.classifier.out_features, starts, seed).to(inputs)[:starts]
    count = len(beliefs)
    with torch.no_grad():
        hoisted = exact.fused(inputs).repeat_interleave(count, dim=0)
        belief = beliefs.repeat(len(inputs), 1)
        changes = []
        for _ in range(steps):
            following = exact.step(hoisted, belief).exp()
            changes.append((following - belief).norm(dim=1))
            belief = following
    history = torch.stack(changes, dim=1).view(len(inputs), count, steps)
    limits = belief.view(len(inputs), count, -1)
    spread = torch.cdist(limits, limits).flatten(1).amax(1)
    settled = _settling(history, tolerance)
    unique = (settled >= 0).all(1) & (spread <= 100 * tolerance)
    return FixedPoints(
        changes=history, limits=limits, steps=settled, rates=_rates(history), spread=spread, unique=unique
    )


def _settling(changes: Tensor, tolerance: float) -> Tensor:
    """(N, R, S) -> (N, R): one more than the last step whose change reaches the tolerance, -1 if that is the end."""
    position = torch.arange(1, changes.shape[-1] + 1, device=changes.device)
    last = torch.where(changes >= tolerance, position, 0).amax(-1)
    return torch.where(last == changes.shape[-1], -1, last + 1)


def _rates(changes: Tensor) -> Tensor:
    """(N, R, S) -> (N,) median over starts and steps of the ratio of successive changes, above rounding noise."""
    ratio = changes[..., 1:] / changes[..., :-1]
    usable = (changes[..., 1:] > 1e-12) & torch.isfinite(ratio)
    usable[..., : min(5, ratio.shape[-1] // 2)] &= False  # the way to the fixed point's neighbourhood
    return torch.where(usable, ratio, torch.nan).flatten(1).nanmedian(dim=1).values


def feedback_inputs(model: nn.Module, batch: SessionBatch) -> Tensor:
    """(N, width): the fused feature z of every real step of a batch, as a model's feedback loop receives it.

    Raises:
        ValueError: the model has no feedback loop.
    """
    loops = [module for module in model.modules() if isinstance(module, TemporalFeedbackLoop)]
    if len(loops) != 1:
        raise ValueError(f"expected a model with one temporal feedback loop, found {len(loops)}")
    seen: list[Tensor] = []
    handle = loops[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            model(batch)
    finally:
        handle.remove()
    return seen[0][batch.real]
