"""GroupMamba's mixer in Triton against its layers in double precision: on a GPU, else in Triton's interpreter."""

import pytest
import torch
from torch import nn

from backbones.layers import GroupMambaLayer
from backbones.ops.group_mixer.operator import HALVES, Weights, group_mixer
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
pytestmark = quiet

SHAPES = {"wide": (2, 3, 5, 24), "a pooled token": (3, 1, 1, 20), "several tiles": (2, 9, 8, 40)}


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def layer_and_map(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[GroupMambaLayer, torch.Tensor]:
    """A layer whose parameters are as its products round them, without the last one, in double precision."""
    torch.manual_seed(0)
    layer = GroupMambaLayer(shape[-1])
    layer.proj = nn.Identity()
    layer.norm.eps = 1.0  # or the norm would cancel any scale, whose gradient would be rounding alone
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        _, weights = layer.mixer_operands(torch.empty(shape))
        for weight in weights[:HALVES]:
            weight.copy_(weight.to(dtype))
    return layer.double(), torch.randn(shape).to(dtype).double()


def found(layer: GroupMambaLayer, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The mixer's output, and what it is made of: x, then the weights."""
    plan, weights = layer.mixer_operands(x.to(DEVICE))
    halves = [weight.detach().to(DEVICE, dtype) for weight in (x.flatten(1, 2), *weights[:HALVES])]
    whole = [weight.detach().to(DEVICE, torch.float32) for weight in weights[HALVES:]]
    given = [tensor.requires_grad_() for tensor in (*halves, *whole)]
    return group_mixer(given[0], plan, Weights(*given[1:])), given


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(shape: tuple[int, ...]) -> None:
    layer, x = layer_and_map(shape, torch.float32)
    x.requires_grad_()
    expected = layer.of_normed(x)
    grad = torch.randn(shape)
    _, weights = layer.mixer_operands(x)
    wanted = (expected, *torch.autograd.grad(expected, (x, *weights), grad.double()))

    y, given = found(layer, x, torch.float32)
    gradients = torch.autograd.grad(y, given, grad.to(DEVICE).flatten(1, 2))
    names = ("y", "x", *Weights._fields)
    for name, a, b, like in zip(names, (y, *gradients), wanted, (y, *given), strict=True):
        assert a.dtype == like.dtype and a.shape == like.shape, name
        assert error(a, b.detach().view(a.shape)) <= OPERATOR["float32"], name
    with torch.no_grad():
        assert torch.equal(found(layer, x, torch.float32)[0], y)


@needs_kernels
def test_half_precision() -> None:
    layer, x = layer_and_map(SHAPES["wide"], torch.bfloat16)
    y, given = found(layer, x, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    # Every product, the scan and the gated norm round their results, as they do where they are operations of their own.
    assert error(y, layer.of_normed(x).detach().flatten(1, 2)) <= 8 * OPERATOR["bfloat16"]
    gradients = torch.autograd.grad(y.float().square().sum(), given)
    assert all(a.dtype == b.dtype and a.isfinite().all() for a, b in zip(gradients, given, strict=True))


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    layer, x = layer_and_map(SHAPES["a pooled token"], torch.float32)
    y, given = found(layer, x, torch.float32)
    first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(sum(x.sum() for x in first), given)
