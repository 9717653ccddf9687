"""The gate and the norms against PyTorch's in float64, where the kernel runs and where PyTorch takes over."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import ops
from backbones.layers.norm import LayerNorm, RMSNorm
from backbones.ops import layer_norm, native, rms_norm, silu_gate
from backbones.ops.fused.gate import operator as gate
from backbones.ops.fused.layer_norm import cpu as norm
from tests.test_ops_cpu import ISAS, instruction_set, threads
from tests.tolerances import OPERATOR

SHAPES = [(1, 1, 5), (2, 7, 1, 24), (3, 50, 384), (700, 100)]
SCALE, EPS = 0.5, 1e-5
needs_kernel = pytest.mark.skipif(ops.backends()["cpu"] is not None, reason="needs the compiled kernel")


def leaves(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z, a weight and a gradient; x and z are halves of the same rows."""
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(*shape[:-1], 2 * shape[-1], generator=g).to(dtype).chunk(2, -1)
    weight = torch.rand(shape[-1], generator=g) + 0.5
    return x.requires_grad_(), z.requires_grad_(), weight.requires_grad_(), torch.randn(shape, generator=g).to(dtype)


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def check_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, z, _, grad = leaves(shape, dtype)
    exact_x, exact_z = (t.detach().double().requires_grad_() for t in (x, z))
    y, expected = silu_gate(x, z, SCALE), exact_x * F.silu(exact_z) * SCALE
    found = torch.autograd.grad(y, (x, z), grad)
    assert y.dtype == dtype
    for a, b in zip(
        (y, *found), (expected, *torch.autograd.grad(expected, (exact_x, exact_z), grad.double())), strict=True
    ):
        assert error(a, b) < OPERATOR[str(dtype).split(".")[1]]


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    if centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def limit(*tensors: Tensor | None) -> float:
    """Of all tensors that are read or written, the tolerance of the coarsest dtype."""
    return OPERATOR["bfloat16" if any(t is not None and t.dtype == torch.bfloat16 for t in tensors) else "float32"]


def check_norm(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, out: torch.dtype | None = None) -> None:
    """Both norms as users call them, of rows with gaps between them, far from mean 0."""
    x, other, weight, grad = leaves(shape, dtype)
    bias = other[(0,) * (other.dim() - 1)].detach().float().requires_grad_()
    x = (x.detach() + 3).requires_grad_()
    grad = grad if out is None else grad.to(out)
    for centred in (True, False):
        given = [x, weight, bias] if centred else [x, weight]
        exact = [t.detach().double().requires_grad_() for t in given]
        y = layer_norm(*given, EPS, dtype=out) if centred else rms_norm(*given, EPS, dtype=out or dtype)
        expected = normalised(*exact, *([] if centred else [None]), centred)
        assert y.dtype == (out or dtype)
        found = torch.autograd.grad(y, given, grad)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        for a, b in zip((y, *found), (expected, *wanted), strict=True):
            assert error(a, b) < limit(x, y)


@needs_kernel
@pytest.mark.parametrize("half", ["", "x", "branch", "y", "weight", "x branch y weight"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_of_a_residual_sum(shape: tuple[int, ...], centred: bool, half: str) -> None:
    g = torch.Generator().manual_seed(0)

    def random(name: str, *size: int) -> Tensor:
        x = torch.randn(size, generator=g)
        return x.to(torch.bfloat16 if name in half.split() else torch.float32).requires_grad_()

    x, branch, grad, stream = random("x", *shape), random("branch", *shape), random("y", *shape), random("x", *shape)
    weight, bias = random("weight", shape[-1]), random("weight", shape[-1]) if centred else None
    given = [t for t in (x, branch, weight, bias) if t is not None]
    total, y = norm.normalise(x, branch, weight, bias, EPS, centred, grad.dtype)
    assert total.dtype == x.dtype and y.dtype == grad.dtype
    torch.testing.assert_close(total, (x.float() + branch.float()).to(x.dtype), rtol=0, atol=0)
    found = torch.autograd.grad((total, y), given, (stream.detach(), grad.detach()))

    exact = [t.detach().double().requires_grad_() for t in given]
    rounded = exact[0] + exact[1] + (total.detach().double() - exact[0].detach() - exact[1].detach())
    expected = normalised(rounded, exact[2], exact[3] if centred else None, centred)
    wanted = torch.autograd.grad((rounded, expected), exact, (stream.double(), grad.double()))
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        assert error(a, b) < limit(x, branch, y, weight)

    alone = norm.normalise(x, branch, weight, bias, EPS, centred, grad.dtype)[0]  # whose norm nobody reads
    (dx, dbranch) = torch.autograd.grad(alone, (x, branch), stream.detach())
    assert torch.equal(dx, stream.to(x.dtype)) and torch.equal(dbranch, stream.to(branch.dtype))


@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, ...], isa: str) -> None:
    with instruction_set(isa):
        check_gate(shape, torch.float32)
        check_gate(shape, torch.bfloat16)
        check_norm(shape)
        check_norm(shape, torch.bfloat16)
        check_norm(shape, torch.float32, torch.bfloat16)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    check_gate((3, 50, 24), torch.float32)
    check_norm((3, 50, 24))
    check_norm((3, 50, 24), torch.float32, torch.bfloat16)


