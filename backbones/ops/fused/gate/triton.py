"""The gate in Triton: one pass through memory in each direction, over rows of any distance."""

# mypy: ignore-errors

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.remember import remember
from backbones.ops.rows import matrix
from backbones.ops.scan.triton.common import LOG2_E, sum_orders_kernel
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty, launch, next_power_of_2


@triton.jit
def silu(z):
    """SiLU(z), and its derivative."""
    sigmoid = 1 / (1 + tl.exp2(-z * LOG2_E))
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def gate_kernel(x, z, y, x_row, z_row, rows, c, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (rows, c) = x SiLU(z) scale; one program for ROWS rows and BLOCK columns."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (cs < c)
    gate, _ = silu(tl.load(z + r * z_row + cs, mask=mask, other=0.0).to(tl.float32))
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
    gate, slope = silu(tl.load(z + r * z_row + cs, mask=mask, other=0.0).to(tl.float32))
    tl.store(dx + r * c + cs, (g * gate).to(dx.dtype.element_ty), mask=mask)
    value = g * tl.load(x + r * x_row + cs, mask=mask, other=0.0).to(tl.float32) * slope
    tl.store(dz + r * c + cs, value.to(dz.dtype.element_ty), mask=mask)


@triton.jit
def excited_kernel(
    x, logits, z, y, x_row, z_row, s_row, rows, tiles, c, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_Z: tl.constexpr
):  # fmt: skip
    """y (b, rows, c) = x sigmoid(logits) SiLU(z); one program for ROWS rows of one of b and BLOCK columns."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    r = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (r < rows) & (cs < c)[None, :]
    s = tl.load(logits + batch * s_row + cs, mask=cs < c, other=0.0).to(tl.float32)
    at = batch * rows + r
    value = tl.load(x + at * x_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
    value *= 1 / (1 + tl.exp2(-s * LOG2_E))[None, :]
    if HAS_Z:
        gate, _ = silu(tl.load(z + at * z_row + cs[None, :], mask=mask, other=0.0).to(tl.float32))
        value *= gate
    tl.store(y + at * c + cs[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def excited_backward_kernel(
    grad, x, logits, z, dx, dz, sums, g_row, x_row, z_row, s_row, rows, tiles, parts, c,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """dx and dz of `excited_kernel`, and ``sums`` (b, parts, c), the gradient of the logits from parts of the rows.

    One program for a part, every so-manieth of the tiles of ROWS rows of one of b, and BLOCK columns.
    """
    batch = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(logits + batch * s_row + cs, mask=cs < c, other=0.0).to(tl.float32)
    excitation = (1 / (1 + tl.exp2(-s * LOG2_E)))[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(part, tiles, parts):
        r = tile * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (r < rows) & (cs < c)[None, :]
        at = batch * rows + r
        g = tl.load(grad + at * g_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + at * x_row + cs[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_Z:
            gate, slope = silu(tl.load(z + at * z_row + cs[None, :], mask=mask, other=0.0).to(tl.float32))
            dz_t = g * value * excitation * slope
            tl.store(dz + at * c + cs[None, :], dz_t.to(dz.dtype.element_ty), mask=mask)
            g *= gate
        tl.store(dx + at * c + cs[None, :], (g * excitation).to(dx.dtype.element_ty), mask=mask)
        total += g * value
    summed = tl.sum(total * excitation * (1 - excitation), axis=0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * c + cs, summed, mask=cs < c)


_launches: dict[tuple, Launch] = {}
_PROGRAMS = 2048  # into which the sums over rows are cut


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


def excited(x: Tensor, logits: Tensor, z: Tensor | None) -> Tensor:
    """x sigmoid(logits) SiLU(z), contiguous, for x and z (b, l, c) and logits (b, c); no gate where z is None."""
    check_device("x", x)
    y = empty(x.shape, x.dtype, x.device)
    b, length, c = x.shape
    x, z = matrix(x), None if z is None else matrix(z)
    with device_of(x):
        key = ("excited", b, x.shape, x.dtype, logits.dtype, x.stride(0), _row(z), logits.stride(0))
        run = _launches.get(key)
        if run is None:
            rows, block = _tile(c)
            tiles = cdiv(length, rows)
            made = Launch(
                excited_kernel, (b * tiles, cdiv(c, block)),
                (x.stride(0), _row(z), logits.stride(0), length, tiles, c), 4,
                ROWS=rows, BLOCK=block, HAS_Z=z is not None,
            )  # fmt: skip
            run = remember(_launches, key, made)
        run(x, logits, z, y)
    return y


def excited_backward(
    grad: Tensor, x: Tensor, logits: Tensor, z: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, logits and z, contiguous."""
    dx, dz = empty(x.shape, x.dtype, x.device), None if z is None else empty(z.shape, z.dtype, z.device)
    b, length, c = x.shape
    grad, x, z = matrix(grad), matrix(x), None if z is None else matrix(z)
    rows, block = _tile(c)
    tiles = cdiv(length, rows)
    parts = min(tiles, cdiv(_PROGRAMS, b * cdiv(c, block)))
    with device_of(x):
        key = (
            "excited backward", b, x.shape, x.dtype, logits.dtype, grad.stride(0), x.stride(0), _row(z),
            logits.stride(0),
        )  # fmt: skip
        run = _launches.get(key)
        if run is None:
            made = Launch(
                excited_backward_kernel, (b * parts, cdiv(c, block)),
                (grad.stride(0), x.stride(0), _row(z), logits.stride(0), length, tiles, parts, c), 4,
                ROWS=rows, BLOCK=block, HAS_Z=z is not None,
            )  # fmt: skip
            run = remember(_launches, key, made)
        sums = empty((b, parts, c), torch.float32, x.device)
        run(grad, x, logits, z, dx, dz, sums)
        dlogits = empty((b, c), logits.dtype, x.device)
        launch(sum_orders_kernel, (cdiv(b, 16), cdiv(c, block)), (sums, dlogits), (b, parts, c), 4, ROWS=16,
               BLOCK_C=block)  # fmt: skip
    return dx, dlogits, dz


def _row(z: Tensor | None) -> int:
    return 0 if z is None else z.stride(0)


@functools.cache
def _tile(c: int) -> tuple[int, int]:
    """(rows, channels) of a program: 2048 numbers, channels in blocks that leave few lanes idle."""
    block = 128 if c % 128 == 0 else 64 if c % 64 == 0 else min(128, next_power_of_2(c))
    return 2048 // block, block
