"""LayerNorm and RMSNorm over the last axis, several rows per program; PyTorch gives a block of threads to a row of 96.

Forward reads x and writes y, the mean and the reciprocal deviation of every row; backward reads the gradient and x and
writes dx. Gradients of weight and bias are summed by each program over the rows that it walks, and over the programs
by PyTorch: in a fixed order, always.
"""

# mypy: ignore-errors

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_host import cdiv, check_device, device_of, empty, launch, multiprocessors, next_power_of_2


@triton.jit
def layer_norm_kernel(
    x, weight, bias, y, statistics, rows, c, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """y (rows, c) = (x - mean) rstd weight + bias, with mean 0 unless CENTRED; one program for ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cs = tl.arange(0, BLOCK)[None, :]
    mask = (r[:, None] < rows) & (cs < c)
    value = tl.load(x + r[:, None] * c + cs, mask=mask, other=0.0).to(tl.float32)
    m = tl.sum(value, 1) / c if CENTRED else tl.zeros((ROWS,), tl.float32)
    centred = tl.where(mask, value - m[:, None], 0.0)
    s = tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)
    value = centred * s[:, None]
    if HAS_WEIGHT:
        value *= tl.load(weight + cs, mask=cs < c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + cs, mask=cs < c, other=0.0).to(tl.float32)
    tl.store(y + r[:, None] * c + cs, value.to(y.dtype.element_ty), mask=mask)
    tl.store(statistics + r, m, mask=r < rows)
    tl.store(statistics + rows + r, s, mask=r < rows)


@triton.jit
def layer_norm_backward_kernel(
    grad, x, weight, statistics, dx, sums, rows, c, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g w - mean(g w) - xhat mean(g w xhat)), without mean(g w) unless CENTRED.

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
        tl.store(dx + r[:, None] * c + cs, value.to(dx.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        at = tl.program_id(0) * c + tl.arange(0, BLOCK)
        tl.store(sums + at, tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < c)
        tl.store(sums + tl.num_programs(0) * c + at, tl.sum(db, 0), mask=tl.arange(0, BLOCK) < c)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, centred: bool
) -> tuple[Tensor, Tensor]:
    """(y in ``dtype``, statistics): the means and reciprocal deviations of all rows of x (..., c), as (2, rows).

    x is contiguous; weight and bias are (c) or None. Unless ``centred``, the means are taken to be 0: RMSNorm.
    """
    check_device("x", x)
    c = x.shape[-1]
    rows = x.numel() // c
    y = empty(x.shape, dtype, x.device)
    statistics = empty((2, rows), torch.float32, x.device)
    tile, block, warps = _tile(c, 4096)
    with device_of(x):
        launch(
            layer_norm_kernel, (cdiv(rows, tile),), (x, weight, bias, y, statistics), (rows, c, eps), warps,
            ROWS=tile, BLOCK=block, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTRED=centred,
        )  # fmt: skip
    return y, statistics


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of weight and bias, (2, c) in float32 or (2, 0) without a weight."""
    c = x.shape[-1]
    rows = x.numel() // c
    tile, block, warps = _tile(c, 2048)  # besides x and its gradient it holds two sums
    tiles = cdiv(rows, tile)
    programs = min(tiles, 8 * max(1, multiprocessors(x.device)))
    dx = empty(x.shape, x.dtype, x.device)
    sums = empty((2, programs, c if weight is not None else 0), torch.float32, x.device)
    with device_of(x):
        launch(
            layer_norm_backward_kernel, (programs,), (grad, x, weight, statistics, dx, sums), (rows, c, tiles), warps,
            ROWS=tile, BLOCK=block, HAS_WEIGHT=weight is not None, CENTRED=centred,
        )  # fmt: skip
    return dx, sums.sum(1)


@functools.cache
def _tile(c: int, numbers: int) -> tuple[int, int, int]:
    """(rows, padded channels, warps) of a program that holds about so many numbers at once."""
    block = next_power_of_2(c)
    rows = max(1, numbers // block)
    return rows, block, min(16, max(4, rows * block // 1024))
