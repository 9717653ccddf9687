"""Gradients of a single image against finite differences, in double precision.

PyTorch's backward pass of a batch norm on a CPU is wrong at batch 1 in one memory layout, without a word: where its
output (1, c, h, w) is flattened before it is permuted.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.layers import ResidualConvStem, StemPatchEmbed, WideDownsample
from backbones.models.efficientvmamba import EVSSBlock, InvertedResidual
from backbones.models.groupmamba import GroupStem
from backbones.models.plainmamba import StreamConv
from tests.small_models import SMALLEST, create_small, images

DIFFERENCE = 1e-6  # relative; double precision leaves less of the best of several steps


@pytest.fixture(autouse=True)
def _smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference across the kink of a ReLU is no derivative."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))


def somewhere_up(grad: Tensor) -> Tensor:
    """A random direction in which the value grows."""
    noise = F.normalize(torch.randn_like(grad).flatten(), dim=0).view_as(grad)
    return noise + 2 * grad / grad.norm().clamp(min=1e-12)


def best_error(value: Callable[[], Tensor], leaves: list[Tensor], directions: list[Tensor], expected: Tensor) -> float:
    """Of central differences along ``directions``, with steps that trade rounding for curvature."""
    errors = []
    with torch.no_grad():
        for step in (1e-3, 1e-4, 1e-5, 1e-6):
            values = []
            for sign in (1, -2):
                for leaf, direction in zip(leaves, directions, strict=True):
                    leaf.add_(sign * step * direction)
                values.append(value())
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(step * direction)
            errors.append((((values[0] - values[1]) / (2 * step) - expected) / expected).abs().item())
    return min(errors)


def unsettled(model: nn.Module) -> nn.Module:
    """In double precision, with batch norms that do something and keep no trace of a pass."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 0.0
    return model.double()


PARTS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...], tuple]]] = {
    "StemPatchEmbed": lambda: (StemPatchEmbed(8, 8, 3, 4, num_convs=2, width=4), (1, 3, 19, 24), ()),
    "StreamConv": lambda: (StreamConv(5), (1, 12, 5), ((3, 4),)),
    "ResidualConvStem": lambda: (ResidualConvStem(3, 4), (1, 3, 20, 12), ()),
    "WideDownsample": lambda: (WideDownsample(4, 6), (1, 6, 8, 4), ()),
    "GroupStem": lambda: (GroupStem(3, 4, 4), (1, 3, 20, 12), ()),
    "InvertedResidual": lambda: (InvertedResidual(8), (1, 4, 6, 8), ()),
    "EVSSBlock": lambda: (EVSSBlock(8, lambda dim, **dd: nn.Linear(dim, dim, **dd)), (1, 4, 6, 8), ()),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_layers_around_batch_norms(part: str, training: bool) -> None:
    """The gradient of the input and of every parameter by itself, whatever layout the next layer's has."""
    layer, shape, rest = PARTS[part]()
    layer = unsettled(layer).train(training)
    x = images(*shape).double()
    y = layer(x, *rest)
    cotangent = torch.randn_like(y)
    # In a batch of one its stride is free; what is flattened and permuted has that of a row, channels first or last.
    channels = y.shape[-1]
    layouts = [cotangent, cotangent.as_strided(y.shape, (channels, *cotangent.stride()[1:]))]
    layouts.append(cotangent.movedim(-1, 1).contiguous().movedim(1, -1))
    layouts.append(layouts[-1].as_strided(y.shape, (channels, *layouts[-1].stride()[1:])))
    leaves = {"input": x.requires_grad_(), **dict(layer.named_parameters())}
    for upstream in layouts:
        grads = torch.autograd.grad(layer(x, *rest), list(leaves.values()), upstream)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            direction = somewhere_up(grad)
            expected = (grad * direction).sum()
            if expected.abs() < 1e-9:  # the bias before a batch norm in training
                continue
            error = best_error(lambda: (layer(x, *rest) * cotangent).sum(), [leaf], [direction], expected)
            assert error <= DIFFERENCE, f"{name}: off by {error:.1e}"


BATCH_NORMED = [x for x in SMALLEST if x.startswith(("efficient", "group", "spatial", "vssd", "plain"))]


@pytest.mark.parametrize(("name", "training"), [*((x, False) for x in SMALLEST), *((x, True) for x in BATCH_NORMED)])
def test_whole_models(name: str, training: bool) -> None:
    """The gradient of the input, and those of all parameters, each counting as much as any other."""
    model = unsettled(create_small(name, scan_backend="naive")).train(training)
    x = images(1, 3, 64, 64).double().requires_grad_()
    cotangent = torch.randn(1, 10, dtype=torch.float64)

    def value() -> Tensor:
        return (model(x) * cotangent).sum()

    assert any(isinstance(m, _BatchNorm) for m in model.modules()) == (name in BATCH_NORMED)
    leaves = [x, *model.parameters()]
    grads = torch.autograd.grad(value(), leaves)
    top = max(grad.norm() for grad in grads[1:])
    chosen = [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if grad.norm() > 1e-6 * top]
    assert len(chosen) > 0.6 * len(leaves)
    for some in ([chosen[0]], chosen[1:]):
        directions = []
        for _, grad in some:
            direction = somewhere_up(grad)
            directions.append(direction / (grad * direction).sum())
        # Each counts 1, but none moves further than the others.
        reach = max(direction.norm() for direction in directions)
        expected = len(some) / reach
        error = best_error(value, [leaf for leaf, _ in some], [d / reach for d in directions], expected)
        assert error <= DIFFERENCE, f"off by {error:.1e}"
