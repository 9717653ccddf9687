"""Linear layers whose output is used in parts."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


def linear_parts(linear: nn.Module, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``linear(x)`` split into ``sizes`` along its last axis.

    A plain linear layer is computed as one product per part, which write contiguous rows. Any other module is called:
    adapters, quantized and parametrised layers, and hooks act as everywhere.
    """
    if not _is_plain(linear):
        return linear(x).split(list(sizes), dim=-1)
    weights = linear.get_parameter("weight").split(list(sizes))
    biases = [None] * len(sizes) if linear.bias is None else linear.get_parameter("bias").split(list(sizes))
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of ``module`` is a product with its weight and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # replaced on the instance
        and not any(hooks)
        and not _has_any_global_hook()
    )