@needs_kernel
def test_extreme_gates() -> None:
    z = torch.tensor([-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30, float("nan")]).requires_grad_()
    x = torch.ones_like(z)
    exact = z.detach().double().requires_grad_()
    y, expected = silu_gate(x, z), F.silu(exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)
    grad, exact_grad = torch.autograd.grad(y.sum(), z)[0], torch.autograd.grad(expected.sum(), exact)[0]
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=1e-30, equal_nan=True)


@needs_kernel
def test_threads_change_nothing() -> None:
    x, z, weight, grad = leaves((700, 100), torch.float32)

    def results() -> list[Tensor]:
        gated, normed = silu_gate(x, z, SCALE), rms_norm(x, weight, EPS)
        return [
            gated, normed, *torch.autograd.grad(gated, (x, z), grad), *torch.autograd.grad(normed, (x, weight), grad)
        ]  # fmt: skip

    with threads(1):
        alone = results()
    for n in (2, 8):
        with threads(n):
            assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))


@needs_kernel
def test_registration() -> None:
    x, z, weight, _ = leaves((2, 5, 12), torch.float32)
    torch.library.opcheck(gate.gate_op, (x, z, SCALE))
    rows = (x.detach(), z.detach(), weight.detach(), None)
    torch.library.opcheck(norm.norm_op, (*rows, EPS, True, torch.bfloat16))
    statistics = norm.norm_op(*rows, EPS, False, torch.float32)[2]
    torch.library.opcheck(norm.norm_backward_op, (*rows[:2], x.detach(), rows[2], statistics, False, torch.bfloat16))


@needs_kernel
def test_norms_round_for_the_product_behind_them() -> None:
    x = torch.randn(2, 5, 12)
    for kind in (LayerNorm, RMSNorm):
        with torch.autocast("cpu", torch.bfloat16):
            assert kind(12, autocast_out=True)(x).dtype == torch.bfloat16
            assert kind(12, autocast_out=True, dtype=torch.float64)(x.double()).dtype == torch.float64
            assert kind(12)(x).dtype == torch.float32
        assert kind(12, autocast_out=True)(x).dtype == torch.float32


@needs_kernel
def test_who_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, z, weight, _ = leaves((2, 5, 12), torch.float32)

    def refuse(*args: object) -> Tensor:
        raise AssertionError("the kernel was called")

    expected = silu_gate(x, z)
    monkeypatch.setattr(gate, "gate_op", refuse)
    monkeypatch.setattr(norm, "norm_op", refuse)
    with pytest.raises(AssertionError, match="kernel was called"):
        silu_gate(x, z)
    with pytest.raises(AssertionError, match="kernel was called"):
        RMSNorm(12)(x)
    with pytest.raises(AssertionError, match="kernel was called"):
        LayerNorm(12)(x)
    torch.testing.assert_close(silu_gate(x, z, backend="naive"), expected)
    assert silu_gate(x.double(), z.double()).dtype == torch.float64
    assert torch.compile(silu_gate, fullgraph=True, backend="eager")(x, z).shape == x.shape
    assert rms_norm(x.double(), weight.double(), EPS).dtype == torch.float64
