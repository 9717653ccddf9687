"""Spatial-Mamba's fusion of states: its tables and kernels against PyTorch's padded convolutions in float64."""

import pytest
import torch
from torch import Tensor

from backbones.layers import StateFusion
from backbones.ops.depthwise.replicated import has_replicated_conv
from backbones.patterns.taps import replicated_taps
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytestmark = quiet
# height, width: odd, smaller than the window reaches, and single rows and cells
SIZES = [(1, 1), (1, 3), (2, 5), (7, 4), (1, 14), (9, 1), (6, 6), (11, 13)]


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__)


def fusion(c: int, dtype: torch.dtype = torch.float32) -> StateFusion:
    layer = StateFusion(c, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
        layer.alpha.copy_(torch.tensor([0.5, -2, 1.5]))
    return layer


def gathered(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """sum_k sum_j weight[k, :, j] x[:, table[k, j, i]], where -1 reads 0."""
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    return torch.einsum("bkjmc,kcj->bmc", padded[:, table.long()], weight)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tables_are_those_of_padded_convolutions(size: tuple[int, int]) -> None:
    layer = fusion(3, torch.float64)
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    grad = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    taps, frame_taps, folds = tables = replicated_taps(*size, 3, layer.dilations)
    assert all(table.dtype == torch.int32 for table in tables)
    weight = (layer.alpha.view(-1, 1, 1, 1) * layer.weight).flatten(2)
    torch.testing.assert_close(gathered(x.flatten(1, 2), weight, taps).view_as(x), expected)
    frame = gathered(grad.flatten(1, 2), weight, frame_taps)
    assert frame.shape[1] == (size[0] + 10) * (size[1] + 10)
    dx = gathered(frame, frame.new_ones(1, 3, folds.shape[1]), folds)
    torch.testing.assert_close(dx.view_as(x), wanted)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(size, 5, dtype)


@needs_kernels
@pytest.mark.parametrize("c", [1, 33, 96])
def test_channels(c: int) -> None:
    check((7, 4), c, torch.float32)


@needs_kernels
def test_strides() -> None:
    check((3, 5), 4, torch.float32, strided=True)


def check(size: tuple[int, int], c: int, dtype: torch.dtype, strided: bool = False) -> None:
    """Result and gradients of states x, of the weight and of alpha, for two images."""
    layer, exact = fusion(c).to(DEVICE), fusion(c, torch.float64)
    layer.backend = "triton"
    wide = torch.randn(2, *size, 3 * c if strided else c).to(dtype)
    x, grad = wide[..., -c:], torch.randn(2, *size, c).to(dtype)
    inputs = x.to(DEVICE).requires_grad_()
    assert has_replicated_conv(inputs, layer.weight, layer.backend)
    y = layer(inputs)
    assert y.dtype == dtype and y.is_contiguous() and "Replicated" in repr(y.grad_fn.next_functions)
    found = torch.autograd.grad(y, (inputs, layer.weight, layer.alpha), grad.to(DEVICE))
    reference = x.double().requires_grad_()
    expected = exact(reference)
    wanted = torch.autograd.grad(expected, (reference, exact.weight, exact.alpha), grad.double())
    of_tokens = OPERATOR["float32" if dtype == torch.float32 else "bfloat16"]
    assert error(y, expected) <= of_tokens
    assert error(found[0], wanted[0]) <= of_tokens
    for value, truth in zip(found[1:], wanted[1:], strict=True):
        # Sums of exact products of what was given: no rounding to the dtype of x.
        assert error(value, truth) <= OPERATOR["float32"]
    with torch.no_grad():
        assert torch.equal(layer(inputs), y)


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    layer = fusion(2).to(DEVICE)
    layer.backend = "triton"
    x = torch.randn(1, 2, 3, 2, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


@needs_kernels
def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward, four backward: into the frame, out of it, weight, and the sums of its parts."""
    from backbones.ops import triton_host

    count = 0
    run = triton_host.Launch.run

    def counted(self: triton_host.Launch, *tensors: Tensor | None) -> None:
        nonlocal count
        count += 1
        run(self, *tensors)

    monkeypatch.setattr(triton_host.Launch, "run", counted)
    layer = fusion(4).to(DEVICE)
    layer.backend = "triton"
    y = layer(torch.randn(1, 4, 4, 4, device=DEVICE, requires_grad=True))
    assert count == 1
    y.sum().backward()
    assert count == 5
