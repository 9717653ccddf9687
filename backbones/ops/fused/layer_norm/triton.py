"""LayerNorm and RMSNorm over the last axis, several rows per program; PyTorch gives a block of threads to a row of 96.

Forward reads x and writes y, the mean and the reciprocal deviation of every row; backward reads the gradient and x and
writes dx. Both take a residual sum in front of the norm along. Gradients of weight and bias are summed by each program
over the rows that it walks, and over the programs by another kernel: in a fixed order, always.
"""

# mypy: ignore-errors

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.column_sums import column_sums
from backbones.ops.remember import remember
from backbones.ops.triton_host import (
    Launch,
    cdiv,
    check_device,
    device_of,
    empty,
    multiprocessors,
    next_power_of_2,
)


@triton.jit
def layer_norm_kernel(
    x, branch, weight, bias, total, y, statistics, rows, c, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y (rows, c) = (x - mean) rstd weight + bias, with mean 0 unless CENTRED; one program for ROWS rows.

    HAS_BRANCH normalises total = x + branch instead, which it writes too. SAVE writes mean and rstd as ``statistics``.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cs = tl.arange(0, BLOCK)[None, :]
    mask = (r[:, None] < rows) & (cs < c)
    value = tl.load(x + r[:, None] * c + cs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        value += tl.load(branch + r[:, None] * c + cs, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + r[:, None] * c + cs, rounded, mask=mask)
        value = rounded.to(tl.float32)
    m = tl.sum(value, 1) / c if CENTRED else tl.zeros((ROWS,), tl.float32)
    centred = tl.where(mask, value - m[:, None], 0.0)
    s = tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)
    value = centred * s[:, None]
    if HAS_WEIGHT:
        value *= tl.load(weight + cs, mask=cs < c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + cs, mask=cs < c, other=0.0).to(tl.float32)
    tl.store(y + r[:, None] * c + cs, value.to(y.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(statistics + r, m, mask=r < rows)
        tl.store(statistics + rows + r, s, mask=r < rows)


@triton.jit
def layer_norm_backward_kernel(
    grad, stream, x, weight, statistics, dx, dbranch, sums, rows, c, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_STREAM: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g w - mean(g w) - xhat mean(g w xhat)), without mean(g w) unless CENTRED.

    HAS_STREAM adds the gradient that x has from elsewhere. HAS_BRANCH writes the sum in another dtype as well.
    A program walks every ``num_programs``-th tile of rows.
    """
    cs = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + cs, mask=cs < c, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        r = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (r[:, None] < rows) & (cs < c)
        g = tl.load(grad + r[:, None] * c + cs, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + r[:, None] * c + cs, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(statistics + r, mask=r < rows, other=0.0)
        s = tl.load(statistics + rows + r, mask=r < rows, other=0.0)
        normed = tl.where(mask, (value - m[:, None]) * s[:, None], 0.0)
        if HAS_WEIGHT:
            dw += g * normed
            db += g
            g = g * w
        through_mean = tl.sum(g, 1) / c if CENTRED else tl.zeros((ROWS,), tl.float32)
        through_scale = tl.sum(g * normed, 1) / c
        value = s[:, None] * (g - through_mean[:, None] - normed * through_scale[:, None])
        if HAS_STREAM:
            value += tl.load(stream + r[:, None] * c + cs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + r[:, None] * c + cs, value.to(dx.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            tl.store(dbranch + r[:, None] * c + cs, value.to(dbranch.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        at = tl.program_id(0) * 2 * c + tl.arange(0, BLOCK)
        tl.store(sums + at, tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < c)
        tl.store(sums + c + at, tl.sum(db, 0), mask=tl.arange(0, BLOCK) < c)


_launches: dict[tuple, tuple[Launch, int]] = {}
_backward_launches: dict[tuple, tuple[Launch, tuple[int, int]]] = {}


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype,
    centred: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(x + branch in the dtype of x, y in ``dtype``, statistics): with ``save`` the means and reciprocal deviations of
    all rows of x + branch (..., c), as (2, rows).

    x is contiguous, and branch, which may be None; weight and bias are (c) or None. Unless ``centred``, the means are
    taken to be 0: RMSNorm.
    """
    check_device("x", x)
    with device_of(x):
        total = x if branch is None else torch.empty_like(x)
        y = torch.empty_like(x, dtype=dtype)
        key = (
            x.shape, x.dtype, None if branch is None else branch.dtype, None if weight is None else weight.dtype,
            None if bias is None else bias.dtype, eps, dtype, centred, save,
        )  # fmt: skip
        found = _launches.get(key)
        if found is None:
            c = x.shape[-1]
            rows = x.numel() // c
            tile, block, warps = _tile(c, 4096)
            made = Launch(
                layer_norm_kernel, (cdiv(rows, tile),), (rows, c, eps), warps, ROWS=tile, BLOCK=block,
                HAS_BRANCH=branch is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
                CENTRED=centred, SAVE=save,
            )  # fmt: skip
            found = remember(_launches, key, (made, rows))
        run, rows = found
        statistics = empty((2, rows), torch.float32, x.device) if save else None
        run(x, branch, weight, bias, total, y, statistics)
    return total, y, statistics


def backward(
    grad: Tensor, stream: Tensor | None, x: Tensor, weight: Tensor | None, statistics: Tensor, centred: bool,
    branch: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, in its dtype, of a branch added to it, in the dtype ``branch``, and of weight and bias, (2, c) in
    float32 or (2, 0) without a weight.

    ``stream``: a further gradient of x, or None.
    """
    with device_of(x):
        other = branch is not None and branch != x.dtype
        key = (
            x.shape, x.dtype, grad.dtype, None if stream is None else stream.dtype, branch,
            None if weight is None else weight.dtype, centred,
        )  # fmt: skip
        found = _backward_launches.get(key)
        if found is None:
            c = x.shape[-1]
            rows = x.numel() // c
            tile, block, warps = _tile(c, 2048)  # besides x and its gradient it holds two sums
            tiles = cdiv(rows, tile)
            programs = min(tiles, 8 * max(1, multiprocessors(x.device)))
            made = Launch(
                layer_norm_backward_kernel, (programs,), (rows, c, tiles), warps, ROWS=tile, BLOCK=block,
                HAS_STREAM=stream is not None, HAS_BRANCH=other, HAS_WEIGHT=weight is not None, CENTRED=centred,
            )  # fmt: skip
            found = remember(_backward_launches, key, (made, (programs, 0 if weight is None else 2 * c)))
        run, shape = found
        dx = torch.empty_like(x)
        dbranch = torch.empty_like(x, dtype=branch) if other else dx
        sums = empty(shape, torch.float32, x.device)
        run(grad, stream, x, weight, statistics, dx, dbranch, sums)
        return dx, dbranch, (sums[:2] if weight is None else column_sums(sums).view(2, -1))


@functools.cache
def _tile(c: int, numbers: int) -> tuple[int, int, int]:
    """(rows, padded channels, warps) of a program that holds about so many numbers at once."""
    block = next_power_of_2(c)
    rows = max(1, numbers // block)
    return rows, block, min(16, max(4, rows * block // 1024))
