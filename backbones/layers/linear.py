"""Linear layers whose output is used in parts, and convolutions that are linear layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.layers.autocast import autocast_dtype
from backbones.ops.tracing import is_hooked, is_replaced


def linear_parts(linear: nn.Module, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``linear(x)`` split into ``sizes`` along its last axis.

    On a CPU, a plain linear layer is computed as one product per part, which write contiguous rows. Any other module is
    called: adapters, quantized and parametrised layers, and hooks act as everywhere. GPUs are spared the launches.
    """
    if x.is_cuda or not _is_plain(linear, nn.Linear):
        return linear(x).split_with_sizes(list(sizes), dim=-1)
    assert isinstance(linear, nn.Linear)
    half = autocast_dtype(x)
    x = x if half is None else x.to(half)  # once, not for each of them
    weights = linear.weight.split(list(sizes))
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(list(sizes))
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def patch_products(conv: nn.Module, x: Tensor) -> Tensor | None:
    """``conv(x)`` as tokens (b, rows * columns, out_channels) where it is one product: its patches do not overlap, x is
    channels-last and on a CPU, whose convolutions take twice as long; else None.

    Args:
        conv: a plain ``nn.Conv2d``; hooks and replaced modules act as everywhere.
        x: (b, c, height, width).
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not _is_plain(conv, nn.Conv2d):
        return None
    assert isinstance(conv, nn.Conv2d)
    b, c, height, width = x.shape
    side = conv.kernel_size[0]
    square = conv.kernel_size == conv.stride == (side, side) and conv.groups == 1
    whole = isinstance(height, int) and height % side == 0 and width % side == 0
    if not (square and whole and conv.padding == (0, 0) and x.is_contiguous(memory_format=torch.channels_last)):
        return None
    patches = x.permute(0, 2, 3, 1).reshape(b, height // side, side, width // side, side, c).transpose(2, 3)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(patches.reshape(b, -1, side * side * c), weight, conv.bias)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is a product with its weight and nothing else."""
    if type(module) is not kind or is_replaced(module) or is_hooked(module):
        return False
    return type(module.weight) in (
        nn.Parameter,
        Tensor,
    )  # subclasses, of quantized or distributed weights, may not split
