"""The projection of step sizes in Triton: products with a short side, the rank r of 3 to some hundred.

cuBLAS takes slow kernels for them, since rows of r numbers are rarely aligned, and does not split the long sum of the
weight's gradient. Here each pass touches the wide side, k c numbers a token, once, and that bounds its time.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton.host import INTERPRETED, cdiv, contiguous_rows, device_of, empty, next_power_of_2

_PROGRAMS = 1024  # into which the sum over tokens is cut


@triton.jit
def _product(a, b, total, UPCAST: tl.constexpr):
    """total + a b, b rounded to the dtype of a. UPCAST: Triton's interpreter multiplies bfloat16 as integers."""
    b = b.to(a.dtype)
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def project_kernel(
    x, weight, y, x_b, x_l, x_k, rows, length, k, c, r,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[k, row, c] = sum_r x[row, k, r] weight[k, c, r]; program (tile of rows, order, channel block)."""
    blocks = tl.cdiv(c, BLOCK_C)
    order = tl.program_id(0) // blocks % k
    ms = tl.program_id(0) // blocks // k * BLOCK_M + tl.arange(0, BLOCK_M)
    cs = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    rs = tl.arange(0, R)
    at = (ms // length).to(tl.int64) * x_b + (ms % length).to(tl.int64) * x_l + order * x_k
    low = tl.load(x + at[:, None] + rs[None, :], mask=(ms < rows)[:, None] & (rs < r)[None, :], other=0.0)
    w_at = weight + (order * c + cs)[None, :] * r + rs[:, None]
    w = tl.load(w_at, mask=(cs < c)[None, :] & (rs < r)[:, None], other=0.0)
    wide = _product(low, w, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), UPCAST)
    y += (order.to(tl.int64) * rows + ms)[:, None] * c + cs[None, :]
    tl.store(y, wide.to(y.dtype.element_ty), mask=(ms < rows)[:, None] & (cs < c)[None, :])


@triton.jit
def project_back_kernel(
    grad, weight, dx, g_b, g_l, g_k, rows, length, k, c, r,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx[row, k, r] = sum_c grad[row, k, c] weight[k, c, r]; program (tile of rows, order)."""
    order = tl.program_id(0) % k
    ms = tl.program_id(0) // k * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.arange(0, R)
    at = (ms // length).to(tl.int64) * g_b + (ms % length).to(tl.int64) * g_l + order.to(tl.int64) * g_k
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, c, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        g = tl.load(grad + at[:, None] + cs[None, :], mask=(ms < rows)[:, None] & (cs < c)[None, :], other=0.0)
        w_at = weight + (order * c + cs)[:, None] * r + rs[None, :]
        w = tl.load(w_at, mask=(cs < c)[:, None] & (rs < r)[None, :], other=0.0)
        total = _product(g, w, total, UPCAST)
    dx += (ms.to(tl.int64) * k + order)[:, None] * r + rs[None, :]
    tl.store(dx, total.to(dx.dtype.element_ty), mask=(ms < rows)[:, None] & (rs < r)[None, :])


@triton.jit
def weight_gradient_kernel(
    grad, x, sums, g_b, g_l, g_k, x_b, x_l, x_k, rows, length, tiles, k, c, r,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums[part, k, c, r] = sum of grad[row, k, c] x[row, k, r] over every so-manieth of ``tiles`` of rows."""
    blocks = tl.cdiv(c, BLOCK_C)
    order = tl.program_id(0) // blocks % k
    part = tl.program_id(0) // blocks // k
    cs = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    rs = tl.arange(0, R)
    grad += order.to(tl.int64) * g_k
    x += order * x_k
    total = tl.zeros((BLOCK_C, R), tl.float32)
    for tile in range(part, tiles, tl.num_programs(0) // (blocks * k)):
        ms = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        batch, token = (ms // length).to(tl.int64), (ms % length).to(tl.int64)
        g_at = grad + (batch * g_b + token * g_l)[:, None] + cs[None, :]
        g = tl.load(g_at, mask=(ms < rows)[:, None] & (cs < c)[None, :], other=0.0)
        low_at = x + (batch * x_b + token * x_l)[:, None] + rs[None, :]
        low = tl.load(low_at, mask=(ms < rows)[:, None] & (rs < r)[None, :], other=0.0)
        total = _product(tl.trans(g), low, total, UPCAST)
    sums += ((part * k + order).to(tl.int64) * c + cs)[:, None] * r + rs[None, :]
    tl.store(sums, total, mask=(cs < c)[:, None] & (rs < r)[None, :])


def per_order_linear(delta: Tensor, dt_weight: Tensor) -> Tensor:
    """delta (b, l, k, r) times dt_weight (k, c, r): (b, l, k, c) in the dtype of delta, stored as (k, b, l, c)."""
    delta = contiguous_rows(delta)
    b, length, k, r = delta.shape
    c, rows = dt_weight.shape[1], b * length
    R, block_m, block_c = tile(r, c, delta.dtype)
    y = empty((k, b, length, c), delta.dtype, delta.device)
    with device_of(delta):
        project_kernel[(cdiv(rows, block_m) * k * cdiv(c, block_c),)](
            delta, dt_weight, y, *delta.stride()[:3], rows, length, k, c, r,
            R=R, BLOCK_M=block_m, BLOCK_C=block_c, UPCAST=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return y.permute(1, 2, 0, 3)


def projection_gradients(grad: Tensor, delta: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of delta (b, l, k, r), in its dtype, and of dt_weight (k, c, r), in float32, from their product's.

    Sums over tokens are cut by shapes alone and added in a fixed order.
    """
    grad, delta = contiguous_rows(grad), contiguous_rows(delta)
    b, length, k, r = delta.shape
    c, rows = dt_weight.shape[1], b * length
    R, block_m, block_c = tile(r, c, grad.dtype)
    blocks, tiles = cdiv(c, block_c), cdiv(rows, block_m)
    parts = min(tiles, cdiv(_PROGRAMS, k * blocks))
    ddelta = empty((b, length, k, r), delta.dtype, delta.device)
    sums = empty((parts, k, c, r), torch.float32, delta.device)
    shape = dict(R=R, BLOCK_M=block_m, BLOCK_C=block_c, UPCAST=INTERPRETED, num_warps=4)
    with device_of(delta):
        project_back_kernel[(tiles * k,)](
            grad, dt_weight, ddelta, *grad.stride()[:3], rows, length, k, c, r, **shape
        )  # fmt: skip
        weight_gradient_kernel[(parts * k * blocks,)](
            grad, delta, sums, *grad.stride()[:3], *delta.stride()[:3], rows, length, tiles, k, c, r, **shape
        )  # fmt: skip
    return ddelta, sums.sum(0)


def tile(r: int, c: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(R, BLOCK_M, BLOCK_C): the rank padded to what products take, and tiles that leave few lanes idle.

    float32 does not go through the matrix units, and takes smaller tiles.
    """
    R = max(16, next_power_of_2(r))
    rows = 64 if R <= 64 else 32
    return (R, rows // 2, 32) if dtype == torch.float32 else (R, rows, 32 if c % 64 else 64)
