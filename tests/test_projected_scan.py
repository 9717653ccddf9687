"""The scan with its projections in Triton against the layer in double precision: on a GPU, else in the interpreter."""

import pytest
import torch

from backbones.layers import SelectiveSSM
from backbones.ops import Visits
from backbones.ops.scan import projected
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
pytestmark = quiet

ORDERS = {
    "all tokens": [[3, 1, 5, 0, 2, 4], [0, 5, 4, 3, 2, 1]],
    "skips, disjoint": [[3, 1], [0, 5]],
    "none": None,
}
REPEATS = [[3, 1, 5, 3, 2, 4, 5, 5], [0, 5, 4, 3, 0, 1, 1, 0]]


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def operands(shared: bool, dtype: torch.dtype, c: int = 5, n: int = 2) -> tuple[SelectiveSSM, torch.Tensor]:
    """A layer of two orders whose parameters are as its products round them, in double precision, and its input."""
    layer = SelectiveSSM(c, n, dt_rank=3, num_orders=2, backend="naive")
    with torch.no_grad():
        layer.A_log.add_(torch.rand_like(layer.A_log))  # or every channel would have the same
        layer.D.uniform_(-1, 1)
        for weight in (layer.x_proj_weight, layer.dt_proj_weight):
            weight.copy_(weight.to(dtype))
    shape = (2, 6, c) if shared else (2, 2, 6, c)
    u = torch.randn(shape).to(dtype).double()
    return layer.double(), u if shared else u.permute(0, 2, 1, 3)


def given(layer: SelectiveSSM, u: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """What `projected_scan` takes."""
    halves = [x.detach().to(DEVICE, dtype) for x in (u, layer.x_proj_weight, layer.dt_proj_weight)]
    whole = [x.detach().to(DEVICE, torch.float32) for x in (layer.dt_proj_bias, layer.A_log, layer.D)]
    return [x.requires_grad_() for x in (*halves, *whole)]


@needs_kernels
@pytest.mark.parametrize("shared", [True, False], ids=["one u", "a u for each order"])
@pytest.mark.parametrize("table", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_output_and_gradients(shared: bool, table: list | None, deterministic: bool) -> None:
    check_output_and_gradients(shared, table, "sum", deterministic)


@needs_kernels
@pytest.mark.parametrize("out", ["sum", "per_order", "per_step"])
def test_tokens_visited_again(out: str) -> None:
    check_output_and_gradients(True, REPEATS, out, False, c=70)
    check_output_and_gradients(True, REPEATS, out, True, c=5)


@needs_kernels
def test_scans_are_written_behind_one_another() -> None:
    layer, u = operands(True, torch.float32)
    options = [{"orders": None, "visits": None}, {"orders": torch.tensor(REPEATS, dtype=torch.int32, device=DEVICE)}]
    options[1]["visits"] = Visits.of(options[1]["orders"], 6)
    tensors = given(layer, u, torch.float32)
    expected = torch.cat([projected.projected_scan(*tensors, out="per_step", **each) for each in options], 1)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, grad)
    whole = torch.full_like(expected, torch.nan, requires_grad=False)
    into = whole.split([6, 8], 1)
    parts = [
        projected.projected_scan(*tensors, out="per_step", into=place, **each)
        for place, each in zip(into, options, strict=True)
    ]
    y = projected.joined(whole, parts)
    assert torch.equal(y, expected) and y.data_ptr() == whole.data_ptr()
    for a, b in zip(torch.autograd.grad(y, tensors, grad), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for place, each in zip(into, options, strict=True):
            projected.projected_scan(*tensors, out="per_step", into=place.fill_(torch.nan), **each)
        assert torch.equal(projected.joined(whole, into), expected)


@needs_kernels
@pytest.mark.parametrize("shared", [True, False], ids=["one u", "a u for each order"])
def test_windows(shared: bool) -> None:
    check_output_and_gradients(shared, ORDERS["all tokens"], "sum", False, window=3)


@needs_kernels
def test_windows_over_tokens_visited_again() -> None:
    check_output_and_gradients(True, REPEATS, "sum", False, window=3)


def check_output_and_gradients(
    shared: bool, table: list | None, out: str, deterministic: bool, c: int = 0, window: int = 0
) -> None:
    c = c or (70 if table is None else 5)  # several blocks of channels
    layer, u = operands(shared, torch.float32, c)
    orders = None if table is None else torch.tensor(table, dtype=torch.int32)
    u.requires_grad_()
    expected = layer(u, orders, out, window)
    parameters = layer.x_proj_weight, layer.dt_proj_weight, layer.dt_proj_bias, layer.A_log, layer.D
    grad = torch.randn(expected.shape)
    wanted = (expected, *torch.autograd.grad(expected, (u, *parameters), grad.double()))

    tensors = given(layer, u, torch.float32)
    options = {"out": out, "local_window": window, "visits": None if orders is None else Visits.of(orders, 6)}
    options["orders"] = None if orders is None else orders.to(DEVICE)
    torch.use_deterministic_algorithms(deterministic)
    try:
        y = projected.projected_scan(*tensors, **options)
        found = (y, *torch.autograd.grad(y, tensors, grad.to(DEVICE)))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, like in zip(found, wanted, (y, *tensors), strict=True):
        assert a.dtype == like.dtype
        assert error(a, b.detach()) <= OPERATOR["float32"]
    with torch.no_grad():
        assert torch.equal(projected.projected_scan(*tensors, **options), y)


@needs_kernels
@pytest.mark.parametrize("shared", [True, False], ids=["one u", "a u for each order"])
@pytest.mark.parametrize("out", ["sum", "per_order"])
def test_half_precision(shared: bool, out: str) -> None:
    layer, u = operands(shared, torch.bfloat16, c=16)
    expected = layer(u, out=out)
    y = projected.projected_scan(*given(layer, u, torch.bfloat16), out=out)
    assert y.dtype == torch.bfloat16
    # Step sizes, B and C are rounded, too, as they are where they are operations of their own.
    assert error(y, expected.detach()) <= 4 * OPERATOR["bfloat16"]


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    layer, u = operands(True, torch.float32)
    tensors = given(layer, u, torch.float32)
    first = torch.autograd.grad(projected.projected_scan(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(sum(x.sum() for x in first), tensors)


@needs_kernels
def test_what_is_not_served() -> None:
    layer, u = operands(True, torch.float32)
    tensors = given(layer, u, torch.float32)

    def served(*tensors: torch.Tensor, **options: object) -> bool:
        return projected.has_projected_scan(*tensors, **{"orders": None, "visits": None, "backend": None, **options})

    if DEVICE == "cpu":
        assert not served(*tensors)
        return
    assert served(*tensors)
    assert not served(*tensors, backend="naive")
    assert not served(tensors[0].half(), *tensors[1:])
    assert not served(*tensors, orders=torch.zeros(2, 6, dtype=torch.int32, device=DEVICE))
    with torch.autocast("cuda", torch.bfloat16):
        assert not served(*tensors)
