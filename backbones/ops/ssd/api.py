"""State-space duality as functions: check their arguments, bring them to one dtype, and call a backend."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.dispatch import choose
from backbones.ops.ssd.chunked import ssd_chunked
from backbones.ops.ssd.naive import ssd_naive


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    orders: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk: int = 64,
    backend: str | None = None,
) -> Tensor:
    """Runs a linear recurrence with one decay for each head over l tokens (Mamba-2, arXiv:2405.21060, section 6).

    With p_t = orders[t] the token visited at step t and dt = softplus(dt[:, p_t] + dt_bias)::

        S_t = exp(dt A) S_(t-1) + dt x[:, p_t] B[:, p_t]^T        (S starts at 0; one p x n matrix for each head)
        y[:, p_t] = S_t C[:, p_t] + D x[:, p_t]

    Head i of h reads group i // (h / g) of B and C. Everything is given in token order.

    Args:
        x: (b, l, h, p), h heads of width p.
        dt: (b, l, h) step sizes before bias and softplus.
        A: (h,) decay rates, negative for a stable recurrence.
        B: (b, l, g, n) input weights of g groups; g divides h.
        C: (b, l, g, n) output weights.
        D: (h,) skip weights, or None.
        orders: (t,) integers in 0..l-1, in the order of visits; the outputs of repeated visits are added up, and
            tokens never visited are 0. None visits 0..l-1.
        dt_bias: (h,), or None.
        dt_softplus: False uses ``dt + dt_bias`` as the step size.
        chunk: steps of which the chunked form makes one masked attention. The result does not depend on it.
        backend: "naive" is the recurrence, step by step; "chunked" matrix products (PyTorch's own, so that the
            vendor's library runs them). Both run on every device, have derivatives of any order, and can be compiled
            and, with any batch size, exported. None uses "chunked".

    Returns:
        (b, l, h, p) in ``x.dtype``, computed in float32 (float64 where ``x`` is float64).

    Raises:
        ValueError: an argument has another shape, dtype or device than stated, or names a token out of range (on a
            GPU the device asserts that instead); the message names it. Any strides are fine. NaN flows through, in the
            chunked form to every token of its image.
    """
    _check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, orders=orders, dt_bias=dt_bias)
    _check_shapes(x, dt, A, B, C, D, dt_bias)
    _check_orders(orders, x.shape[1])
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected a number of steps >= 1")
    backend = choose("ssd", backend, x.device.type, x.dtype)
    dtype = _state_dtype(x)
    with _without_autocast(x):
        dt = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        tokens, A, B, C = (y.to(dtype) for y in (x, A, B, C))
        u = tokens
        if orders is not None:
            u, dt, B, C = (y.index_select(1, orders) for y in (tokens, dt, B, C))
        y = ssd_naive(u, dt, A, B, C) if backend == "naive" else ssd_chunked(u, dt, A, B, C, chunk)
        if D is not None:
            y = y + D.to(dtype).unsqueeze(-1) * u
        if orders is not None:
            y = torch.zeros_like(tokens).index_add(1, orders, y)
    return y.to(x.dtype)


def ssd_noncausal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """State-space duality without order or decay: all tokens share one state (VSSD, arXiv:2407.18559, section 3.2).

    With dt = softplus(dt + dt_bias)::

        S = sum over l of (-A dt_l) x_l B_l^T        (one p x n matrix for each head)
        y_l = S C_l + D x_l

    It is linear attention with the weight -A dt of each token, which is positive where A is negative. The sum is
    not divided by l.

    Args:
        x: (b, l, h, p), h heads of width p.
        dt: (b, l, h) step sizes before bias and softplus.
        A: (h,).
        B: (b, l, g, n) input weights of g groups; head i of h reads group i // (h / g).
        C: (b, l, g, n) output weights.
        D: (h,) skip weights, or None.
        dt_bias: (h,), or None.
        dt_softplus: False uses ``dt + dt_bias`` as the step size.

    Returns:
        (b, l, h, p) in ``x.dtype``, computed in float32 (float64 where ``x`` is float64). The sum over many tokens
        may overflow float16: give x in float32 where that matters.

    Raises:
        ValueError: an argument has another shape, dtype or device than stated; the message names it.
    """
    _check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    _check_shapes(x, dt, A, B, C, D, dt_bias)
    dtype, groups = _state_dtype(x), B.shape[2]
    with _without_autocast(x):
        weight = -_step_sizes(dt, dt_bias, dt_softplus, dtype) * A.to(dtype)
        tokens = x.to(dtype)
        # The heads of a group stand side by side: one matrix product each way, whatever their number.
        weighted = (weight.unsqueeze(-1) * tokens).unflatten(2, (groups, -1)).flatten(3).transpose(1, 2)
        states = B.to(dtype).permute(0, 2, 3, 1) @ weighted  # (b, g, n, h / g * p)
        y = (C.to(dtype).transpose(1, 2) @ states).transpose(1, 2).reshape(x.shape)
        if D is not None:
            y = y + D.to(dtype).unsqueeze(-1) * tokens
    return y.to(x.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # meta tensors know no autocast


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _check_tensors(**tensors: Any) -> None:
    device = tensors["x"].device if isinstance(tensors["x"], Tensor) else None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            if x is None and name in ("D", "orders", "dt_bias"):
                continue
            raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor")
        if x.device != device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {device}, where x is")
        if name == "orders":
            if x.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"orders: got dtype {x.dtype}, expected int32 or int64")
        elif not x.is_floating_point():
            raise ValueError(f"{name}: got dtype {x.dtype}, expected a real floating dtype")


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> None:
    for name, tensor, axes in (("x", x, "b, l, h, p"), ("B", B, "b, l, g, n")):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected 4 dimensions ({axes})")
        if 0 in tensor.shape[1:]:
            raise ValueError(
                f"{name}: got an empty tensor of shape {tuple(tensor.shape)}, expected ({axes}) with no 0 but b"
            )
    (b, length, heads, _), (_, _, groups, n) = x.shape, B.shape

    def check(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
        if tensor.shape != tuple(expected):
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(expected)} = ({axes}), "
                f"given x {tuple(x.shape)} and B {tuple(B.shape)}"
            )

    if heads % groups:
        raise ValueError(f"B: got {groups} groups, expected a number that divides the {heads} heads of x")
    check("dt", dt, (b, length, heads), "b, l, h")
    check("B", B, (b, length, groups, n), "b, l, g, n")
    check("C", C, (b, length, groups, n), "b, l, g, n")
    for name, vector in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check(name, vector, (heads,), "h")


def _check_orders(orders: Tensor | None, length: int) -> None:
    if orders is None:
        return
    if orders.dim() != 1 or orders.shape[0] == 0:
        raise ValueError(f"orders: got shape {tuple(orders.shape)}, expected (t,) with t >= 1")
    # Looking at values waits for a GPU, and a traced tensor has none.
    if type(orders) is Tensor and orders.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in torch.aminmax(orders))
        if low < 0 or high >= length:
            found = low if low < 0 else high
            raise ValueError(f"orders: found token {found}, expected 0..{length - 1} (x has {length} tokens)")
