"""Derivatives beyond the first backward pass: to any order on naive, refused by kernels, never wrong."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from backbones.ops import backends, depthwise_conv, layer_norm, rms_norm, selective_scan, silu_gate
from backbones.patterns import CROSS, REVERSE
from backbones.patterns.taps import causal_taps

needs_kernel = pytest.mark.skipif(backends()["cpu"] is not None, reason="needs the compiled kernel")
WAY_OUT = "scan_backend='naive'"


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def scan_leaves(dtype: torch.dtype, length: int, k: int, c: int = 2, n: int = 2, rank: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias and, with a rank, dt_weight."""
    A = (-leaf(k, c, n, dtype=dtype).detach().exp()).requires_grad_()
    shapes = [(2, length, c), (2, length, k, rank or c), (2, length, k, n), (2, length, k, n), (k, c), (k, c)]
    u, delta, B, C, D, bias = (leaf(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return [u, delta, A, B, C, D, bias, *([leaf(k, c, rank, dtype=dtype)] if rank else [])]


def scan(*leaves: Tensor, backend: str = "naive", **options: object) -> Tensor:
    u, delta, A, B, C, D, bias, *weight = leaves
    return selective_scan(
        u, delta, A, B, C, D, delta_bias=bias, dt_weight=weight[0] if weight else None, backend=backend, **options
    )


def conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "naive") -> Tensor:
    taps = causal_taps(REVERSE.orders(1, x.shape[1]), weight.shape[2])
    return depthwise_conv(x, weight, bias, *taps, silu=True, backend=backend)


SCANS: dict[str, dict] = {
    "plain": {},
    "window": {"local_window": 2},
    "per_order": {"out": "per_order"},
    "per_step": {"out": "per_step"},
    "raw_steps": {"delta_softplus": False},
}
OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[[torch.dtype], list[Tensor]]]] = {
    **{name: (partial(scan, **options), partial(scan_leaves, length=4, k=1)) for name, options in SCANS.items()},
    "cross": (lambda *x, **o: scan(*x, orders=CROSS.orders(2, 2), **o), partial(scan_leaves, length=4, k=4, n=1)),
    "projected": (scan, partial(scan_leaves, length=3, k=1, rank=1)),
    "conv": (conv, lambda dtype: [leaf(2, 5, 3, dtype=dtype), leaf(1, 3, 2, dtype=dtype), leaf(1, 3, dtype=dtype)]),
    "gate": (
        lambda x, z, backend="naive": silu_gate(x, z, 0.5, backend=backend),
        lambda dtype: [leaf(2, 3, dtype=dtype), leaf(2, 3, dtype=dtype, seed=1)],
    ),
    "rms_norm": (
        lambda x, w, backend="naive": rms_norm(x, w, 1e-5, backend=backend),
        lambda dtype: [leaf(2, 3, dtype=dtype), leaf(3, dtype=dtype)],
    ),
    "layer_norm": (
        lambda x, w, b, backend="naive": layer_norm(x, w, b, 1e-5, backend=backend),
        lambda dtype: [leaf(2, 3, dtype=dtype), leaf(3, dtype=dtype), leaf(3, dtype=dtype, seed=1)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_naive_is_right_to_the_second_order_and_forwards(name: str) -> None:
    function, leaves = OPERATORS[name]
    inputs = leaves(torch.float64)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)


def test_a_tensor_that_stands_for_two_arguments_counts_once_for_each() -> None:
    u, delta, A, B, _, D, bias = scan_leaves(torch.float64, length=4, k=1)
    assert gradgradcheck(lambda B: scan(u, delta, A, B, B, D, bias), [B])


def test_third_derivatives() -> None:
    u, *others = scan_leaves(torch.float64, length=3, k=1)
    direction = torch.ones_like(u)

    def along(t: Tensor, order: int) -> Tensor:
        y = scan(u.detach() + t * direction, *[x.detach() for x in others]).square().sum()
        for _ in range(order):
            (y,) = torch.autograd.grad(y, t, create_graph=True)
        return y

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert gradcheck(partial(along, order=2), [t])
    # A scan is linear in u, so its square is a parabola along any line.
    torch.testing.assert_close(along(t, 3), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-10)


@needs_kernel
@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_refuse_second_derivatives(name: str) -> None:
    function, leaves = OPERATORS[name]
    inputs = leaves(torch.float32)
    grads = torch.autograd.grad(function(*inputs, backend="cpu").square().sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        sum(x.square().sum() for x in grads).backward()


@needs_kernel
@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_are_right_or_refuse_forward_mode(name: str) -> None:
    function, leaves = OPERATORS[name]
    inputs = tuple(x.detach() for x in leaves(torch.float32))
    tangents = tuple(torch.ones_like(x) for x in inputs)
    if name in ("gate", "rms_norm", "layer_norm"):  # PyTorch's own take over, but for a kernel that was asked for
        _, found = torch.func.jvp(partial(function, backend=None), inputs, tangents)
        torch.testing.assert_close(found, torch.func.jvp(function, inputs, tangents)[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        torch.func.jvp(partial(function, backend="cpu"), inputs, tangents)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=WAY_OUT):
        function(forward_ad.make_dual(inputs[0], tangents[0]), *inputs[1:], backend="cpu")


@pytest.mark.parametrize("name", OPERATORS)
def test_function_transforms_of_naive(name: str) -> None:
    function, leaves = OPERATORS[name]
    inputs = tuple(x.detach() for x in leaves(torch.float64))

    def loss(x: Tensor) -> Tensor:
        return function(x, *inputs[1:]).sin().sum()

    hessian = torch.autograd.functional.hessian(loss, inputs[0])
    torch.testing.assert_close(torch.func.hessian(loss)(inputs[0]), hessian)
    torch.testing.assert_close(torch.func.grad(loss)(inputs[0]), torch.autograd.functional.jacobian(loss, inputs[0]))


def test_a_gradient_penalty_of_a_norm_and_a_gate_in_plain_pytorch() -> None:
    x = leaf(2, 3)
    reference = F.rms_norm(x, (3,), torch.ones(3, dtype=torch.float64), 1e-5)
    expected = torch.autograd.grad(torch.autograd.grad(reference.square().sum(), x, create_graph=True)[0].sum(), x)
    y = rms_norm(x, torch.ones(3, dtype=torch.float64), 1e-5)
    found = torch.autograd.grad(torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum(), x)
    torch.testing.assert_close(found, expected)
