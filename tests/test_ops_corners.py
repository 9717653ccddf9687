"""What models and random inputs rarely show of the operators: single leaves, mixed dtypes, ties, wide rows, traces."""

import warnings
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import backbones  # noqa: F401  (registers the models)
from backbones.commands.bench.measure import relative_error
from backbones.ops import depthwise_conv, rms_norm, selective_scan, silu_gate
from backbones.ops.scan.naive import selective_scan_naive
from backbones.patterns import ScanPattern, raster, stacked, windows
from backbones.patterns.taps import window_taps
from tests.operator_cases import Case
from tests.tolerances import OPERATOR

LONG = Case(b=2, length=150, k=2, c=19, n=3, rank=4)
CASES = {
    "one state": Case(**{**vars(LONG), "n": 1}),
    "several states": LONG,
    "without projection": Case(**{**vars(LONG), "rank": 0}),
    "window of two": Case(**{**vars(LONG), "window": 2}),
    "window of two, one state, orders": Case(**{**vars(LONG), "n": 1, "window": 2, "steps": 131, "shared_u": True}),
}
LEAVES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "dt_weight")


def detached(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: x if x is None else x.detach() for name, x in tensors.items()}


def doubled(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: x.detach().double() if x is not None and x.is_floating_point() else x for name, x in tensors.items()}


def gradient(function, tensors: dict[str, Tensor | None], leaf: str, **options: object) -> Tensor:  # type: ignore[no-untyped-def]
    """Of one leaf alone, the others being constants."""
    x = tensors[leaf].clone().requires_grad_()
    y = function(**{**tensors, leaf: x}, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_one_leaf_alone(name: str, leaf: str, backend: str) -> None:
    case = CASES[name]
    given = detached(case.tensors(torch.float32))
    if given[leaf] is None:
        pytest.skip("the case has no such argument")
    expected = gradient(selective_scan_naive, doubled(given), leaf, **case.options())
    found = gradient(selective_scan, given, leaf, **case.options(), backend=backend)
    assert relative_error(found, expected) <= OPERATOR["float32"]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("narrow", ["B", "C", "delta", "u"])
def test_one_argument_in_another_dtype(narrow: str, leaf: str, backend: str) -> None:
    given = detached(LONG.tensors(torch.float32))
    given[narrow] = given[narrow].bfloat16()
    exact = doubled(given)
    y = selective_scan(**given, backend=backend)
    assert y.dtype == given["u"].dtype
    tolerance = OPERATOR["bfloat16" if narrow == "u" else "float32"]
    assert relative_error(y, selective_scan_naive(**exact)) <= tolerance
    found = gradient(selective_scan, given, leaf, backend=backend)
    assert found.dtype == given[leaf].dtype
    tolerance = OPERATOR["bfloat16" if leaf == narrow else "float32"]
    assert relative_error(found, gradient(selective_scan_naive, exact, leaf)) <= tolerance


@pytest.mark.parametrize("leaf", LEAVES)
def test_autocast_changes_nothing(leaf: str, backend: str) -> None:
    given = detached(CASES["window of two"].tensors(torch.float32))
    expected_y = selective_scan(**given, local_window=2, backend=backend)
    expected = gradient(selective_scan, given, leaf, local_window=2, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(**given, local_window=2, backend=backend)
        found = gradient(selective_scan, given, leaf, local_window=2, backend=backend)
    assert torch.equal(y, expected_y) and torch.equal(found, expected)


@pytest.mark.parametrize("window", [2, 5])
def test_windows_add_up_before_they_round(window: int, backend: str) -> None:
    # k = 8 orders, whose sum would show if a part of it were rounded to 8 bits.
    case = Case(b=1, length=80, k=8, c=9, n=2, window=window)
    given = detached(case.tensors(torch.bfloat16))
    expected = selective_scan_naive(**doubled(given), **case.options())
    found = selective_scan(**given, **case.options(), backend=backend)
    # Rounded once: half a unit in the last of 8 bits, and float32's own error.
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()


# Half way between two numbers of 8 bits: to the even one, down or up.
TIES = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, -1 - 3 * 2**-8, 2 + 2**-7, 255.5, 256.5, 1.0] * 5)


def test_ties_round_to_even(backend: str) -> None:
    c, expected = len(TIES), TIES.bfloat16()
    one = torch.ones(1, 1, c, dtype=torch.bfloat16)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    y = selective_scan(
        one, one[:, :, None], -torch.ones(1, c, 1), zero, zero, TIES[None], delta_softplus=False, backend=backend
    )
    assert torch.equal(y[0, 0], expected)
    y = depthwise_conv(one, TIES.view(1, c, 1), None, *window_taps(1, 1, 1), backend=backend)
    assert torch.equal(y[0, 0, 0], expected)
    for tie in TIES[:8].tolist():  # SiLU(64) is 64
        y = silu_gate(one, torch.full_like(one, 64), tie / 64, backend=backend)
        assert torch.equal(y, torch.full_like(one, tie))


