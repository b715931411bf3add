"""The GPU's kernels of the feedback loop: interpreted on a CPU they give what the loop gives; they compile for GPUs.

On a machine with a GPU the last tests run them there."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from edu_emotionnet.feedback import TemporalFeedbackLoop, kernel_works

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for GPUs alone")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

COMPARE = textwrap.dedent(
    """
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap
    from edu_emotionnet.feedback import TemporalFeedbackLoop, _kernel_failure

    def differences(found, expected):
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]

    class Way(torch.nn.Module):
        def __init__(self, loop, name):
            super().__init__()
            self.loop, self.name = loop, name
        def forward(self, z):
            return getattr(self.loop, self.name)(z)

    torch.manual_seed(0)
    # (sessions, steps, width, classes): widths and classes that are no powers of two, one step, more than one warp
    for shape in ((3, 7, 32, 4), (2, 5, 20, 3), (2, 1, 40, 4), (1, 6, 300, 7), (2, 6, 8, 1)):
        for detach in (False, True):
            sessions, steps, width, classes = shape
            loop = TemporalFeedbackLoop(width, classes, detach=detach)
            z = torch.randn(sessions, steps, width, requires_grad=True)
            upstream = torch.randn(sessions, steps, classes)
            leaves = [z, *loop.parameters()]
            results = []
            for way in (loop.scanned, loop.unrolled):
                output = way(z)
                results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
            if classes > 1:  # at one class every gradient is zero
                assert max(differences(*results)) < 5e-6, (shape, detach, differences(*results))
            else:
                assert not any(value.any() for value in results[0])
            stack, _ = stack_module_state([TemporalFeedbackLoop(width, classes, detach=detach) for _ in range(3)])
            stack = {f"loop.{name}": value.detach() for name, value in stack.items()}
            results = []
            for name in ("scanned", "unrolled"):
                module = Way(loop, name)
                def loss(parameters):
                    return (functional_call(module, parameters, (z.detach(),)) * upstream).sum()
                results.append(list(vmap(grad(loss))(stack).values()))
            if classes > 1:
                assert max(differences(*results)) < 5e-6, (shape, detach, "stacked", differences(*results))
    bfloat = TemporalFeedbackLoop(32, 4).bfloat16()
    z = torch.randn(2, 9, 32).bfloat16()
    assert bfloat.scanned(z).dtype == torch.bfloat16
    torch.testing.assert_close(bfloat.scanned(z), bfloat.unrolled(z), rtol=0.02, atol=0.02)
    loop, z = TemporalFeedbackLoop(8, 2), torch.randn(1, 3, 8, requires_grad=True)
    first, = torch.autograd.grad(loop.scanned(z).sum(), z, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        assert "one derivative" in str(error), error
    else:
        raise AssertionError("a second derivative was given")
    assert _kernel_failure(torch.device("cpu")) is None
    print("all equal")
    """
)


def test_interpreted_on_a_cpu_the_kernels_give_what_the_loop_gives(tmp_path: Path) -> None:
    """Outputs and gradients, one configuration and stacked ones, in a process of its own: Triton decides at import."""
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (run.returncode, run.stdout.strip()) == (0, "all equal"), run.stderr[-2000:]


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("ones", [{}, {"steps": 1, "sessions": 1}], ids=["any size", "one step"])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability: int, ones: dict[str, int], tmp_path: Path) -> None:
    """To machine code of a Turing, Ampere and Hopper card; at the paper's size everything stays in registers.

    A size of one is a constant to Triton's compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from edu_emotionnet import feedback_kernel

    for kernel, own in (
        (feedback_kernel._scan_kernel, {"WIDTH": 256, "CLASSES": 4}),
        (feedback_kernel._adjoint_kernel, {"WIDTH": 256, "CLASSES": 4, "DETACH": False}),
    ):
        constants = own | ones
        sizes = {"sessions", "steps", "width", "classes"}
        signature = {
            name: "constexpr" if name in constants else "i32" if name in sizes else "*fp32" for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
        binary = tmp_path / f"{kernel.fn.__name__}.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        inspector = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        used = subprocess.run([inspector, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
        assert " STACK:0 " in used.stdout, used.stdout


def test_where_the_kernels_do_not_work_a_warning_says_so_and_the_loop_is_plain() -> None:
    """A device that Triton has no driver for, as a CPU is to the compiled kernels."""
    kernel_works.cache_clear()
    with pytest.warns(UserWarning, match="plain loop instead of the GPU's kernel, slower"):
        assert not kernel_works(torch.device("cpu"))


@needs_gpu
def test_on_a_gpu_the_kernels_serve_and_give_what_the_loop_gives() -> None:
    torch.manual_seed(0)
    loop = TemporalFeedbackLoop(256, 4).cuda()
    z = torch.randn(16, 100, 256, device="cuda", requires_grad=True)
    assert kernel_works(z.device)
    results = []
    for way in (loop, loop.unrolled):
        output = way(z)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), [z, *loop.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
