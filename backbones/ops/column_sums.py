"""Sums over the rows of a matrix in Triton: PyTorch's own clear a buffer first where rows are many."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.remember import remember
from backbones.ops.triton_host import Launch, cdiv, empty

_COLUMNS = 16  # to a program
_ROWS = 256  # at once


@triton.jit
def column_sums_kernel(parts, sums, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums (width) of parts (rows, width), COLUMNS to a program, in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, rows, ROWS):
        r = begin + tl.arange(0, ROWS)
        within = (r[:, None] < rows) & (column[None, :] < width)
        total += tl.load(parts + r.to(tl.int64)[:, None] * width + column[None, :], mask=within, other=0.0)
    tl.store(sums + column, tl.sum(total, axis=0), mask=column < width)


_launches: dict[tuple[int, ...], Launch] = {}


def column_sums(parts: Tensor) -> Tensor:
    """(width) from a contiguous (rows, width), both in float32, on the current GPU."""
    rows, width = shape = parts.shape
    run = _launches.get(shape)
    if run is None:
        grid = (cdiv(width, _COLUMNS),)
        made = Launch(column_sums_kernel, grid, (rows, width), 8, ROWS=_ROWS, COLUMNS=_COLUMNS)
        run = remember(_launches, shape, made)
    sums = empty((width,), torch.float32, parts.device)
    run(parts, sums)
    return sums
