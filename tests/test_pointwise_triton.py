"""Gate, RMSNorm and decay rates in Triton against float64: on a GPU, else in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from backbones.ops.fused.layer_norm.operator import Normalise
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
pytestmark = quiet

SHAPES = [(1, 1, 5), (2, 7, 1, 24), (3, 50, 384), (70, 100)]


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from backbones.ops.fused.gate import triton as gate

    generator = torch.Generator().manual_seed(0)
    # Halves of the same rows, as a projection gives them.
    x, z = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype).chunk(2, -1)
    grad = torch.randn(shape, generator=generator).to(dtype)
    exact_x, exact_z = (t.double().requires_grad_() for t in (x, z))
    expected = exact_x * F.silu(exact_z) * 0.5
    wanted = (expected, *torch.autograd.grad(expected, (exact_x, exact_z), grad.double()))
    x, z, grad = (t.to(DEVICE) for t in (x, z, grad))
    for found, want in zip((gate.forward(x, z, 0.5), *gate.backward(grad, x, z, 0.5)), wanted, strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        assert error(found, want.detach()) <= OPERATOR[str(dtype).removeprefix("torch.")]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).add(1).to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator) + 0.5
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(exact[0], shape[-1:], exact[1], 1e-5)
    given = [t.to(DEVICE).requires_grad_() for t in (x, weight)]
    y = Normalise.apply(*given, None, 1e-5, dtype, False)
    found = (y, *torch.autograd.grad(y, given, grad.to(DEVICE)))
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b.detach()) <= OPERATOR[str(dtype).removeprefix("torch.")]


@needs_kernels
def test_decay_rates() -> None:
    from backbones.ops.scan.triton.decay import negative_exp

    x = torch.randn(3, 70, 7, generator=torch.Generator().manual_seed(0))
    assert error(negative_exp(x.to(DEVICE)), -x.double().exp()) <= OPERATOR["float32"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_kept_kernel_is_not_called_for_what_it_was_not_compiled_for() -> None:
    from backbones.ops.fused.gate import triton as gate

    for dtype in (torch.float32, torch.bfloat16):
        for offset in (0, 1, 8):  # rows that begin at any address
            for c in (1, 15, 16, 17):
                x, z = (torch.randn(40 * c + offset, device="cuda").to(dtype)[offset:].view(40, c) for _ in range(2))
                for _ in range(2):  # compiled, then kept
                    want = x.double() * F.silu(z.double()) * 0.5
                    found = gate.forward(x, z, 0.5)
                    assert error(found, want.cpu()) <= OPERATOR[str(dtype).removeprefix("torch.")]
