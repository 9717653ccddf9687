"""The gate and RMSNorm against PyTorch's in float64, where the kernel runs and where PyTorch takes over."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import ops
from backbones.layers.norm import RMSNorm
from backbones.ops import native, rms_norm, silu_gate
from backbones.ops.fused.gate import operator as gate
from backbones.ops.fused.rms_norm import operator as norm
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


def check_norm(shape: tuple[int, ...]) -> None:
    x, _, weight, grad = leaves(shape, torch.float32)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y, expected = rms_norm(x, weight, EPS), F.rms_norm(exact_x, weight.shape, exact_weight, EPS)
    found = torch.autograd.grad(y, (x, weight), grad)
    exact = torch.autograd.grad(expected, (exact_x, exact_weight), grad.double())
    for a, b in zip((y, *found), (expected, *exact), strict=True):
        assert error(a, b) < OPERATOR["float32"]


@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, ...], isa: str) -> None:
    with instruction_set(isa):
        check_gate(shape, torch.float32)
        check_gate(shape, torch.bfloat16)
        check_norm(shape)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    check_gate((3, 50, 24), torch.float32)
    check_norm((3, 50, 24))


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
@pytest.mark.parametrize("name", ["gate", "rms_norm"])
def test_registration(name: str) -> None:
    x, z, weight, _ = leaves((2, 5, 12), torch.float32)
    op = getattr(torch.ops.backbones, name).default
    torch.library.opcheck(op, (x, z, SCALE) if name == "gate" else (x, weight, EPS))


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
    torch.testing.assert_close(silu_gate(x, z, backend="naive"), expected)
    assert silu_gate(x.double(), z.double()).dtype == torch.float64
    assert torch.compile(silu_gate, fullgraph=True, backend="eager")(x, z).shape == x.shape
    assert rms_norm(x.double(), weight.double(), EPS).dtype == torch.float64
