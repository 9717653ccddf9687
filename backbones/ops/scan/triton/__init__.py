"""The selective scan in Triton, for NVIDIA and AMD GPUs; ``TRITON_INTERPRET=1`` runs it on the CPU, for tests.

Importing this package imports neither Triton nor the kernels: that happens at the first scan.
"""

import functools
import os

import torch
from torch import Tensor

from backbones.ops.scan.projection import per_order_linear, projection_gradients

_MIN_TRITON = (3, 4)  # kernels carry tuples of rows through loops
CHUNK = 64  # steps between the states that forward keeps; see launch.py for what that costs


@functools.cache
def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable_reason() -> str | None:
    """None where the kernels run, else one line that says why they do not."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install triton; Linux only)"
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) < _MIN_TRITON:
        return f"Triton {triton.__version__} is too old, {'.'.join(map(str, _MIN_TRITON))} or newer is needed"
    if not interprets() and not torch.cuda.is_available():
        return "PyTorch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly)"
    return None


def states_shape(b: int, t: int, k: int, c: int, n: int) -> tuple[int, ...]:
    """The state at the start of every chunk of 64 steps but the first."""
    return (b, k, (t - 1) // CHUNK, n, c)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, delta_softplus: bool, out: str, local_window: int, save: bool,
    visits: list[bool] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :mod:`backbones.ops.scan.operator`."""
    from backbones.ops.scan.triton import launch

    delta = delta if dt_weight is None else per_order_linear(delta, dt_weight)
    return launch.forward(u, delta, A, B, C, D, orders, delta_bias, delta_softplus, out, local_window, save, visits)


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, states: Tensor, delta_softplus: bool, out: str,
    local_window: int, visits: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See :mod:`backbones.ops.scan.operator`."""
    from backbones.ops.scan.triton import launch

    low, delta = delta, delta if dt_weight is None else per_order_linear(delta, dt_weight)
    du, ddelta, *others = launch.backward(
        grad, u, delta, A, B, C, D, orders, delta_bias, states, delta_softplus, out, local_window, visits
    )
    if dt_weight is None:
        return du, ddelta, *others, A.new_empty(0)
    ddelta, ddt_weight = projection_gradients(ddelta, low, dt_weight)
    return du, ddelta, *others, ddt_weight