def test_rows_wider_than_31_bits(backend: str) -> None:
    length, c, row = 3, 8, 2**30 + 64
    try:
        memory = torch.empty((length - 1) * row + c, dtype=torch.bfloat16)  # only the pages that are read are there
    except RuntimeError:
        pytest.skip("the system reserves no such address range")
    wide = memory.as_strided((1, length, c), ((length - 1) * row + c, row, 1))
    wide.copy_(torch.randn(1, length, c))
    near = wide.contiguous()
    g = torch.Generator().manual_seed(0)
    A, D = -torch.rand(1, c, 1, generator=g), torch.randn(1, c, generator=g)
    B = torch.randn(1, length, 1, 1, generator=g).bfloat16()

    def scan(u: Tensor, delta: Tensor) -> Tensor:
        return selective_scan(u, delta[:, :, None], A, B, B, D, backend=backend)

    assert torch.equal(scan(wide, near), scan(near, near))
    assert torch.equal(scan(near, wide), scan(near, near))
    weight, tables = torch.randn(1, c, 1, generator=g), window_taps(1, length, 1)
    assert torch.equal(
        depthwise_conv(wide, weight, None, *tables, backend=backend),
        depthwise_conv(near, weight, None, *tables, backend=backend),
    )
    assert torch.equal(silu_gate(wide, wide, backend=backend), silu_gate(near, near, backend=backend))


def test_backward_flops() -> None:
    case = Case(rank=3, steps=21)
    tensors = case.tensors(torch.float32)
    y = selective_scan(**tensors, backend="cpu")
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    steps = case.b * 21 * case.k * case.c
    projection = 2 * case.b * case.length * case.k * case.c * case.rank
    assert counter.get_total_flops() == 21 * steps * case.n + 4 * steps + 3 * projection

    x, weight = torch.randn(2, 12, 4, requires_grad=True), torch.randn(1, 4, 9, requires_grad=True)
    for silu, passes in ((False, 2), (True, 3)):
        y = depthwise_conv(x, weight, None, *window_taps(3, 4, 3), silu=silu, backend="cpu")
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == passes * 2 * 2 * 9 * 12 * 4


@pytest.mark.parametrize("out", ["sum", "per_order", "per_step"])
def test_batch_of_none_scans(out: str, backend: str) -> None:
    tensors = Case(b=0, steps=7, rank=2).tensors(torch.bfloat16)
    y = selective_scan(**tensors, out=out, backend=backend)
    assert y.shape == {"sum": (0, 13, 5), "per_order": (0, 13, 2, 5), "per_step": (0, 7, 2, 5)}[out]
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for name in LEAVES:
        grad = tensors[name].grad
        assert grad.shape == tensors[name].shape and grad.dtype == tensors[name].dtype and not grad.any(), name


def test_batch_of_none_elsewhere(backend: str) -> None:
    x = torch.randn(0, 12, 4, requires_grad=True)
    weight, bias = torch.randn(1, 4, 9, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    y = depthwise_conv(x, weight, bias, *window_taps(3, 4, 3, 2), silu=True, backend=backend)
    assert y.shape == (0, 4, 1, 4)
    scale = torch.ones(4, requires_grad=True)
    normed = rms_norm(x, scale, 1e-5, backend=backend)
    gated = silu_gate(x, x, 0.5, backend=backend)
    assert normed.shape == gated.shape == x.shape
    (y.sum() + normed.sum() + gated.sum()).backward()
    for leaf in (x, weight, bias, scale):
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_traced_with_gradients_as_everybody_does(backend: str) -> None:
    case = CASES["several states"]
    tensors = case.tensors(torch.float32)
    names = [name for name in LEAVES if tensors[name] is not None]

    def function(*values: Tensor) -> Tensor:
        return selective_scan(**dict(zip(names, values, strict=True)), backend=backend)

    leaves = [tensors[name] for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks of shapes, which are constants of a trace, and of its deprecation
        traced = torch.jit.trace(function, tuple(leaves))
    y, expected = traced(*leaves), function(*leaves)
    assert torch.equal(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["vim_tiny", "vmamba_tiny_s1l8"])
def test_models_are_traced_with_gradients(name: str) -> None:
    model = timm.create_model(name, img_size=64).eval() if "vim" in name else timm.create_model(name).eval()
    image = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, image)
    torch.testing.assert_close(traced(image), model(image), rtol=1e-4, atol=1e-5)


def test_orders_of_unequal_lengths_are_refused() -> None:
    pattern = ScanPattern("mixed", 2, stacked(raster, partial(windows, size=2)), pad_to=2)
    with pytest.raises(ValueError, match="orders: got 15, 24 steps on a 3 x 5 grid, expected as many of each order"):
        pattern.orders(3, 5)


def test_naive_gate_is_pytorchs_own() -> None:
    x, z = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(silu_gate(x, z, 0.5, backend="naive"), x * F.silu(z) * 0.5)
