"""Temporal Feedback Loop (TFL), equations 8 and 9: the prediction at t depends on the prediction at t-1.

Three ways of computing the same thing, between which ``forward`` chooses by itself:

- ``TemporalFeedbackLoop.unrolled`` is the definition: a loop that autograd records, for any device, precision
  and ``torch.func`` transform;
- ``SequentialAdjoint`` is the faster one on a CPU: the loop runs unrecorded and in place; its exact gradient
  comes from the adjoint recursion of a K-dimensional state and matrix products over all steps;
- ``feedback_kernel`` is the faster one on a GPU: all steps in one kernel, and the same recursion in another.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 512
"""(step, session) pairs handled at a time: at width 256 a block of float32 rows is 0.5 MB, kept in cache."""
KERNEL_WIDTH, KERNEL_CLASSES = 2048, 16
"""Widest hidden layer and most classes that the GPU's kernel takes: its weights have to stay in registers."""


class TemporalFeedbackLoop(nn.Module):
    """z_t, y_{t-1} -> log y_t, with a one-layer MLP_fb and a linear classifier.

    W [z_t, y_{t-1}] splits into W_z z_t + W_y y_{t-1}: the first term, nearly all of the work, is one matrix
    product over all steps; only the K columns of W_y take part in the loop. y_0 is uniform (undefined in the
    paper), and the gradient flows through y_{t-1} unless ``detach`` is set (undefined there too).
    """

    def __init__(self, width: int, classes: int, *, feedback: bool = True, detach: bool = False) -> None:
        super().__init__()
        self.fused = nn.Linear(width, width)
        self.previous = nn.Linear(classes, width, bias=False) if feedback else None
        self.classifier = nn.Linear(width, classes)
        self.detach = detach

    def forward(self, z: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, K) log-probabilities.

        The gradient can be taken once; for a second derivative call ``unrolled``.
        """
        if self.previous is None:
            return F.log_softmax(self.classifier(F.relu(self.fused(z))), dim=-1)
        tensors = (
            z, self.fused.weight, self.fused.bias,
            self.previous.weight, self.classifier.weight, self.classifier.bias,
        )  # fmt: skip
        if _adjoint_serves(*tensors):
            return SequentialAdjoint.apply(*tensors, self.detach)
        if _kernel_serves(*tensors):
            return self.scanned(z)
        return self.unrolled(z)

    def unrolled(self, z: Tensor) -> Tensor:
        """The same map as ``forward``, as a loop that autograd and ``torch.func`` see step by step."""
        hoisted = self.fused(z)
        classes = self.classifier.out_features
        belief = z.new_full((z.shape[0], classes), 1.0 / classes)
        steps = []
        for step in hoisted.unbind(1):  # indexing hoisted[:, t] would make the backward pass O(T^2)
            log_belief = self.step(step, belief)
            steps.append(log_belief)
            belief = log_belief.exp()
            if self.detach:
                belief = belief.detach()
        return torch.stack(steps, dim=1)

    def scanned(self, z: Tensor) -> Tensor:
        """The same map as ``forward``, by the kernels of a GPU; one derivative."""
        from edu_emotionnet.feedback_kernel import scan  # Triton, which only machines with a GPU need

        assert self.previous is not None
        hoisted = self.fused(z)
        weights = self.previous.weight, self.classifier.weight, self.classifier.bias
        log_beliefs = scan(hoisted, *weights, detach=self.detach)
        # As of log_softmax: float32 under autocast, else the precision of what went in.
        return log_beliefs if torch.is_autocast_enabled(z.device.type) else log_beliefs.to(hoisted.dtype)

    def step(self, hoisted: Tensor, belief: Tensor) -> Tensor:
        """One step: W_z z_t + b, (B, width), and y_{t-1}, (B, K) -> log y_t, (B, K)."""
        if self.previous is not None:
            hoisted = hoisted + self.previous(belief)
        return F.log_softmax(self.classifier(F.relu(hoisted)), dim=-1)


def _adjoint_serves(z: Tensor, *weights: Tensor) -> bool:
    """Whether SequentialAdjoint can stand in for the loop: on a CPU, under autograd or no differentiation."""
    return (
        z.device.type == "cpu"
        and z.dtype in (torch.float32, torch.float64)
        and z.numel() > 0
        and z.shape[1] > 1  # at a single step there is nothing to recur over
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        # vmap, jvp and their kin must see every operation; torch asks the same before a custom Function.
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        and all(forward_ad.unpack_dual(tensor).tangent is None for tensor in (z, *weights))
    )


def _kernel_serves(z: Tensor, *weights: Tensor) -> bool:
    """Whether feedback_kernel can stand in for the loop: on a GPU, in single or bfloat16 precision, unless somebody
    differentiates forwards."""
    classes, width = weights[-2].shape
    return (
        z.device.type == "cuda"
        and z.dtype in (torch.float32, torch.bfloat16)
        and z.numel() > 0
        and width <= KERNEL_WIDTH
        and classes <= KERNEL_CLASSES
        and not torch.compiler.is_compiling()
        and all(forward_ad.unpack_dual(tensor).tangent is None for tensor in (z, *weights))
        and kernel_works(z.device)
    )


@lru_cache
def kernel_works(device: torch.device) -> bool:
    """Whether the kernel can be compiled for a device and gives there what the plain loop gives, tried once on a small
    problem. Where it cannot, a warning says why: training is slower then, not wrong."""
    with ThreadPoolExecutor(1) as outside:  # a thread of its own stands outside of every `torch.func` transform
        failure = outside.submit(_kernel_failure, device).result()
    if failure:
        warnings.warn(f"feedback loop: the plain loop instead of the GPU's kernel, slower ({failure})", stacklevel=2)
    return failure is None


def _kernel_failure(device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    loop = TemporalFeedbackLoop(40, 3)
    with torch.no_grad():
        for parameter in loop.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    loop, z = loop.to(device), torch.randn(2, 5, 40, generator=generator).to(device).requires_grad_()
    leaves = [z, *loop.parameters()]
    try:
        found, expected = (
            (output, *torch.autograd.grad(output.square().sum(), leaves))
            for output in (loop.scanned(z), loop.unrolled(z))
        )
    except Exception as error:  # a missing compiler, a GPU that Triton does not know
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    difference = max(
        float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, expected, strict=True)
    )
    # Above what TF32 products in W_z z would explain, which both sides share; NaN is above everything.
    return None if difference < 1e-3 else f"its results differ by {difference:.1e}"


class SequentialAdjoint(torch.autograd.Function):
    """The loop without a recorded graph, and its exact gradient.

    With logits a_t, y_t = softmax(a_t) and the active units D_t = diag(pre-activation > 0), the only path
    from one step to the next is N_t = da_t / dy_{t-1} = W_c D_t W_y, a K x K matrix. The gradient
    alpha_t = dL / da_t obeys

        alpha_t = (g_t - y_t sum(g_t)) + S_t N_{t+1}^T alpha_{t+1},    S_t = diag(y_t) - y_t y_t^T,

    g_t being the gradient of log y_t. One matrix product gives every N_t (active units times the K^2 products
    of a row of W_c with a column of W_y), the recursion works on K numbers per session, and what remains is
    the gradient of three linear layers over all steps at once.

    Inside, the order is (T, K, B): a softmax over 4 numbers is slow along the last axis, and a step is one
    contiguous block.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, fused: Tensor, bias: Tensor, previous: Tensor, classifier: Tensor,
        classifier_bias: Tensor, detach: bool,
    ) -> Tensor:  # fmt: skip
        """(B, T, width) -> (B, T, K) log-probabilities."""
        (sessions, steps, width), classes = z.shape, len(classifier)
        hidden = z.new_empty(steps, sessions, width)
        beliefs = z.new_full((steps + 1, classes, sessions), 1.0 / classes)  # y_0 .. y_T
        logits = classifier_bias[:, None].repeat(steps, 1, sessions)
        transposed = previous.t().contiguous()
        # Views of every step, made once: making them inside the loop would cost as much as the arithmetic.
        before, after = beliefs.transpose(1, 2).unbind(0), beliefs[1:].unbind(0)
        rows, columns, scores = hidden.unbind(0), hidden.transpose(1, 2).unbind(0), logits.unbind(0)
        for block in _blocks(steps, sessions):
            flat = z[:, block].transpose(0, 1).reshape(-1, width)
            torch.addmm(bias, flat, fused.t(), out=hidden[block].view(-1, width))
            for t in range(block.start, block.stop):
                rows[t].addmm_(before[t], transposed).relu_()
                scores[t].addmm_(classifier, columns[t])
                torch.softmax(scores[t], 0, out=after[t])
        ctx.save_for_backward(z, hidden, beliefs, fused, previous, classifier)
        ctx.detach = detach
        return F.log_softmax(logits, dim=1).permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of ctx
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        """(B, T, K) gradient of the log-probabilities -> gradient of every argument of ``forward``."""
        z, hidden, beliefs, fused, previous, classifier = ctx.saved_tensors
        (steps, sessions, width), classes = hidden.shape, len(classifier)
        y = beliefs[1:].transpose(0, 1).contiguous()  # (K, T, B) from here on
        g = gradient.permute(2, 1, 0).contiguous()
        alpha = torch.addcmul(g, y, g.sum(0, keepdim=True), value=-1)
        if not ctx.detach:
            _add_later_steps(alpha, _transitions(y, hidden, previous, classifier))
        before = beliefs[:-1].transpose(0, 1)
        z_gradient = z.new_empty(z.shape) if ctx.needs_input_grad[0] else None
        fused_gradient, previous_gradient = torch.zeros_like(fused), torch.zeros_like(classifier)
        classifier_gradient = torch.zeros_like(classifier)
        # Some sessions at a time, whole: their part of z and of its gradient is one piece of memory.
        for group in _blocks(sessions, steps):
            active = hidden[:, group].transpose(0, 1).reshape(-1, width)
            logit_gradient = alpha[..., group].transpose(1, 2).reshape(classes, -1)
            delta = (logit_gradient.t() @ classifier).mul_(active.sign())
            fused_gradient.addmm_(delta.t(), z[group].reshape(-1, width))
            previous_gradient.addmm_(before[..., group].transpose(1, 2).reshape(classes, -1), delta)
            classifier_gradient.addmm_(logit_gradient, active)
            if z_gradient is not None:
                torch.mm(delta, fused, out=z_gradient[group].view(-1, width))
        bias_gradient = previous_gradient.sum(0)  # since every belief sums to one
        return (
            z_gradient, fused_gradient, bias_gradient, previous_gradient.t(),
            classifier_gradient, alpha.sum((1, 2)), None,
        )  # fmt: skip


