"""The `cpu` backend: a C++ kernel with a plain C interface (`csrc/`), called through :mod:`backbones.ops.native`.

SIMD lanes run across channels, states stay in registers, softplus, exp and D are fused, and backward recomputes the
states between saved ones. Where all orders have the same `dt_weight` and A, and the same row of `delta` at every step,
as PlainMamba's, forward computes step sizes and decays once for all. Results are bitwise the same for any number of
threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.ops.native import ScanCall, pointer, run
from backbones.ops.rows import contiguous_rows
from backbones.ops.scan.projection import projection_gradients

CHUNK = 64  # steps between two saved states; kChunk in csrc/scan.h
_OUT = {"sum": 0, "per_order": 1, "per_step": 2}


def states_shape(b: int, t: int, k: int, c: int, n: int) -> tuple[int, ...]:
    """Shape of what `forward` saves for `backward`: the state at the start of every chunk but the first."""
    return (b, k, (t - 1) // CHUNK, n, c)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of the batch, token and order axes of (b, l, c) or (b, l, k, c)."""
    strides = x.stride()
    return (strides[0], strides[1], strides[2] if len(strides) == 4 else 0)


def _described(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, delta_softplus: bool, out: str, local_window: int,
) -> ScanCall:  # fmt: skip
    """The record of a call, without what its direction adds."""
    b, l = delta.shape[:2]
    k, c, n = A.shape
    su_b, su_l, su_k = _strides(u)
    sdelta_b, sdelta_l, sdelta_k = delta.stride()[:3]
    sB_b, sB_l, sB_k = B.stride()[:3]
    sC_b, sC_l, sC_k = C.stride()[:3]
    return ScanCall(
        b=b, l=l, t=l if orders is None else orders.shape[1], k=k, c=c, n=n,
        bf16=u.dtype == torch.bfloat16, u_shared=u.dim() == 3, softplus=delta_softplus, out=_OUT[out],
        window=local_window, threads=torch.get_num_threads(),
        u=u.data_ptr(), delta=delta.data_ptr(), B=B.data_ptr(), C=C.data_ptr(),
        su_b=su_b, su_l=su_l, su_k=su_k, sdelta_b=sdelta_b, sdelta_l=sdelta_l, sdelta_k=sdelta_k,
        sB_b=sB_b, sB_l=sB_l, sB_k=sB_k, sC_b=sC_b, sC_l=sC_l, sC_k=sC_k,
        A=A.data_ptr(), D=pointer(D), bias=pointer(delta_bias), dt_weight=pointer(dt_weight),
        rank=0 if dt_weight is None else dt_weight.shape[2], orders=pointer(orders),
    )  # fmt: skip


def _run(direction: str, call: ScanCall, orders: Tensor | None) -> None:
    if not run(direction, call):
        assert orders is not None
        found = orders[(orders < 0) | (orders >= call.l)][0].item()
        raise ValueError(f"orders: found token {found}, expected 0..{call.l - 1} (delta has {call.l} tokens)")


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, delta_softplus: bool, out: str, local_window: int, save: bool,
    visits: list[bool] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and, when `save`, the states for `backward`. Raises ValueError for an order outside 0..l-1."""
    u, delta, B, C = contiguous_rows(u), contiguous_rows(delta), contiguous_rows(B), contiguous_rows(C)
    b, l = u.shape[:2]
    k, c, n = A.shape
    t = l if orders is None else orders.shape[1]
    y = u.new_empty({"sum": (b, l, c), "per_order": (b, l, k, c), "per_step": (b, t, k, c)}[out])
    # A window moves the saved states to its multiples, which may leave slots at the end unused.
    shape = states_shape(b, t, k, c, n) if save else (0,)
    states = (A.new_zeros if local_window > 1 else A.new_empty)(shape)
    call = _described(u, delta, A, B, C, D, orders, delta_bias, dt_weight, delta_softplus, out, local_window)
    call.y, call.states = y.data_ptr(), states.data_ptr()
    _run("forward", call, orders)
    return y, states


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, states: Tensor, delta_softplus: bool, out: str,
    local_window: int, visits: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, delta_bias and dt_weight, contiguous; (0,)-shaped for absent arguments."""
    u, delta, B, C = contiguous_rows(u), contiguous_rows(delta), contiguous_rows(B), contiguous_rows(C)
    grad = contiguous_rows(grad)
    du, dB, dC = (x.new_empty(x.shape) for x in (u, B, C))
    dA = A.new_empty(A.shape)
    # Of the projected step sizes, where there is a projection.
    ddelta = delta.new_empty(delta.shape) if dt_weight is None else A.new_empty((*delta.shape[:3], A.shape[1]))
    dD = A.new_empty((0,) if D is None else D.shape)
    dbias = A.new_empty((0,) if delta_bias is None else delta_bias.shape)
    call = _described(u, delta, A, B, C, D, orders, delta_bias, dt_weight, delta_softplus, out, local_window)
    call.grad, call.states = grad.data_ptr(), states.data_ptr()
    call.sgrad_b, call.sgrad_l, call.sgrad_k = _strides(grad)
    call.du, call.ddelta, call.dB, call.dC = du.data_ptr(), ddelta.data_ptr(), dB.data_ptr(), dC.data_ptr()
    call.dA, call.dD, call.dbias = dA.data_ptr(), dD.data_ptr(), dbias.data_ptr()
    _run("backward", call, orders)
    if dt_weight is None:
        return du, ddelta, dA, dB, dC, dD, dbias, A.new_empty((0,))
    ddelta, ddt_weight = projection_gradients(ddelta, delta, dt_weight)
    return du, ddelta, dA, dB, dC, dD, dbias, ddt_weight
