"""The selective scan of u together with the projections of u that give it step sizes, B and C."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import choose_for, kernels
from backbones.ops.rows import PLAIN
from backbones.ops.scan.visits import Visits
from backbones.ops.tracing import is_watched, runs_eagerly

_TRITON = "scan.triton.projected"


def has_projected_scan(
    u: Tensor, *weights: Tensor, orders: Tensor | None, visits: Visits | None, backend: str | None
) -> bool:
    """Whether :func:`projected_scan` serves u and all parameters: on a GPU in eager mode, where nobody looks on.

    Orders that visit a token twice read the same u. Products and scan have one dtype, which is that of u, of x_weight
    and dt_weight (the first two of ``weights``), and of autocast; the others are in float32.
    """
    if not u.is_cuda or not runs_eagerly(u) or is_watched():
        return False
    if orders is not None and (visits is None or (visits.repeats and u.dim() == 4)):
        return False
    if any([type(x) not in PLAIN for x in (u, *weights)]):
        return False
    dtype = u.dtype
    if weights[0].dtype != dtype or weights[1].dtype != dtype:
        return False
    if any([x.dtype != torch.float32 for x in weights[2:]]):
        return False
    if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != dtype:
        return False
    return choose_for("selective_scan", backend, u, *weights) == ("triton", False)


def projected_scan(
    u: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    orders: Tensor | None = None,
    out: str = "sum",
    local_window: int = 0,
    visits: Visits | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """``selective_scan(u, delta, -exp(A_log), B, C, D, delta_bias=bias)``, where u times x_weight is [delta | B | C]
    and delta still has to be multiplied by dt_weight; for tensors of which :func:`has_projected_scan` holds.

    Args:
        u: (b, l, c), or (b, l, k, c).
        x_weight: (k, r + 2 n, c).
        dt_weight: (k, c, r).
        bias: (k, c).
        A_log: (k, c, n).
        D: (k, c).
        orders: see :func:`backbones.ops.selective_scan`.
        out: see there.
        local_window: see there.
        visits: see there.
        into: (b, t, k, c), contiguous rows in the dtype of u: the memory of the result of ``out="per_step"`` without a
            window. See :func:`joined`.

    Raises:
        NotImplementedError: second derivatives.
    """
    if orders is not None and orders.dtype != torch.int32:
        orders = orders.to(torch.int32)
    x_weight, dt_weight, bias, A_log, D = (x.contiguous() for x in (x_weight, dt_weight, bias, A_log, D))
    if torch.is_grad_enabled():
        return _ProjectedScan.apply(u, x_weight, dt_weight, bias, A_log, D, orders, out, local_window, visits, into)
    forward = kernels(_TRITON).forward
    return forward(u, x_weight, dt_weight, bias, A_log, D, orders, out, local_window, visits, into, False)[0]


def joined(whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts, 1)``, where each of them was written into its place in ``whole``: nothing is copied."""
    return _Joined.apply(whole, *parts) if torch.is_grad_enabled() else whole


class _ProjectedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x_weight: Tensor, dt_weight: Tensor, bias: Tensor, A_log: Tensor, D: Tensor,
        orders: Tensor | None, out: str, window: int, visits: Visits | None, into: Tensor | None,
    ) -> Tensor:  # fmt: skip
        forward = kernels(_TRITON).forward
        y, saved = forward(u, x_weight, dt_weight, bias, A_log, D, orders, out, window, visits, into, True)
        assert saved is not None
        ctx.save_for_backward(u, x_weight, dt_weight, bias, D, orders, *saved)
        ctx.options = out, window, visits
        return y if into is None else y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected = kernels(_TRITON)
        u, x_weight, dt_weight, bias, D, orders, *saved = ctx.saved_tensors
        args = (grad, projected.Saved(*saved), u, x_weight, dt_weight, bias, D, orders, *ctx.options)
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                results = projected.backward(*args)
            results = first_order("selective_scan", results, (grad, u, x_weight, dt_weight, bias, D))
        else:
            results = projected.backward(*args)
        return *results, None, None, None, None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split_with_sizes(ctx.sizes, 1)