def _blocks(count: int, rows_each: int) -> list[slice]:
    """0 .. count in consecutive groups of about BLOCK_ROWS rows, ``rows_each`` for each of them."""
    size = max(1, BLOCK_ROWS // rows_each)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _transitions(y: Tensor, hidden: Tensor, previous: Tensor, classifier: Tensor) -> Tensor:
    """y (K, T, B), hidden (T, B, width) -> S_t N_{t+1}^T, which multiplies alpha_{t+1}, (K, K, T-1, B)."""
    (steps, sessions, width), classes = hidden.shape, len(classifier)
    # Row (j, k) is W_y's column j times W_c's row k.
    products = (previous.t()[:, None] * classifier).reshape(-1, width)
    transposed = y.new_empty(classes**2, steps, sessions)
    for block in _blocks(steps, sessions):
        active = hidden[block].view(-1, width).sign()
        transposed[:, block] = (products @ active.t()).view(classes**2, -1, sessions)
    later = transposed.view(classes, classes, steps, sessions)[:, :, 1:]
    belief = y[:, None, :-1]
    return belief * (later - (belief * later).sum(0, keepdim=True))


def _add_later_steps(alpha: Tensor, transitions: Tensor) -> None:
    """The recursion, backwards and in place: alpha_t += transitions_t alpha_{t+1}, alpha being (K, T, B)."""
    states = alpha.permute(1, 2, 0).unsqueeze(-1).unbind(0)
    matrices = transitions.permute(2, 3, 0, 1).unbind(0)
    for t in range(len(matrices) - 1, -1, -1):
        states[t].baddbmm_(matrices[t], states[t + 1])
