"""The Temporal Feedback Loop on a GPU: one Triton kernel over all steps, and one for its exact gradient.

Step by step, the loop is some fifteen tiny kernels per time step, each waiting for the one before; nearly all of the
time is launching. Sessions are independent, so here every session is one program that walks through time with the
weights of the K-dimensional path in its registers: a step is one read of W_z z_t, K products, a softmax.

``FeedbackScan`` has a gradient and a rule for ``vmap``, so ordinary training and fused training of stacked
configurations both go through it. Everything is computed in float32, whatever is stored.

Symbols are those of ``feedback.SequentialAdjoint``, which does the same on a CPU.
"""

# What stands in a kernel is Triton's language, which only looks like Python to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP_WIDTH = 256
"""Hidden units per warp: eight per thread, so that four classes' weights and their gradients stay in registers."""


@triton.jit
def _scan_kernel(
    hoisted: tl.tensor, previous: tl.tensor, classifier: tl.tensor, bias: tl.tensor,
    log_beliefs: tl.tensor, hidden: tl.tensor,
    sessions: tl.tensor, steps: tl.tensor, width: tl.tensor, classes: tl.tensor,
    WIDTH: tl.constexpr, CLASSES: tl.constexpr,
) -> None:  # fmt: skip
    """Row r = (configuration, session): log y_1 .. log y_T and the units behind them."""
    row = tl.program_id(0).to(tl.int64)
    configuration = row // sessions
    unit, kind = tl.arange(0, WIDTH), tl.arange(0, CLASSES)
    here, known = unit < width, kind < classes
    both = known[:, None] & here[None, :]
    weights = configuration * classes * width + kind[:, None] * width + unit[None, :]
    inward = tl.load(previous + weights, mask=both, other=0.0).to(tl.float32)
    outward = tl.load(classifier + weights, mask=both, other=0.0).to(tl.float32)
    offset = tl.load(bias + configuration * classes + kind, mask=known, other=0.0).to(tl.float32)
    belief = tl.where(known, 1.0 / classes, 0.0)
    place = row * steps * width + unit
    # Two steps ahead are on their way while one is computed: a read takes longer than a step.
    following = tl.load(hoisted + place, mask=here, other=0.0)
    later = tl.load(hoisted + place + width, mask=here & (steps > 1), other=0.0)
    for t in range(steps):
        current, following = following, later
        later = tl.load(hoisted + place + (t + 2) * width, mask=here & (t + 2 < steps), other=0.0)
        active = tl.maximum(current.to(tl.float32) + tl.sum(inward * belief[:, None], 0), 0.0)
        logits = tl.sum(outward * active[None, :], 1) + offset
        logits = tl.where(known, logits, -float("inf"))
        logits = logits - tl.max(logits, 0)
        log_belief = logits - tl.log(tl.sum(tl.exp(logits), 0))
        belief = tl.exp(log_belief)
        tl.store(hidden + place + t * width, active, mask=here)
        tl.store(log_beliefs + (row * steps + t) * classes + kind, log_belief, mask=known)


@triton.jit
def _adjoint_kernel(
    gradient: tl.tensor, log_beliefs: tl.tensor, hidden: tl.tensor, previous: tl.tensor, classifier: tl.tensor,
    delta: tl.tensor, previous_gradient: tl.tensor, classifier_gradient: tl.tensor, bias_gradient: tl.tensor,
    sessions: tl.tensor, steps: tl.tensor, width: tl.tensor, classes: tl.tensor,
    WIDTH: tl.constexpr, CLASSES: tl.constexpr, DETACH: tl.constexpr,
) -> None:  # fmt: skip
    """Row r, backwards in time: alpha_T .. alpha_1, the gradient of W_z z, and the row's part of the weights'."""
    row = tl.program_id(0).to(tl.int64)
    configuration = row // sessions
    unit, kind = tl.arange(0, WIDTH), tl.arange(0, CLASSES)
    here, known = unit < width, kind < classes
    both = known[:, None] & here[None, :]
    place_of_weights = kind[:, None] * width + unit[None, :]
    weights = configuration * classes * width + place_of_weights
    inward = tl.load(previous + weights, mask=both, other=0.0).to(tl.float32)
    outward = tl.load(classifier + weights, mask=both, other=0.0).to(tl.float32)
    inward_sum = tl.zeros((CLASSES, WIDTH), tl.float32)
    outward_sum = tl.zeros((CLASSES, WIDTH), tl.float32)
    offset_sum = tl.zeros((CLASSES,), tl.float32)
    from_later = tl.zeros((CLASSES,), tl.float32)  # N_{t+1}^T alpha_{t+1}
    place = row * steps * width + unit
    answer = row * steps * classes + kind
    last = steps - 1
    following = tl.load(hidden + place + last * width, mask=here, other=0.0)
    later = tl.load(hidden + place + (last - 1) * width, mask=here & (last > 0), other=0.0)
    log_belief = tl.load(log_beliefs + answer + last * classes, mask=known, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + answer + last * classes, mask=known, other=0.0).to(tl.float32)
    for back in range(steps):
        t = last - back
        active, following = following, later
        later = tl.load(hidden + place + (t - 2) * width, mask=here & (t > 1), other=0.0)
        earlier = tl.load(log_beliefs + answer + (t - 1) * classes, mask=known & (t > 0), other=0.0).to(tl.float32)
        earlier_upstream = tl.load(gradient + answer + (t - 1) * classes, mask=known & (t > 0), other=0.0)
        belief = tl.where(known, tl.exp(log_belief), 0.0)
        before = tl.where(known, tl.where(t > 0, tl.exp(earlier), 1.0 / classes), 0.0)
        # The gradient of log y_t, and through y_t that of everything later, both as one of the logits.
        alpha = upstream - belief * tl.sum(upstream, 0)
        alpha += belief * (from_later - tl.sum(belief * from_later, 0))
        change = tl.where(active > 0.0, tl.sum(outward * alpha[:, None], 0), 0.0)
        tl.store(delta + place + t * width, change, mask=here)
        outward_sum += alpha[:, None] * active[None, :].to(tl.float32)
        inward_sum += before[:, None] * change[None, :]
        offset_sum += alpha
        if not DETACH:
            from_later = tl.sum(inward * change[None, :], 1)
        log_belief, upstream = earlier, earlier_upstream.to(tl.float32)
    own = row * classes * width + place_of_weights
    tl.store(previous_gradient + own, inward_sum, mask=both)
    tl.store(classifier_gradient + own, outward_sum, mask=both)
    tl.store(bias_gradient + row * classes + kind, offset_sum, mask=known)


