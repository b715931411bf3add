"""Lemma 1 of the paper (section III.F), measured on a trained model instead of assumed.

The lemma claims a Lipschitz constant for all inputs, the product of those of the parts. Its proof takes the attention
of CMAA for affine maps of bounded norm. Dot-product attention by itself has no Lipschitz constant: on unbounded inputs
its slope grows with their size (Kim, Papamakarios and Mnih, "The Lipschitz Constant of Self-Attention", ICML 2021). In
the network shipped here every attention, that of CMAA too, reads the output of a LayerNorm, whose length is at most
sqrt(d) max|weight| + |bias|, and on bounded inputs the slope of attention is bounded. LayerNorm itself has a slope of
at most max|weight| / sqrt(epsilon), reached near constant inputs; all other parts are affine, ReLU, GELU or softmax,
or products of bounded ones. So for sessions of a given length and given gaps the conclusion of the lemma holds, for
another reason than the one it gives. The constant that follows is of no use: a LayerNorm may contribute a factor of
1 / sqrt(1e-5) = 316, and 2 layers + 1 of them follow on one another.

What is measured is therefore the *local* constant at given sessions: the largest singular value of the Jacobian of the
class probabilities with respect to one modality's features, over a whole session (``local_lipschitz``) or from one
step to the same step, as the lemma has it (``step_constants``). Where the lemma sets a missing modality to 0, the
models here read a learned vector. Theorem 1 is measured in ``fixed_points``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from edu_emotionnet.batch import SessionBatch

Map = Callable[[Tensor], Tensor]
Products = tuple[Map, Map]
"""v -> J v and u -> J^T u, for the Jacobian J of a map at a point."""


@dataclass(frozen=True, kw_only=True)
class LocalLipschitz:
    """Local Lipschitz constants of one modality's features -> class probabilities, one per session (Lemma 1)."""

    modality: str
    missing: str | None
    """The modality that was taken away from every session; None where nothing was."""
    outputs: str
    """`all`: the probabilities of every real step, as one vector; `last`: of the last real step."""
    constants: Tensor
    """(B,) largest singular values, in probability per unit of raw feature (Euclidean norms on both sides).

    Power iteration approaches them from below."""
    converged: Tensor
    """(B,) bool: the last iteration changed the constant by no more than the tolerance."""
    iterations: int
    """Power iterations done."""

    @property
    def largest(self) -> float:
        return float(self.constants.max())


