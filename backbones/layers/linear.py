"""Linear layers whose output is used in parts."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from backbones.ops.tracing import is_hooked


def linear_parts(linear: nn.Module, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``linear(x)`` split into ``sizes`` along its last axis.

    On a CPU, a plain linear layer is computed as one product per part, which write contiguous rows. Any other module is
    called: adapters, quantized and parametrised layers, and hooks act as everywhere. GPUs are spared the launches.
    """
    if x.is_cuda or not _is_plain(linear):
        return linear(x).split(list(sizes), dim=-1)
    assert isinstance(linear, nn.Linear)
    weights = linear.weight.split(list(sizes))
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(list(sizes))
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of ``module`` is a product with its weight and nothing else."""
    replaced = "forward" in vars(module)  # on the instance
    if type(module) is not nn.Linear or replaced or is_hooked(module):
        return False
    return type(module.weight) in (
        nn.Parameter,
        Tensor,
    )  # subclasses, of quantized or distributed weights, may not split
