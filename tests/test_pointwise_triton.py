"""Gate, RMSNorm and decay rates in Triton against float64: on a GPU, else in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from backbones.ops.fused.layer_norm.operator import normalise, residual_normalise
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
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 9, 5), (2, 70, 24), (3, 50, 384)])
def test_excited_gate(shape: tuple[int, int, int], gated: bool, dtype: torch.dtype) -> None:
    from backbones.ops.fused.gate import triton as gate

    x, z = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype).chunk(2, -1)
    logits, grad = torch.randn(shape[0], shape[2]).to(dtype), torch.randn(shape).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, logits, z)]
    expected = exact[0] * torch.sigmoid(exact[1]).unsqueeze(1) * (F.silu(exact[2]) if gated else 1)
    exact = exact if gated else exact[:2]
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    x, logits, z, grad = (t.to(DEVICE) for t in (x, logits, z, grad))
    given = (x, logits, z if gated else None)
    found = (gate.excited(*given), *gate.excited_backward(grad, *given))
    assert gated or found[3] is None
    for a, b in zip(found, wanted, strict=False):
        assert a.dtype == dtype and a.is_contiguous()
        assert error(a, b.detach()) <= OPERATOR[str(dtype).removeprefix("torch.")]


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
    y = normalise(*given, None, 1e-5, dtype, False)
    found = (y, *torch.autograd.grad(y, given, grad.to(DEVICE)))
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b.detach()) <= OPERATOR[str(dtype).removeprefix("torch.")]


@needs_kernels
@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("branch_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", ["both", "stream", "norm"])
def test_norm_of_a_residual_sum(branch_dtype: torch.dtype | None, centred: bool, read: str) -> None:
    """The sum, its norm, and gradients that come through either or both, in float32 but for the branch."""
    generator = torch.Generator().manual_seed(0)
    x, branch, grad, stream = (torch.randn(3, 7, 20, generator=generator) for _ in range(4))
    weight, bias = torch.rand(20, generator=generator) + 0.5, torch.randn(20, generator=generator)
    branch = None if branch_dtype is None else branch.to(branch_dtype)
    inputs = [x, branch, weight, bias if centred else None]
    exact = [None if t is None else t.double().requires_grad_() for t in inputs]
    given = [None if t is None else t.to(DEVICE).requires_grad_() for t in inputs]

    def used(total: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        like = {"dtype": total.dtype, "device": total.device}
        parts = {"norm": (y * grad.to(**like)).sum(), "stream": (total * stream.to(**like)).sum()}
        return sum(parts.values()) if read == "both" else parts[read]

    total = exact[0] if branch is None else exact[0] + exact[1]
    norm = F.layer_norm(total, (20,), *exact[2:], 1e-5) if centred else F.rms_norm(total, (20,), exact[2], 1e-5)
    found = residual_normalise(*given, 1e-5, torch.float32, centred)
    wanted = torch.autograd.grad(used(total, norm), [t for t in exact if t is not None], allow_unused=True)
    gradients = torch.autograd.grad(used(*found), [t for t in given if t is not None], allow_unused=True)
    for a, b in zip((*found, *gradients), (total, norm, *wanted), strict=True):
        assert (a is None) == (b is None)
        limit = OPERATOR["bfloat16" if a is not None and a.dtype == torch.bfloat16 else "float32"]
        assert a is None or error(a, b.detach()) <= limit


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 3), (7, 16), (300, 40)])
def test_column_sums(shape: tuple[int, int]) -> None:
    from backbones.ops.column_sums import column_sums

    parts = torch.randn(shape)
    assert error(column_sums(parts.to(DEVICE)), parts.double().sum(0)) <= OPERATOR["float32"]


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
