"""The selective scan in plain PyTorch: the definition that every other backend is held against.

Any device, any floating dtype. The cost is linear in the number of steps, backward included, because the loop runs over
``unbind``: the gradient of an ``x[:, t]`` would be a zero tensor as large as ``x``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.derivatives import gradients


def selective_scan_naive(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    orders: Tensor | None = None,
    delta_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    delta_softplus: bool = True,
    out: str = "sum",
    local_window: int = 0,
) -> Tensor:
    """:func:`backbones.ops.selective_scan` as a loop over steps; arguments and shapes as there, unchecked.

    Computes in float32, or in float64 where ``u`` is float64, and returns ``u.dtype``. Differentiable any
    number of times.
    """
    b, length, k, _ = delta.shape
    c = A.shape[1]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    if orders is None:
        orders = torch.arange(length, device=u.device).expand(k, length)
    tokens = orders.long().T  # (t, k)
    visits = tokens * k + torch.arange(k, device=u.device)  # rows of an (l * k, ...) table

    with torch.autocast(u.device.type, enabled=False):
        if dt_weight is not None:
            delta = torch.einsum("blkr,kcr->blkc", delta.to(dtype), dt_weight.to(dtype))
        per_order_u = u if u.dim() == 4 else u.unsqueeze(2).expand(b, length, k, c)
        u_steps, dt_steps, B_steps, C_steps = (
            x.to(dtype).flatten(1, 2)[:, visits] for x in (per_order_u, delta, B, C)
        )  # (b, t, k, c or n)
        if delta_bias is not None:
            dt_steps = dt_steps + delta_bias.to(dtype)
        if delta_softplus:
            dt_steps = F.softplus(dt_steps)
        states = _states(u_steps, dt_steps, A.to(dtype), B_steps, local_window)
        y = torch.stack(
            [(h * C_t.unsqueeze(-2)).sum(-1) for h, C_t in zip(states, C_steps.unbind(1), strict=True)], dim=1
        )
        if D is not None:
            y = y + D.to(dtype) * u_steps
        if out == "per_order":
            y = y.new_zeros(b, length * k, c).index_add(1, visits.flatten(), y.flatten(1, 2)).unflatten(1, (length, k))
        elif out == "sum":
            y = y.new_zeros(b, length, c).index_add(1, tokens.flatten(), y.flatten(1, 2))
    return y.to(u.dtype)


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, local_window: int) -> list[Tensor]:
    """The (b, k, c, n) state of every step; u, dt (b, t, k, c) and B (b, t, k, n) in visiting order."""
    decays = [torch.exp(dt_t.unsqueeze(-1) * A) for dt_t in dt.unbind(1)]
    inputs = [x.unsqueeze(-1) * B_t.unsqueeze(-2) for x, B_t in zip((dt * u).unbind(1), B.unbind(1), strict=True)]
    states: list[Tensor] = []
    h = torch.zeros_like(inputs[0])
    for decay, x in zip(decays, inputs, strict=True):
        h = decay * h + x
        states.append(h)
    if local_window > 1:
        for start in range(0, len(states), local_window):
            later = torch.zeros_like(h)  # sum over the later steps of the window, decayed back to this one
            for s in reversed(range(start, min(start + local_window, len(states)))):
                states[s] = states[s] + decays[s] * later
                later = decays[s] * later + inputs[s]
    return states


def states_shape(b: int, t: int, k: int, c: int, n: int) -> tuple[int, ...]:
    """Nothing is kept for backward, which runs the forward again under autograd."""
    return (0,)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, delta_softplus: bool, out: str, local_window: int, save: bool,
    visits: list[bool] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :mod:`backbones.ops.scan.operator`."""
    if orders is not None:
        low, high = (int(x) for x in torch.aminmax(orders))
        length = delta.shape[1]
        if low < 0 or high >= length:
            found = low if low < 0 else high
            raise ValueError(f"orders: found token {found}, expected 0..{length - 1} (delta has {length} tokens)")
    y = selective_scan_naive(u, delta, A, B, C, D, orders, delta_bias, dt_weight, delta_softplus, out, local_window)
    return y, u.new_empty(0, dtype=torch.float32)


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, states: Tensor, delta_softplus: bool, out: str,
    local_window: int, visits: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See :mod:`backbones.ops.scan.operator`."""

    def scan(u, delta, A, B, C, D, delta_bias, dt_weight):  # type: ignore[no-untyped-def]
        return selective_scan_naive(
            u, delta, A, B, C, D, orders, delta_bias, dt_weight, delta_softplus, out, local_window
        )

    found = gradients(scan, (u, delta, A, B, C, D, delta_bias, dt_weight), grad)
    return tuple(states if x is None else x for x in found)
