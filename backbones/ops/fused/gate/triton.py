"""The gate in Triton: one pass through memory in each direction, over rows of any distance."""

# mypy: ignore-errors

import functools

import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.rows import matrix
from backbones.ops.scan.triton.common import LOG2_E
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty, next_power_of_2, remember


@triton.jit
def _silu(z):
    """SiLU(z), and its derivative."""
    sigmoid = 1 / (1 + tl.exp2(-z * LOG2_E))
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def gate_kernel(x, z, y, x_row, z_row, rows, c, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (rows, c) = x SiLU(z) scale; one program for ROWS rows and BLOCK columns."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (cs < c)
    gate, _ = _silu(tl.load(z + r * z_row + cs, mask=mask, other=0.0).to(tl.float32))
    value = tl.load(x + r * x_row + cs, mask=mask, other=0.0).to(tl.float32) * gate * scale
    tl.store(y + r * c + cs, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    grad, x, z, dx, dz, g_row, x_row, z_row, rows, c, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = grad SiLU(z) scale and dz = grad x SiLU'(z) scale, both (rows, c)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (cs < c)
    g = tl.load(grad + r * g_row + cs, mask=mask, other=0.0).to(tl.float32) * scale
    gate, slope = _silu(tl.load(z + r * z_row + cs, mask=mask, other=0.0).to(tl.float32))
    tl.store(dx + r * c + cs, (g * gate).to(dx.dtype.element_ty), mask=mask)
    value = g * tl.load(x + r * x_row + cs, mask=mask, other=0.0).to(tl.float32) * slope
    tl.store(dz + r * c + cs, value.to(dz.dtype.element_ty), mask=mask)


_launches: dict[tuple, Launch] = {}


def forward(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """x SiLU(z) scale, contiguous, for x and z (..., c) of one shape."""
    check_device("x", x)
    y = empty(x.shape, x.dtype, x.device)
    x, z = matrix(x), matrix(z)
    with device_of(x):
        key = (x.shape, x.dtype, x.stride(0), z.stride(0), scale)
        run = _launches.get(key)
        if run is None:
            rows, c = x.shape
            tile, block = _tile(c)
            made = Launch(
                gate_kernel, (cdiv(rows, tile), cdiv(c, block)), (x.stride(0), z.stride(0), rows, c, scale), 4,
                ROWS=tile, BLOCK=block,
            )  # fmt: skip
            run = remember(_launches, key, made)
        run(x, z, y)
    return y


def backward(grad: Tensor, x: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and z, contiguous."""
    dx, dz = (empty(t.shape, t.dtype, t.device) for t in (x, z))
    grad, x, z = matrix(grad), matrix(x), matrix(z)
    with device_of(x):
        key = ("backward", x.shape, x.dtype, grad.stride(0), x.stride(0), z.stride(0), scale)
        run = _launches.get(key)
        if run is None:
            rows, c = x.shape
            tile, block = _tile(c)
            made = Launch(
                gate_backward_kernel, (cdiv(rows, tile), cdiv(c, block)),
                (grad.stride(0), x.stride(0), z.stride(0), rows, c, scale), 4, ROWS=tile, BLOCK=block,
            )  # fmt: skip
            run = remember(_launches, key, made)
        run(grad, x, z, dx, dz)
    return dx, dz


@functools.cache
def _tile(c: int) -> tuple[int, int]:
    """(rows, channels) of a program: 2048 numbers, channels in blocks that leave few lanes idle."""
    block = 128 if c % 128 == 0 else 64 if c % 64 == 0 else min(128, next_power_of_2(c))
    return 2048 // block, block
