"""The fast feedback loop computes what the plain one does, wherever it is used, and the benchmark writes its figures.

How much faster it is, is the benchmark's own figure: a machine that tests run on is too busy for it.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from benchmarks import feedback_loop as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

from edu_emotionnet.feedback import TemporalFeedbackLoop

FAST = "SequentialAdjointBackward"


def problem(
    *, sessions=3, steps=7, width=6, classes=4, detach=False, scale=1.0, seed=0, dtype=torch.float64
) -> tuple[TemporalFeedbackLoop, Tensor]:
    torch.manual_seed(seed)
    loop = TemporalFeedbackLoop(width, classes, detach=detach).to(dtype)
    assert loop.previous is not None
    with torch.no_grad():
        loop.previous.weight.mul_(scale)  # a strong feedback carries gradients over many steps
    return loop, torch.randn(sessions, steps, width, dtype=dtype).requires_grad_()


def gradients(output: Tensor, loop: nn.Module, z: Tensor) -> list[Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return list(torch.autograd.grad(output, [z, *loop.parameters()], upstream.to(output.dtype)))


@settings(max_examples=40, deadline=None)
@given(
    sessions=st.integers(1, 9),
    steps=st.integers(1, 40),
    width=st.integers(1, 9),
    classes=st.integers(2, 6),
    detach=st.booleans(),
    scale=st.floats(0.1, 30.0),
    seed=st.integers(0, 1000),
)
def test_same_output_and_gradients_as_the_plain_loop(sessions, steps, width, classes, detach, scale, seed):
    loop, z = problem(
        sessions=sessions, steps=steps, width=width, classes=classes, detach=detach, scale=scale, seed=seed
    )
    fast, plain = loop(z), loop.unrolled(z)
    assert (type(fast.grad_fn).__name__ == FAST) == (steps > 1)
    # A strong feedback need not contract: it may enlarge a rounding at every step. Then the measure is how far the
    # plain loop itself moves where its input does by some roundings.
    moved = loop.unrolled(z * (1 + 1e-14))
    torch.testing.assert_close(fast, plain, rtol=1e-11, atol=max(1e-12, farthest(moved, plain)))
    results = (gradients(output, loop, z) for output in (fast, plain, moved))
    for ours, theirs, shifted in zip(*results, strict=True):
        # Rounding adds up over the steps of the recursion: a gradient of n steps is n roundings from exact.
        rounding = 1e-13 * max(10, 2 * steps)
        assert farthest(ours, theirs) <= max(rounding * max(1.0, float(theirs.abs().max())), farthest(shifted, theirs))


def farthest(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).detach().abs().max())


def test_blocks_of_steps_make_no_difference(monkeypatch):
    loop, z = problem(sessions=3, steps=50)
    whole = [loop(z), *gradients(loop(z), loop, z)]
    monkeypatch.setattr("edu_emotionnet.feedback.BLOCK_ROWS", 7)  # two steps a block
    split = [loop(z), *gradients(loop(z), loop, z)]
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_single_precision_is_as_accurate_as_the_plain_loop():
    exact_loop, exact_z = problem(sessions=16, steps=100, width=64)
    exact = [x.detach() for x in gradients(exact_loop.unrolled(exact_z), exact_loop, exact_z)]
    loop, z = copy.deepcopy(exact_loop).float(), exact_z.detach().float().requires_grad_()

    def error(output: Tensor) -> list[float]:
        found = gradients(output, loop, z)
        return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]

    fast, plain = error(loop(z)), error(loop.unrolled(z))
    assert fast[0] <= 3e-7  # the gradient of z, which every encoder sees
    # Gradients of parameters add up 1,600 terms that cancel in part: the plain loop's own rounding is the measure.
    assert all(ours <= max(3e-7, 2 * theirs) for ours, theirs in zip(fast, plain, strict=True))


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_agrees_with_finite_differences(detach):
    loop, z = problem(sessions=2, steps=4, width=3, classes=3, scale=3.0, seed=5)
    loop.detach = False
    names = [name for name, _ in loop.named_parameters()]

    def run(z: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(loop, dict(zip(names, parameters, strict=True)), (z,))

    assert torch.autograd.gradcheck(run, (z, *loop.parameters()))
    if detach:  # finite differences see through a detached value: the derivative must differ there, and only there
        loop.detach = True
        cut = gradients(loop(z), loop, z)
        loop.detach = False
        assert not torch.allclose(cut[0][:, 0], gradients(loop(z), loop, z)[0][:, 0])
        assert torch.allclose(cut[0][:, -1], gradients(loop(z), loop, z)[0][:, -1])


def test_frozen_inputs_and_frozen_parameters():
    loop, z = problem()
    expected = gradients(loop.unrolled(z), loop, z)
    frozen = loop(z.detach())  # precomputed features: no gradient of z is asked for
    found = torch.autograd.grad(frozen.sum(), list(loop.parameters()))
    plain = torch.autograd.grad(loop.unrolled(z.detach()).sum(), list(loop.parameters()))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    loop.requires_grad_(False)
    upstream = torch.randn(loop(z).shape, generator=torch.Generator().manual_seed(7), dtype=z.dtype)
    (only_z,) = torch.autograd.grad(loop(z), z, upstream)
    torch.testing.assert_close(only_z, expected[0], rtol=1e-10, atol=1e-12)


def test_inference_and_inputs_that_are_not_contiguous():
    loop, z = problem()
    with torch.no_grad():
        torch.testing.assert_close(loop(z), loop.unrolled(z))
    with torch.inference_mode():
        torch.testing.assert_close(loop(z), loop.unrolled(z))
    turned = z.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for a, b in zip(gradients(loop(turned), loop, turned), gradients(loop(z), loop, z), strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_can_be_used_twice_and_a_second_derivative_needs_the_plain_loop():
    loop, z = problem()
    output = loop(z).square().sum()
    first = torch.autograd.grad(output, z, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(output, z)[0], first)

    slope = torch.autograd.grad(loop(z).square().sum(), z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    plain = torch.autograd.grad(loop.unrolled(z).square().sum(), z, create_graph=True)[0]
    plain.sum().backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_function_transforms_see_the_plain_loop():
    loop, z = problem()
    z = z.detach()
    direction = torch.randn_like(z)
    parameters = dict(loop.named_parameters())

    forward = jvp(loop, (z,), (direction,))[1]
    torch.testing.assert_close(forward, jvp(loop.unrolled, (z,), (direction,))[1])
    full = jacrev(loop)(z)
    torch.testing.assert_close(torch.einsum("btkijd,ijd->btk", full, direction), forward)

    of_parameters = grad(lambda p: functional_call(loop, p, (z,)).square().sum())(parameters)
    loop(z).square().sum().backward()
    for name, parameter in loop.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(of_parameters[name], parameter.grad)

    # A call that has nothing to do with the transform around it must work as well.
    assert jvp(lambda x: x * loop(z).sum().detach(), (torch.ones(1),), (torch.ones(1),))[1].isfinite().all()


def test_forward_mode_outside_function_transforms():
    loop, z = problem()
    direction = torch.randn_like(z)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(loop(forward_ad.make_dual(z.detach(), direction))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, jvp(loop.unrolled, (z.detach(),), (direction,))[1])


def test_several_models_in_one_stacked_call():
    loops = [problem(seed=seed)[0] for seed in range(3)]
    z = problem()[1].detach()
    parameters, buffers = stack_module_state(loops)  # pyright: ignore[reportArgumentType]
    template = copy.deepcopy(loops[0]).to("meta")

    def run(parameters, buffers, z):
        return functional_call(template, (parameters, buffers), (z,))

    stacked = vmap(run, in_dims=(0, 0, None))(parameters, buffers, z)
    for i, loop in enumerate(loops):
        torch.testing.assert_close(stacked[i], loop(z))
    trained = vmap(grad(lambda p, b, z: run(p, b, z).square().sum()), in_dims=(0, 0, None))(parameters, buffers, z)
    loops[1](z).square().sum().backward()
    torch.testing.assert_close(trained["previous.weight"][1], loops[1].previous.weight.grad)


def test_low_precision_takes_the_plain_loop():
    loop, z = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loop(z)
    assert type(mixed.grad_fn).__name__ != FAST
    torch.testing.assert_close(mixed.float(), loop(z), atol=0.05, rtol=0.05)
    half = copy.deepcopy(loop).bfloat16()
    assert type(half(z.bfloat16()).grad_fn).__name__ != FAST


def test_step_by_step_gives_the_same_sequence():
    loop, z = problem()
    whole, belief = loop(z), torch.full((3, 4), 0.25, dtype=z.dtype)
    for t in range(z.shape[1]):
        log_belief = loop.step(loop.fused(z[:, t]), belief)
        torch.testing.assert_close(whole[:, t], log_belief)
        belief = log_belief.exp()


def test_without_feedback_every_step_stands_alone():
    loop = TemporalFeedbackLoop(6, 4, feedback=False)
    z = torch.randn(2, 5, 6)
    torch.testing.assert_close(loop(z)[:, 3], loop(z[:, 3:4])[:, 0])
    assert set(loop.state_dict()) == {"fused.weight", "fused.bias", "classifier.weight", "classifier.bias"}


def test_benchmark_refuses_to_time_variants_that_disagree(monkeypatch):
    monkeypatch.setitem(benchmark.VARIANTS, "unrolled", lambda loop, z: loop.unrolled(z * 1.001))
    with pytest.raises(AssertionError, match="adjoint - unrolled"):
        benchmark.measure(benchmark.Case(sessions=2, steps=5, slower="unrolled", rounds=1))


def test_benchmark_writes_what_it_measured(tmp_path, monkeypatch):
    case = benchmark.Case(sessions=2, steps=10, slower="sliced", rounds=2, target=1e9)
    monkeypatch.setattr(benchmark, "QUICK_CASES", (case,))
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--quick", "--output", str(tmp_path / "out" / "result.json")])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["environment"]["torch"] == torch.__version__ and record["environment"]["threads"] == 1
    (measured,) = record["cases"]
    assert measured["ratio"]["min"] > 0 and measured["met"] is False
