"""The selective scan as a function: checks its arguments, brings them to the operator's dtypes, and calls it."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import empty_result
from backbones.ops.dispatch import choose_for, kernels
from backbones.ops.remember import remember
from backbones.ops.rows import PLAIN
from backbones.ops.scan import naive
from backbones.ops.scan.operator import output_shape, scan_op
from backbones.ops.scan.visits import Visits
from backbones.ops.tracing import is_transformed, is_watched

_OUTPUTS = ("sum", "per_order", "per_step")
_OPTION_TYPES = (bool, str, int)
_VISITS = (Visits, type(None))
_MOST = 256  # kinds of calls: images may be of ever new sizes
_eager_scans: dict[Any, Any] = {}  # `EagerScan` by kinds whose checks passed


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    orders: Tensor | None = None,
    delta_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    delta_softplus: bool = True,
    out: str = "sum",
    local_window: int = 0,
    visits: Visits | None = None,
    backend: str | None = None,
) -> Tensor:
    """Runs k linear recurrences over the same l tokens, each visiting them in its own order (Mamba, algorithm 2).

    With p = orders[k, t] the token visited at step t and dt = softplus(delta[:, p, k] + delta_bias[k])::

        h = exp(dt A[k]) h + dt B[:, p, k] u[:, p]        (h starts at 0)
        y = <C[:, p, k], h> + D[k] u[:, p]

    Everything is given in token order: nothing is permuted, flipped or merged outside of the operator.

    Args:
        u: (b, l, c), read by every order, or (b, l, k, c).
        delta: (b, l, k, c) step sizes before bias and softplus; (b, l, k, r) where ``dt_weight`` is given.
        A: (k, c, n) decay rates, negative for a stable recurrence.
        B: (b, l, k, n) input weights.
        C: (b, l, k, n) output weights.
        D: (k, c) skip weights, or None.
        orders: (k, t) integers in 0..l-1; an order may skip or repeat tokens. None visits 0..l-1.
        delta_bias: (k, c), or None.
        dt_weight: (k, c, r), projects ``delta`` inside of the operator: ``einsum("blkr,kcr->blkc", delta,
            dt_weight)`` takes its place. Backends that can do so never store the product; "cpu" makes it again in
            backward.
        delta_softplus: False takes ``delta + delta_bias`` as dt.
        out: "sum" gives (b, l, c), all visits of all orders added at their token; "per_order" (b, l, k, c),
            tokens never visited are 0; "per_step" (b, t, k, c), in visiting order.
        local_window: w > 1 makes the scan locally bi-directional (LBMamba): within windows of w steps,
            counted from the first step, a state also receives the later inputs of its window, decayed back to
            it. 0 and 1 are the plain scan.
        visits: what is known of ``orders``, such as :meth:`backbones.patterns.ScanPattern.visits`; None looks,
            which on a GPU waits for the device once per table. Not checked: wrong ones give wrong results.
        backend: "naive", "cpu" or "triton"; None takes the fastest that runs on the tensors' device.

    Returns:
        The output in ``u.dtype``, accumulated in float32 (float64 where ``u`` is float64).

    Raises:
        ValueError: an argument has another shape, dtype or device than stated, is empty (but for a batch of 0,
            whose result is empty), or names a token out of range; the message names it. Also where ``backend`` is
            given and cannot run. Any strides are fine, and NaN flows through.
        NotImplementedError: forward-mode or ``torch.func`` derivatives, or second ones, through another backend than
            "naive".
    """
    tensors = (u, delta, A, B, C, D, orders, delta_bias, dt_weight)
    kind = _kind(tensors, delta_softplus, out, local_window, visits, backend)
    if kind is not None and (known := _eager_scans.get(kind)) is not None:
        return known(tensors)
    _check_tensors(u=u, delta=delta, A=A, B=B, C=C, D=D, orders=orders, delta_bias=delta_bias, dt_weight=dt_weight)
    _check_shapes(u, delta, A, B, C, D, orders, delta_bias, dt_weight)
    if out not in _OUTPUTS:
        raise ValueError(f"out: got {out!r}, expected one of {', '.join(_OUTPUTS)}")
    if local_window < 0:
        raise ValueError(f"local_window: got {local_window}, expected a number of steps >= 0")
    if visits is not None and not isinstance(visits, Visits):
        raise ValueError(f"visits: got {type(visits).__name__}, expected backbones.ops.Visits")

    floats = (u, delta, A, B, C, D, delta_bias, dt_weight)
    backend, transformed = choose_for("selective_scan", backend, *floats)
    if u.shape[0] == 0:
        steps = delta.shape[1] if orders is None else orders.shape[1]
        shape = output_shape(out, 0, delta.shape[1], steps, A.shape[0], A.shape[1])
        return empty_result(shape, u, delta, A, B, C, D, delta_bias, dt_weight)
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    token_dtype = _token_dtype(backend, u, delta, B, C)
    # `torch.jit.trace` runs once with gradients and once without, and expects the same program.
    save = torch.jit.is_tracing() or (  # type: ignore[attr-defined]
        torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in floats])
    )
    lay_out = _as if backend == "triton" else _as_contiguous  # the former does so itself
    arguments = (
        _as(u, token_dtype),
        _as(delta, token_dtype),
        lay_out(A, state_dtype),
        _as(B, token_dtype),
        _as(C, token_dtype),
        None if D is None else lay_out(D, state_dtype),
        None if orders is None else lay_out(orders, torch.int32),
        None if delta_bias is None else lay_out(delta_bias, state_dtype),
        None if dt_weight is None else lay_out(dt_weight, state_dtype),
        delta_softplus,
        out,
        local_window,
        save,
        list(visits) if visits is not None and backend == "triton" else None,  # the others look, at no cost
    )
    if transformed:
        return _as(naive.forward(*arguments)[0], u.dtype)
    if kind is not None and backend == "triton":
        made = kernels("scan.triton.eager").EagerScan(
            tensors, arguments[: len(tensors)], delta_softplus, out, local_window, visits
        )
        return remember(_eager_scans, kind, made, _MOST)(tensors)
    y, _ = scan_op(*arguments, backend)
    return _as(y, u.dtype)


def _kind(
    tensors: tuple[Any, ...], delta_softplus: Any, out: Any, local_window: Any, visits: Any, backend: Any
) -> tuple[Any, ...] | None:  # fmt: skip
    """What the checks look at, for arguments that `EagerScan` may take; else None."""
    u = tensors[0]
    if not isinstance(u, Tensor) or not (u.is_cuda if backend is None else backend == "triton") or u.is_meta:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched() or is_transformed(*tensors):  # type: ignore[attr-defined]
        return None
    if (type(delta_softplus), type(out), type(local_window)) != _OPTION_TYPES or type(visits) not in _VISITS:
        return None
    if not all([x is None or type(x) in PLAIN for x in tensors]):
        return None
    kinds = [None if x is None else (x.dtype, x.shape, x.device) for x in tensors]
    return *kinds, delta_softplus, out, local_window, visits, backend


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call of `to` takes a microsecond even if it does nothing


def _as_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _as(x, dtype).contiguous()


def _token_dtype(backend: str, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """One dtype for u, delta, B and C: their own if they agree and the backend reads it, else float32 (or float64)."""
    dtype = u.dtype
    if dtype == torch.float64:
        return dtype
    if delta.dtype != dtype or B.dtype != dtype or C.dtype != dtype or (backend == "cpu" and dtype == torch.float16):
        return torch.float32
    return dtype


def _check_tensors(**tensors: Any) -> None:
    device = tensors["u"].device if isinstance(tensors["u"], Tensor) else None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            if x is None and name in ("D", "orders", "delta_bias", "dt_weight"):
                continue
            raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor")
        if x.device != device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {device}, where u is")
        if name == "orders":
            if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
                raise ValueError(f"orders: got dtype {x.dtype}, expected an integer dtype")
        elif not x.is_floating_point():
            raise ValueError(f"{name}: got dtype {x.dtype}, expected a real floating dtype")


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None,
) -> None:  # fmt: skip
    if delta.dim() != 4:
        axes = "b, l, k, c" if dt_weight is None else "b, l, k, r"
        raise ValueError(f"delta: got shape {tuple(delta.shape)}, expected 4 dimensions ({axes})")
    if A.dim() != 3:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected 3 dimensions (k, c, n)")
    if 0 in delta.shape[1:]:
        raise ValueError(
            f"delta: got an empty tensor of shape {tuple(delta.shape)}, expected (b, l, k, c) with no 0 but for b"
        )
    b, length, k, last = delta.shape
    c, n = last if dt_weight is None else A.shape[1], A.shape[2]
    if c == 0 or n == 0:
        raise ValueError(f"A: got an empty tensor of shape {tuple(A.shape)}, expected (k, c, n) with no 0")

    def check(name: str, x: Tensor, expected: tuple[int, ...], axes: str) -> None:
        if x.shape != expected:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected {expected} = ({axes}), "
                f"given delta {tuple(delta.shape)} and A {tuple(A.shape)}"
            )

    if u.dim() == 3:
        check("u", u, (b, length, c), "b, l, c")
    else:
        check("u", u, (b, length, k, c), "b, l, k, c")
    check("A", A, (k, c, n), "k, c, n")
    check("B", B, (b, length, k, n), "b, l, k, n")
    check("C", C, (b, length, k, n), "b, l, k, n")
    if D is not None:
        check("D", D, (k, c), "k, c")
    if delta_bias is not None:
        check("delta_bias", delta_bias, (k, c), "k, c")
    if dt_weight is not None:
        check("dt_weight", dt_weight, (k, c, last), "k, c, r")
    if orders is not None and (orders.dim() != 2 or orders.shape[0] != k or orders.shape[1] == 0):
        raise ValueError(
            f"orders: got shape {tuple(orders.shape)}, expected ({k}, t) with t >= 1: one row for each order"
        )