def scan(hoisted: Tensor, previous: Tensor, classifier: Tensor, bias: Tensor, *, detach: bool) -> Tensor:
    """One configuration: W_z z + b, (B, T, width), W_y (width, K), W_c (K, width), its bias -> (B, T, K) log y."""
    inputs = (hoisted[None], previous.t()[None], classifier[None], bias[None])
    return FeedbackScan.apply(*inputs, detach)[0][0]


class FeedbackScan(torch.autograd.Function):
    """C stacked configurations: W_z z + b (C, B, T, width), W_y transposed (C, K, width), W_c (C, K, width) and its
    bias (C, K) -> log y (C, B, T, K) in float32, and the hidden units (C, B, T, width), which the gradient needs."""

    @staticmethod
    def forward(
        hoisted: Tensor, previous: Tensor, classifier: Tensor, bias: Tensor, detach: bool
    ) -> tuple[Tensor, Tensor]:
        configurations, sessions, steps, width = hoisted.shape
        classes = classifier.shape[1]
        log_beliefs = hoisted.new_empty((configurations, sessions, steps, classes), dtype=torch.float32)
        hidden = torch.empty(hoisted.shape, dtype=hoisted.dtype, device=hoisted.device)
        with torch.cuda.device_of(hoisted):  # Triton launches on the current device
            _scan_kernel[(configurations * sessions,)](
                hoisted.contiguous(), previous.contiguous(), classifier.contiguous(), bias.contiguous(),
                log_beliefs, hidden, sessions, steps, width, classes, **_shape(width, classes),
            )  # fmt: skip
        return log_beliefs, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, previous, classifier, _, ctx.detach = inputs
        log_beliefs, hidden = output
        ctx.mark_non_differentiable(hidden)
        ctx.save_for_backward(log_beliefs, hidden, previous, classifier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*FeedbackAdjoint.apply(gradients[0], *ctx.saved_tensors, ctx.detach), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _joined(FeedbackScan, info.batch_size, in_dims, arguments)


class FeedbackAdjoint(torch.autograd.Function):
    """The gradient of log y, (C, B, T, K) -> that of the four tensors that ``FeedbackScan`` takes.

    A Function of its own because ``vmap`` over ``grad`` has to see a rule for it; it has no gradient itself.
    """

    @staticmethod
    def forward(
        gradient: Tensor, log_beliefs: Tensor, hidden: Tensor, previous: Tensor, classifier: Tensor, detach: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        configurations, sessions, steps, width = hidden.shape
        classes = classifier.shape[1]
        delta = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        # Every session writes its own part, summed afterwards: atomic additions would depend on who comes first.
        parts = hidden.new_zeros((2, configurations, sessions, classes, width), dtype=torch.float32)
        offsets = hidden.new_zeros((configurations, sessions, classes), dtype=torch.float32)
        with torch.cuda.device_of(hidden):
            _adjoint_kernel[(configurations * sessions,)](
                gradient.contiguous(), log_beliefs.contiguous(), hidden.contiguous(),
                previous.contiguous(), classifier.contiguous(), delta, parts[0], parts[1], offsets,
                sessions, steps, width, classes, DETACH=detach, **_shape(width, classes),
            )  # fmt: skip
        inward, outward = (part.sum(1).to(classifier.dtype) for part in parts)
        return delta, inward, outward, offsets.sum(1).to(classifier.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to remember."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("the feedback kernel has one derivative: use TemporalFeedbackLoop.unrolled for the second")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _joined(FeedbackAdjoint, info.batch_size, in_dims, arguments)


def _joined(
    function: type[torch.autograd.Function], size: int, axes: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The rule of ``vmap`` for tensors that all begin with the axis of configurations: one more such axis joins it."""
    *tensors, detach = arguments
    every = [
        tensor.movedim(axis, 0) if axis is not None else tensor.expand(size, *tensor.shape)
        for tensor, axis in zip(tensors, axes, strict=False)
    ]
    found = function.apply(*(tensor.flatten(0, 1) for tensor in every), detach)
    return tuple(x.unflatten(0, (size, -1)) for x in found), (0,) * len(found)


def _shape(width: int, classes: int) -> dict[str, int]:
    """Sizes that a kernel is compiled for."""
    padded = triton.next_power_of_2(max(width, 32))
    return {
        "WIDTH": padded,
        "CLASSES": triton.next_power_of_2(max(classes, 2)),
        "num_warps": max(1, padded // WARP_WIDTH),
    }
