"""Weighted sums of rows in Triton: one pass through memory."""

# mypy: ignore-errors

import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.depthwise.triton import tile
from backbones.ops.remember import remember
from backbones.ops.rows import contiguous_rows
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty

_NUMBERS = 2048  # that a program holds
_UNROLLED = 4  # loads that it may have in flight


@triton.jit
def row_sums_kernel(
    x, base, table, weights, y, x_b, x_l, base_b, base_l, rows, c,
    J: tl.constexpr, UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """y[b, i, c] = base[b, i, c] + sum_j weights[j, i] x[b, table[j, i], c], where -1 reads 0.

    Program (batch, tile of rows, channel block).
    """
    blocks = tl.cdiv(c, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_M)
    item = tl.program_id(0)
    cs = item % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    ms = item // blocks % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (item // blocks // tiles).to(tl.int64)
    c_mask = cs < c
    m_mask = ms < rows
    mask = m_mask[:, None] & c_mask[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if HAS_BASE:
        base_at = base + batch * base_b + ms.to(tl.int64)[:, None] * base_l + cs[None, :]
        total += tl.load(base_at, mask=mask, other=0.0).to(tl.float32)
    x += batch * x_b
    for j in tl.range(0, J, loop_unroll_factor=UNROLL):
        row = tl.load(table + j * rows + ms, mask=m_mask, other=-1)
        weight = tl.load(weights + j * rows + ms, mask=m_mask, other=0.0)
        at = x + row.to(tl.int64)[:, None] * x_l + cs[None, :]
        value = tl.load(at, mask=(row >= 0)[:, None] & c_mask[None, :], other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    y_at = y + batch * rows * c + ms.to(tl.int64)[:, None] * c + cs[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=mask)


_launches: dict[tuple, Launch] = {}


def forward(x: Tensor, base: Tensor | None, table: Tensor, weights: Tensor) -> Tensor:
    """(b, m, c) in the dtype of x, see :mod:`backbones.ops.fused.row_sums.operator`; None for a base of zeros."""
    check_device("x", x)
    x, base = contiguous_rows(x), None if base is None else contiguous_rows(base)
    of_base = None if base is None else base.stride()
    key = (x.shape, x.dtype, x.stride(), of_base, table.shape)
    (b, _, c), (j, rows) = x.shape, table.shape
    with device_of(x):
        run = _launches.get(key)
        if run is None:
            block_m, block_c = tile(rows, c, _NUMBERS)
            made = Launch(
                row_sums_kernel, (cdiv(c, block_c) * cdiv(rows, block_m) * b,),
                (*x.stride()[:2], *((0, 0) if base is None else base.stride()[:2]), rows, c), 4,
                J=j, UNROLL=min(j, _UNROLLED), BLOCK_M=block_m, BLOCK_C=block_c, HAS_BASE=base is not None,
            )  # fmt: skip
            run = remember(_launches, key, made)
        y = empty((b, rows, c), x.dtype, x.device)
        run(x, base, table, weights, y)
    return y
