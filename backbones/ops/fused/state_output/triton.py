"""The outputs of states in Triton: one pass through memory in each direction, over rows of any distance."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.column_sums import column_sums
from backbones.ops.depthwise.triton import tile
from backbones.ops.remember import remember
from backbones.ops.rows import matrix
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty, next_power_of_2

_NUMBERS = 2048  # that a program holds of one tensor
_PROGRAMS = 1024  # into which the sums over rows are cut


@triton.jit
def state_output_kernel(
    states, C, x, D, y, s_row, c_row, x_row, rows, c, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y (rows, c) = states C + x D; one program for ROWS rows and BLOCK columns."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (r < rows)[:, None] & (cs < c)[None, :]
    factor = tl.load(C + r * c_row, mask=r < rows, other=0.0).to(tl.float32)
    skip = tl.load(D + cs, mask=cs < c, other=0.0).to(tl.float32)
    state = tl.load(states + r[:, None] * s_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + r[:, None] * x_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
    total = state * factor[:, None] + value * skip[None, :]
    tl.store(y + r[:, None] * c + cs[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def state_output_backward_kernel(
    grad, states, C, x, D, dstates, dC, dx, sums, g_row, s_row, c_row, x_row, tiles, rows, c,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dstates = grad C, dC = sum of grad states over columns, dx = grad D, and ``sums`` (parts, c) of grad x.

    One program for a part, every so-manieth of the tiles of ROWS rows, and all columns, of which BLOCK is no less.
    """
    part = tl.program_id(0)
    cs = tl.arange(0, BLOCK)
    skip = tl.load(D + cs, mask=cs < c, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for item in range(part, tiles, tl.num_programs(0)):
        r = tl.cast(item, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & (cs < c)[None, :]
        g = tl.load(grad + r[:, None] * g_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
        state = tl.load(states + r[:, None] * s_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + r[:, None] * x_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(C + r * c_row, mask=r < rows, other=0.0).to(tl.float32)
        at = r[:, None] * c + cs[None, :]
        tl.store(dstates + at, (g * factor[:, None]).to(dstates.dtype.element_ty), mask=mask)
        tl.store(dx + at, (g * skip[None, :]).to(dx.dtype.element_ty), mask=mask)
        tl.store(dC + r, tl.sum(g * state, axis=1).to(dC.dtype.element_ty), mask=r < rows)
        total += g * value
    tl.store(sums + part.to(tl.int64) * c + cs, tl.sum(total, axis=0), mask=cs < c)


_launches: dict[tuple, Launch] = {}


def forward(states: Tensor, C: Tensor, x: Tensor, D: Tensor, dtype: torch.dtype) -> Tensor:
    """See :mod:`backbones.ops.fused.state_output.operator`; contiguous."""
    check_device("x", x)
    y = empty(x.shape, dtype, x.device)
    states, C, x, D = matrix(states), matrix(C), matrix(x), D.contiguous()
    with device_of(x):
        key = ("forward", x.shape, dtype, *_kinds(states, C, x, D))
        run = _launches.get(key)
        if run is None:
            rows, c = x.shape
            height, block = tile(rows, c, _NUMBERS)
            made = Launch(
                state_output_kernel, (cdiv(rows, height), cdiv(c, block)),
                (states.stride(0), C.stride(0), x.stride(0), rows, c), 4, ROWS=height, BLOCK=block,
            )  # fmt: skip
            run = remember(_launches, key, made)
        run(states, C, x, D, y)
    return y


def backward(grad: Tensor, states: Tensor, C: Tensor, x: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of states, C, x and D, contiguous."""
    results = tuple(empty(t.shape, t.dtype, t.device) for t in (states, C, x))
    of_D = D.shape, D.dtype
    grad, states, C, x, D = matrix(grad), matrix(states), matrix(C), matrix(x), D.contiguous()
    rows, c = x.shape
    block = next_power_of_2(c)
    height = max(1, min(_NUMBERS // block, next_power_of_2(rows)))
    tiles = cdiv(rows, height)
    parts = min(tiles, _PROGRAMS)
    with device_of(x):
        key = ("backward", x.shape, *_kinds(grad, states, C, x, D))
        run = _launches.get(key)
        if run is None:
            made = Launch(
                state_output_backward_kernel, (parts,),
                (grad.stride(0), states.stride(0), C.stride(0), x.stride(0), tiles, rows, c), 4,
                ROWS=height, BLOCK=block,
            )  # fmt: skip
            run = remember(_launches, key, made)
        sums = empty((parts, c), torch.float32, x.device)
        run(grad, states, C, x, D, *results, sums)
        shape, dtype = of_D
        return *results, column_sums(sums).view(shape).to(dtype)


def _kinds(*tensors: Tensor) -> list[tuple[torch.dtype, int]]:
    return [(t.dtype, t.stride(0)) for t in tensors]