def local_lipschitz(
    model: nn.Module,
    batch: SessionBatch,
    *,
    modality: str,
    missing: str | None = None,
    outputs: str = "all",
    iterations: int = 500,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> LocalLipschitz:
    """Largest singular value of d probabilities / d features[modality], for every session of a batch (Lemma 1).

    Power iteration on J^T J with one Jacobian-vector and one vector-Jacobian product per iteration: no Jacobian
    is formed. Sessions do not influence each other, so all of them iterate at once. Steps at which the modality
    is absent are no inputs, padding is neither input nor output.

    Args:
        model: any model of the zoo, in eval mode.
        batch: the sessions at which the constants hold.
        modality: the one whose features vary.
        missing: another modality, taken away first, throughout (the lemma: at most one missing at each step).
        outputs: `all` or `last`.
        iterations: at most this many.
        tolerance: relative change of a constant at which its session counts as converged.
        seed: of the random first directions.

    Raises:
        ValueError: the model is in training mode (dropout has no Lipschitz constant), or an argument is unknown.
        RuntimeError: a layer of the model has neither a forward-mode nor a second derivative in PyTorch.
    """
    _check_lipschitz_arguments(model, batch, modality, missing, outputs)
    with sdpa_kernel(SDPBackend.MATH), _without_fused_encoders():  # fused kernels lack the derivatives needed here
        push, pull = _jacobian_products(model, _without(batch, missing), modality, outputs)
        generator = torch.Generator().manual_seed(seed)
        features = batch.features[modality]
        image = push(_unit(torch.randn(features.shape, generator=generator).to(features)))
        constants, converged, done = _norms(image), torch.zeros(len(image), dtype=torch.bool), 0
        while done < iterations and not bool(converged.all()):
            image = push(_unit(pull(_unit(image))))
            previous, constants = constants, _norms(image)
            converged = (constants - previous).abs() <= tolerance * constants
            done += 1
    return LocalLipschitz(
        modality=modality, missing=missing, outputs=outputs,
        constants=constants, converged=converged, iterations=done,
    )  # fmt: skip


def step_constants(model: nn.Module, batch: SessionBatch, *, modality: str, missing: str | None = None) -> Tensor:
    """Largest singular value of d y_t / d x_t, (B, T): the map of Lemma 1 at every step, all other inputs held fixed.

    Steps at which the modality is absent and padding have 0. A modality that is to be 0 at some steps, as the lemma
    has it, and not absent, is given as features of 0. Takes T x K backward passes.

    Raises:
        ValueError: the model is in training mode, or an argument is unknown.
    """
    _check_lipschitz_arguments(model, batch, modality, missing, "all")
    function, point = _probabilities(model, _without(batch, missing), modality, "all")
    point.requires_grad_()
    output = function(point)
    constants = output.new_zeros(output.shape[:2])
    for step in range(output.shape[1]):
        # A session's probabilities hang on its own features alone, so one pass serves all sessions.
        rows = [
            torch.autograd.grad(output[:, step, label].sum(), point, retain_graph=True)[0][:, step]
            for label in range(output.shape[2])
        ]
        constants[:, step] = torch.linalg.matrix_norm(torch.stack(rows, dim=1), ord=2)
    return constants


def lipschitz_table(
    model: nn.Module,
    batch: SessionBatch,
    *,
    outputs: str = "all",
    iterations: int = 500,
    tolerance: float = 1e-5,
) -> list[LocalLipschitz]:
    """Every case of Lemma 1: each modality, with none and with each of the others missing."""
    names = batch.modalities
    cases = [(name, gone) for name, gone in product(names, (None, *names)) if gone != name]
    return [
        local_lipschitz(
            model, batch, modality=name, missing=gone, outputs=outputs, iterations=iterations, tolerance=tolerance
        )
        for name, gone in cases
    ]


def _check_lipschitz_arguments(
    model: nn.Module, batch: SessionBatch, modality: str, missing: str | None, outputs: str
) -> None:
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before measuring Lipschitz constants")
    if modality not in batch.modalities:
        raise ValueError(f"modality must be among {', '.join(batch.modalities)}, got {modality!r}")
    if missing is not None and (missing == modality or missing not in batch.modalities):
        raise ValueError(f"missing must be another modality than {modality!r} or None, got {missing!r}")
    if outputs not in ("all", "last"):
        raise ValueError(f"outputs must be 'all' or 'last', got {outputs!r}")


@contextmanager
def _without_fused_encoders() -> Iterator[None]:
    """nn.TransformerEncoderLayer has a fused inference path without derivatives; switched off for the while."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _without(batch: SessionBatch, missing: str | None) -> SessionBatch:
    if missing is None:
        return batch
    return replace(batch, present={**batch.present, missing: torch.zeros_like(batch.present[missing])})


def _jacobian_products(model: nn.Module, batch: SessionBatch, modality: str, outputs: str) -> Products:
    """v -> J v and u -> J^T u, for v (B, T, D) and u (B, T, K)."""
    function, point = _probabilities(model, batch, modality, outputs)
    try:
        return _forward_mode(function, point)
    except RuntimeError:  # torch says so in several ways, NotImplementedError among them
        return _double_backward(function, point)


def _probabilities(model: nn.Module, batch: SessionBatch, modality: str, outputs: str) -> tuple[Map, Tensor]:
    """The map of one modality's features, (B, T, D) -> (B, T, K), and the point at which the batch has them."""
    last = torch.arange(batch.labels.shape[1], device=batch.lengths.device) == batch.lengths[:, None] - 1
    counted = (batch.real if outputs == "all" else last)[..., None]
    frozen = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}

    def probabilities(features: Tensor) -> Tensor:
        changed = replace(batch, features={**batch.features, modality: features})
        # Detached weights: otherwise every product would also be recorded for a gradient that nobody asks for.
        log_probabilities = functional_call(model, frozen, (changed,)).log_probabilities
        return log_probabilities.exp().masked_fill(~counted, 0.0)

    # An unobserved value may be anything, NaN included, and no model reads it.
    observed = batch.present[modality] & batch.real
    return probabilities, batch.features[modality].detach().masked_fill(~observed[..., None], 0.0)


def _forward_mode(function: Map, point: Tensor) -> Products:
    """One pass of the function for every product J v.

    Raises:
        RuntimeError: a layer has no forward-mode derivative.
    """

    def push(direction: Tensor) -> Tensor:
        return jvp(function, (point,), (direction,))[1].detach()

    push(torch.zeros_like(point))
    pull = vjp(function, point)[1]
    return push, lambda gradient: pull(gradient)[0].detach()


def _double_backward(function: Map, point: Tensor) -> Products:
    """J v as the derivative of u -> J^T u, which is linear in u: for layers without a forward-mode derivative."""
    point = point.clone().requires_grad_()
    output = function(point)
    probe = torch.zeros_like(output, requires_grad=True)
    (slope,) = torch.autograd.grad(output, point, probe, create_graph=True)

    def push(direction: Tensor) -> Tensor:
        return torch.autograd.grad(slope, probe, direction, retain_graph=True)[0]

    def pull(gradient: Tensor) -> Tensor:
        return torch.autograd.grad(output, point, gradient, retain_graph=True)[0]

    return push, pull


def _norms(values: Tensor) -> Tensor:
    """(B, ...) -> (B,) Euclidean norms."""
    return values.flatten(1).norm(dim=1)


def _unit(values: Tensor) -> Tensor:
    """Every session's part scaled to norm one; a part that is zero stays zero."""
    scale = _norms(values).clamp_min(torch.finfo(values.dtype).tiny)
    return values / scale.view(-1, *[1] * (values.dim() - 1))
