"""Linear layers whose output is used in parts."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


def linear_parts(linear: nn.Module, x: Tensor | Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """``linear(x)`` split into ``sizes`` along its last axis; of a sequence, part i is made of the i-th x.

    A plain linear layer is computed as one product per part, which write contiguous rows. Any other module is called:
    adapters, quantized and parametrised layers, and hooks act as everywhere.
    """
    inputs = [x] * len(sizes) if isinstance(x, Tensor) else list(x)
    if _is_plain(linear):
        weights = linear.get_parameter("weight").split(list(sizes))
        biases = [None] * len(sizes) if linear.bias is None else linear.get_parameter("bias").split(list(sizes))
        return [F.linear(*operands) for operands in zip(inputs, weights, biases, strict=True)]
    outputs = {id(y): linear(y) for y in inputs}
    return [outputs[id(y)].split(list(sizes), dim=-1)[i] for i, y in enumerate(inputs)]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of ``module`` is a product with its weight and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # replaced on the instance
        and not any(hooks)
        and not _has_any_global_hook()
    )
