"""The depthwise convolution: tables, every backend against PyTorch's convolutions in float64, torch's own checks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.layers import DepthwiseConv2d, MambaMixer, Scan
from backbones.ops import depthwise_conv, native
from backbones.ops.depthwise import operator as depthwise
from backbones.patterns import BIDIRECTIONAL, CROSS
from backbones.patterns.taps import causal_taps, window_taps
from tests.conftest import available_backends
from tests.test_ops_cpu import ISAS, instruction_set, threads

NAMES = ("x", "weight", "bias")
# height, width, kernel_size, stride, dilation
WINDOWS = [
    (5, 7, 3, 1, 1), (1, 9, 3, 1, 1), (1, 1, 3, 1, 1), (8, 6, 3, 2, 1), (7, 9, 7, 2, 1), (11, 10, 5, 1, 1),
    (9, 12, 3, 1, 5), (6, 6, 3, 2, 3), (6, 7, 2, 2, 1), (4, 5, 1, 1, 1),
]  # fmt: skip
# Largest error over largest value. float32: rounding in sums of up to some thousand terms, for the weights. bfloat16:
# results are rounded once to 8 bits, 2^-8 = 3.9e-3.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def leaves(b: int, length: int, k: int, c: int, j: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight and bias; x holds every second row of channels of a wider map."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, length, 2, c, generator=g).to(dtype)[:, :, 1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(k, c, j, generator=g, dtype=wide), torch.randn(k, c, generator=g, dtype=wide)
    return [t.requires_grad_() for t in (x, weight, bias)]


def random_orders(k: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(length, generator=g) for _ in range(k)])


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, case: tuple[int, ...]) -> Tensor:
    """PyTorch's own convolution, as (b, m, 1, c)."""
    height, width, size, stride, dilation = case
    c = x.shape[-1]
    x = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    bias = None if bias is None else bias[0]
    y = F.conv2d(x, weight.view(c, 1, size, size), bias, stride, dilation * (size // 2), dilation, c)
    return y.flatten(2).transpose(1, 2).unsqueeze(2)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor, orders: Tensor) -> Tensor:
    """PyTorch's own causal convolution of the tokens as each order visits them, as (b, l, k, c)."""
    results = []
    for order, w, b in zip(orders, weight, bias, strict=True):
        y = F.conv1d(F.pad(x[:, order].mT, (w.shape[1] - 1, 0)), w.unsqueeze(1), b, groups=x.shape[-1])
        results.append(torch.empty_like(x).index_copy(1, order, y.mT))
    return torch.stack(results, 2)


def check(found: Tensor, expected: Tensor, given: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    """Values and every gradient, for the same random upstream gradient, which bfloat16 holds exactly."""
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    pairs = {"y": (found.detach(), expected.detach())}
    found_grads = torch.autograd.grad(found, given, grad.to(found.dtype))
    expected_grads = torch.autograd.grad(expected, exact, grad.to(expected.dtype))
    pairs |= dict(zip(NAMES, zip(found_grads, expected_grads, strict=True), strict=False))
    for (name, (a, b)), like in zip(pairs.items(), [given[0], *given], strict=True):
        assert a.dtype == like.dtype and a.shape == b.shape, name
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max(), name


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("case", WINDOWS)
def test_tables_of_windows_are_inverse(case: tuple[int, ...]) -> None:
    check_inverse(*window_taps(*case), tokens=case[0] * case[1])


@pytest.mark.parametrize("length", [1, 3, 20])
def test_tables_of_orders_are_inverse(length: int) -> None:
    check_inverse(*causal_taps(random_orders(3, length), 4), tokens=length)


def check_inverse(taps: Tensor, inverse_taps: Tensor, tokens: int) -> None:
    expected = torch.full((*taps.shape[:2], tokens), -1, dtype=torch.int32)
    for k, j, output in (taps >= 0).nonzero().tolist():
        assert expected[k, j, taps[k, j, output]] == -1, "read by two outputs"
        expected[k, j, taps[k, j, output]] = output
    assert torch.equal(inverse_taps, expected)


def test_tables_are_shared_and_survive_inference_mode() -> None:
    with torch.inference_mode():
        taps, inverse_taps = window_taps(13, 11, 3)
    assert not taps.is_inference() and not inverse_taps.is_inference()
    assert window_taps(13, 11, 3)[0] is taps


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_equal_conv2d(case: tuple[int, ...], silu: bool, dtype: torch.dtype, backend: str) -> None:
    given = leaves(2, case[0] * case[1], 1, 19, case[2] ** 2, dtype)
    exact = doubled(given)
    expected = conv2d(*exact, case)
    found = depthwise_conv(*given, *window_taps(*case), silu=silu, backend=backend)
    check(found, F.silu(expected) if silu else expected, given, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("k, length, j", [(1, 1, 4), (2, 3, 4), (3, 50, 4), (2, 33, 1), (1, 20, 7)])
def test_orders_equal_conv1d(k: int, length: int, j: int, silu: bool, backend: str) -> None:
    orders = random_orders(k, length)
    given = leaves(2, length, k, 21, j)
    exact = doubled(given)
    expected = conv1d(*exact, orders)
    found = depthwise_conv(*given, *causal_taps(orders, j), silu=silu, backend=backend)
    check(found, F.silu(expected) if silu else expected, given, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("c", [1, 8, 16, 33, 100, 530])
@pytest.mark.parametrize("isa", ISAS if "cpu" in available_backends() else [])
def test_every_instruction_set_and_width(isa: str, c: int) -> None:
    for dtype, tolerance in TOLERANCE.items():
        given = leaves(2, 70, 2, c, 4, dtype)
        exact = doubled(given)
        tables = causal_taps(random_orders(2, 70), 4)
        expected = depthwise_conv(*exact, *tables, silu=True)
        with instruction_set(isa):
            check(depthwise_conv(*given, *tables, silu=True, backend="cpu"), expected, given, exact, tolerance)


@pytest.mark.parametrize("isa", ISAS if "cpu" in available_backends() else [])
def test_silu_over_its_whole_range(isa: str) -> None:
    x = torch.linspace(-100, 100, 4001).view(1, 1, -1).requires_grad_()
    one, tables = torch.ones(1, 4001, 1), window_taps(1, 1, 1)
    with instruction_set(isa):
        y = depthwise_conv(x, one, None, *tables, silu=True, backend="cpu")
        (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = F.silu(exact)
    (expected_dx,) = torch.autograd.grad(expected.sum(), exact)
    # Below -88, where the result is under 1e-36, the kernel counts x as -88.
    torch.testing.assert_close(y[0, 0, 0].double(), expected[0, 0], rtol=4e-7, atol=1e-35)
    # 1 - sigmoid(x) has an absolute error of 2^-24, which the slope multiplies by x, 16.6 where it is still not 0.
    torch.testing.assert_close(dx.double(), expected_dx, rtol=4e-7, atol=1e-6)


@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck(silu: bool) -> None:
    for tables, k, j in ((causal_taps(random_orders(2, 5), 3), 2, 3), (window_taps(2, 3, 3, 2), 1, 9)):
        given = leaves(2, tables[1].shape[2], k, 2, j, torch.float64)
        assert torch.autograd.gradcheck(lambda *t, tables=tables: depthwise_conv(*t, *tables, silu=silu), given)


def test_result_is_stored_by_order(backend: str) -> None:
    y = depthwise_conv(*leaves(2, 10, 2, 6, 4), *causal_taps(random_orders(2, 10), 4), backend=backend)
    assert y.shape == (2, 10, 2, 6) and y.permute(2, 0, 1, 3).is_contiguous()


def test_strides_do_not_matter(backend: str) -> None:
    x, weight, bias = (t.detach() for t in leaves(2, 30, 2, 18, 4))
    tables = causal_taps(random_orders(2, 30), 4)
    grad = torch.randn(1, 30, 1, 18).expand(2, 30, 2, 18)

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = depthwise_conv(x, weight, bias, *tables, silu=True, backend=backend)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    expected = run(x.contiguous(), grad.contiguous())
    by_order = grad.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    for found in (run(x, by_order), run(x.mT.contiguous().mT, grad), run(x, grad.mT.contiguous().mT)):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif("cpu" not in available_backends(), reason="no kernel")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("b, c", [(1, 200), (3, 72)])
def test_bitwise_equal_for_any_number_of_threads(b: int, c: int, silu: bool) -> None:
    for tables, k, j in ((causal_taps(random_orders(2, 600), 4), 2, 4), (window_taps(25, 24, 5), 1, 25)):
        given = leaves(b, 600, k, c, j)
        results = []
        for count in (1, 2, 3, 8):
            with threads(count):
                y = depthwise_conv(*given, *tables, silu=silu, backend="cpu")
                results.append([y.detach(), *torch.autograd.grad(y.square().sum(), given)])
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.skipif("cpu" not in available_backends(), reason="no kernel")
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # Poisoned memory shows elements that the kernel leaves alone. With stride 3 some tokens are read by no tap.
    given = [t.detach() for t in leaves(2, 60, 1, 20, 1)]
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape: torch.full(tuple(shape), torch.nan))
    for silu in (False, True):
        tables = window_taps(6, 10, 1, 3)
        y = depthwise._module("cpu").forward(*given, *tables, silu)
        grads = depthwise._module("cpu").backward(torch.ones_like(y), *given, *tables, silu)
        assert not any(x.isnan().any() for x in (y, *grads))
        assert (grads[0] == 0).sum() == 2 * 20 * (60 - 8)


def test_nan_flows_through(backend: str) -> None:
    x, weight, bias = (t.detach().clone() for t in leaves(1, 35, 1, 3, 9))
    x[0, 17, 1] = torch.nan  # the cell (2, 3) of 5 x 7
    y = depthwise_conv(x, weight, bias, *window_taps(5, 7, 3), silu=True, backend=backend)
    assert y.isnan().nonzero()[:, 1].tolist() == [9, 10, 11, 16, 17, 18, 23, 24, 25]


@pytest.mark.parametrize("has_bias", [False, True])
def test_opcheck(has_bias: bool, backend: str) -> None:
    x, weight, bias = leaves(2, 12, 2, 5, 4)
    tables = causal_taps(random_orders(2, 12), 4)
    torch.library.opcheck(depthwise.conv_op, (x, weight, bias if has_bias else None, *tables, True, backend))


@pytest.mark.parametrize("layer", [DepthwiseConv2d(6, 3, 2, silu=True), MambaMixer(4), MambaMixer(4, Scan(CROSS))])
def test_layers_compile_whole_and_export(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 5, 4, 6) if isinstance(layer, DepthwiseConv2d) else torch.randn(2, 21, 4)
    args = (x,) if isinstance(layer, DepthwiseConv2d) else (x, (4, 5))
    expected = layer(*args)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*args), expected)
    torch.testing.assert_close(torch.export.export(layer, args).module()(*args), expected)


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("silu", [False, True])
def test_layer_equals_conv2d(kernel_size: int, stride: int, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DepthwiseConv2d(12, kernel_size, stride, silu=silu)
    x = torch.randn(2, 9, 11, 24)[..., 12:].requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    expected = layer(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.square().sum(), x)[0])


@pytest.mark.parametrize("residual", [False, True])
def test_gelu_and_residual(residual: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = leaves(2, 35, 1, 5, 9)
    y = depthwise_conv(x, weight, bias, *window_taps(5, 7, 3), gelu=True, residual=residual, backend=backend)
    plain = depthwise_conv(x, weight, bias, *window_taps(5, 7, 3), backend=backend)
    torch.testing.assert_close(y, F.gelu(x.unsqueeze(2) + plain if residual else plain))
    layer = DepthwiseConv2d(5, gelu=True, residual=residual)
    layer.load_state_dict({"weight": weight.view(5, 1, 3, 3), "bias": bias.view(5)})
    torch.testing.assert_close(layer(x.unflatten(1, (5, 7))).flatten(1, 2), y.squeeze(2))
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    torch.testing.assert_close(layer(x.unflatten(1, (5, 7))).flatten(1, 2), y.squeeze(2))


def test_options_that_contradict_are_named() -> None:
    x, weight, bias = leaves(2, 35, 1, 5, 9)
    with pytest.raises(ValueError, match="gelu: got True, expected False beside silu"):
        depthwise_conv(x, weight, bias, *window_taps(5, 7, 3), silu=True, gelu=True)
    with pytest.raises(ValueError, match="residual: got True with 1 orders and 12 outputs, expected 1 order and 35"):
        depthwise_conv(x, weight, bias, *window_taps(5, 7, 3, 2), residual=True)


def test_autocast_keeps_the_dtype_of_x() -> None:
    x, weight, bias = leaves(2, 20, 1, 8, 9, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x, weight, bias, *window_taps(4, 5, 3))
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_half_precision_and_other_weights_follow_x(backend: str) -> None:
    x, weight, bias = (t.detach() for t in leaves(2, 20, 1, 8, 9))
    tables = window_taps(4, 5, 3)
    y = depthwise_conv(x.half(), weight.double(), bias.bfloat16(), *(t.long() for t in tables), backend=backend)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), depthwise_conv(x, weight, bias, *tables), atol=2e-2, rtol=2e-2)


def test_flops_are_counted() -> None:
    given, tables = leaves(2, 20, 2, 6, 4), causal_taps(BIDIRECTIONAL.orders(1, 20), 4)
    with FlopCounterMode(display=False) as counter:
        depthwise_conv(*given, *tables)
    assert counter.get_total_flops() == 2 * 4 * (2 * 20 * 2 * 6)


TAPS = window_taps(3, 4, 3)[0]
BAD = {
    "x": [
        (torch.zeros(2, 12, 4, dtype=torch.int64), "x: got dtype torch.int64"),
        (torch.zeros(2, 12, 4, 1), "x: got shape .* expected 3 dimensions"),
        (torch.zeros(2, 12, 5), r"weight: got shape \(1, 4, 9\), expected \(1, 5, 9\)"),
        (torch.zeros(2, 13, 4), r"inverse_taps: got shape \(1, 9, 12\), expected \(1, 9, 13\)"),
        (torch.zeros(2, 0, 4), "x: got shape .* none of them 0 but the first"),
        (None, "x: got NoneType, expected a tensor"),
    ],
    "weight": [(torch.zeros(1, 4, 8), r"taps: got shape \(1, 9, 12\), expected \(1, 8, 12\)")],
    "bias": [(torch.zeros(4), "bias: got shape"), (torch.zeros(1, 4, device="meta"), "bias: got a tensor on meta")],
    "taps": [
        (TAPS.float(), "taps: got dtype torch.float32, expected an integer dtype"),
        (TAPS + 1, r"taps: found token 12, expected -1\.\.11"),
        (TAPS - 1, r"taps: found token -2, expected -1\.\.11"),
    ],
    "inverse_taps": [(TAPS[0], "inverse_taps: got shape")],
}


@pytest.mark.parametrize(("name", "value", "message"), [(n, v, m) for n, rows in BAD.items() for v, m in rows])
def test_bad_tensors_are_named(name: str, value: Tensor, message: str, backend: str) -> None:
    x, weight, bias = (t.detach() for t in leaves(2, 12, 1, 4, 9))
    taps, inverse_taps = window_taps(3, 4, 3)
    given = {"x": x, "weight": weight, "bias": bias, "taps": taps, "inverse_taps": inverse_taps, name: value}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**given, backend=backend)


@pytest.mark.skipif("cpu" not in available_backends(), reason="no kernel")
def test_bad_inverse_is_named_in_backward() -> None:
    x, weight, bias = leaves(2, 12, 1, 4, 9)
    taps, inverse_taps = window_taps(3, 4, 3)
    y = depthwise_conv(x, weight, bias, taps, inverse_taps + 1, backend="cpu")
    with pytest.raises(ValueError, match=r"inverse_taps: found output 12, expected -1\.\.11"):
        y.sum().backward()


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found anywhere")
    given, tables = leaves(2, 12, 1, 4, 9), window_taps(3, 4, 3)
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run here: no compiler was found anywhere"):
        depthwise_conv(*given, *tables, backend="cpu")
    depthwise_conv(*given, *tables)
    message = "depthwise_conv falls back to the slow 'naive' backend: no compiler was found anywhere"
    assert [record.getMessage() for record in caplog.records] == [message]
