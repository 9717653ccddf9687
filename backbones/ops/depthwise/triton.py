"""The depthwise convolution along a table of taps in Triton; defined in ``operator.py`` beside it.

Three passes over tokens of c channels, none of which copies, pads or permutes one:

forward     reads x once from memory (its taps hit the caches), writes y for each order
backward    the same gather leaves g, the gradient before act, in float32; a second one, along the inverse taps,
            adds g to the gradient of x; the third kernel sums g x over tokens

A program owns what it writes and adds in a fixed order: results do not depend on timing. The sums over tokens are cut
into parts by the shapes alone.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton adds tuples but does not unpack them into new ones)

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.column_sums import column_sums
from backbones.ops.remember import remember
from backbones.ops.rows import contiguous_rows
from backbones.ops.scan.triton.common import LOG2_E
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty, next_power_of_2

GATHERED = 2048  # numbers a program holds, by 4 warps
SUMMED = 1024  # the same for each of the taps whose gradients a program sums
TAPS = 9  # taps that it sums at once, and loads that it may have in flight
SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL_PEAK = tl.constexpr(0.3989422804014327)  # of the density whose integral is GELU's gate
_PROGRAMS = 2048  # into which the sums over tokens are cut


@triton.jit
def gather_kernel(
    x, weight, bias, table, grad, y,
    x_k, x_b, x_l, g_k, g_b, g_l, y_k, y_b, y_l, table_k,
    orders, summed, rows, c,
    J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
    WEIGHTED: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr, GELU: tl.constexpr,
    SLOPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[k, b, i, c] = act(bias[k, c] + sum_j weight[k, c, j] x[k, b, table[k, j, i], c]), where -1 reads 0.

    Program (batch, tile of rows, order, channel block). With ``summed`` > 1 there is one order of y: the sum of so many
    of x. The orders' tables lie ``table_k`` apart. Without WEIGHTED all weights are 1. With RESIDUAL x[k, b, i, c] is
    added before act. SLOPE writes the gradient before act, grad act'(pre), instead of act(pre).
    """
    blocks = tl.cdiv(c, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_M)
    item = tl.program_id(0)
    cs = item % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    order = item // blocks % orders
    ms = item // blocks // orders % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (item // blocks // orders // tiles).to(tl.int64)
    c_mask = cs < c
    m_mask = ms < rows
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for source in range(order, order + summed):
        x_at = x + tl.cast(source, tl.int64) * x_k + batch * x_b
        for j in tl.range(0, J, loop_unroll_factor=UNROLL):
            token = tl.load(table + source * table_k + j * rows + ms, mask=m_mask, other=-1)
            if WIDE:
                at = token.to(tl.int64)[:, None] * x_l + cs[None, :]
            else:
                at = token[:, None] * x_l + cs[None, :]
            value = tl.load(x_at + at, mask=(token >= 0)[:, None] & c_mask[None, :], other=0.0)
            if WEIGHTED:
                w = tl.load(weight + (source * c + cs) * J + j, mask=c_mask, other=0.0)
                total += w[None, :] * value.to(tl.float32)
            else:
                total += value.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + order * c + cs, mask=c_mask, other=0.0)[None, :]
    mask = m_mask[:, None] & c_mask[None, :]
    if RESIDUAL:
        own_at = x + order.to(tl.int64) * x_k + batch * x_b + ms.to(tl.int64)[:, None] * x_l + cs[None, :]
        total += tl.load(own_at, mask=mask, other=0.0).to(tl.float32)
    if SILU or GELU:
        if SILU:
            gate = 1 / (1 + tl.exp2(-total * LOG2_E))
        else:
            gate = 0.5 + 0.5 * tl.erf(total * SQRT_HALF)
        if SLOPE:
            g_at = grad + order.to(tl.int64) * g_k + batch * g_b + ms.to(tl.int64)[:, None] * g_l + cs[None, :]
            g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
            if SILU:
                slope = gate * (1 + total * (1 - gate))
            else:
                slope = gate + total * NORMAL_PEAK * tl.exp2(total * total * (-0.5 * LOG2_E))
            total = g * slope
        else:
            total *= gate
    y += order.to(tl.int64) * y_k + batch * y_b
    tl.store(y + ms[:, None] * y_l + cs[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    x, g, table, sums,
    x_k, x_b, x_l, g_k, g_b, g_l, table_k,
    orders, tiles, row_tiles, rows, c,
    J: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sums[part, k, c, j] = sum of g[k, b, i, c] x[k, b, table[k, j, i], c] over a part of (b, i); then sums of g.

    Program (part, group of TAPS taps, order, channel block); a part is every so-manieth of ``tiles``.
    """
    blocks = tl.cdiv(c, BLOCK_C)
    groups = tl.cdiv(J, TAPS)
    item = tl.program_id(0)
    cs = item % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    order = item // blocks % orders
    tap = item // blocks // orders % groups * TAPS
    part = item // blocks // orders // groups
    c_mask = cs < c
    x += order.to(tl.int64) * x_k
    g += order.to(tl.int64) * g_k
    table += order * table_k
    zeros = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    of_bias = zeros
    of_taps = ()
    for _ in tl.static_range(TAPS):
        of_taps = of_taps + (zeros,)
    for tile in range(part, tiles, tl.num_programs(0) // (blocks * orders * groups)):
        batch = tl.cast(tile // row_tiles, tl.int64)
        ms = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        m_mask = ms < rows
        g_at = g + batch * g_b + ms.to(tl.int64)[:, None] * g_l + cs[None, :]
        g_rows = tl.load(g_at, mask=m_mask[:, None] & c_mask[None, :], other=0.0).to(tl.float32)
        added = ()
        for i in tl.static_range(TAPS):
            token = tl.load(table + (tap + i) * rows + ms, mask=m_mask & (tap + i < J), other=-1)
            if WIDE:
                at = token.to(tl.int64)[:, None] * x_l + cs[None, :]
            else:
                at = token[:, None] * x_l + cs[None, :]
            value = tl.load(x + batch * x_b + at, mask=(token >= 0)[:, None] & c_mask[None, :], other=0.0)
            added = added + (of_taps[i] + g_rows * value.to(tl.float32),)
        of_taps = added
        of_bias += g_rows
    sums += part.to(tl.int64) * orders * c * (J + 1)
    channels = order * c + cs
    for i in tl.static_range(TAPS):
        tl.store(sums + channels * J + tap + i, tl.sum(of_taps[i], axis=0), mask=c_mask & (tap + i < J))
    if tap == 0:
        tl.store(sums + orders * c * J + channels, tl.sum(of_bias, axis=0), mask=c_mask)


_launches: dict[tuple, tuple[Launch, tuple[int, ...]]] = {}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool, gelu: bool = False,
    residual: bool = False,
) -> Tensor:  # fmt: skip
    """See :mod:`backbones.ops.depthwise.operator`. x is (b, l, c), or (k, b, l, c): an input for each order, all of
    which may share one table.
    """
    check_device("x", x)
    with device_of(x):
        return _gather(contiguous_rows(x), weight, bias, taps, x.dtype, silu, gelu, residual)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool,
    gelu: bool = False, residual: bool = False, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :mod:`backbones.ops.depthwise.operator`, and `forward`. ``dx`` takes the gradient of x; see `_gather`."""
    with device_of(x):
        x, grad = contiguous_rows(x), contiguous_rows(grad)
        g = grad
        if silu or gelu:
            g = _gather(x, weight, bias, taps, torch.float32, silu, gelu, residual, grad)
        shared = x.dim() == 3
        dx = _gather(g, weight, None, inverse_taps, x.dtype, False, False, residual, summed=shared, y=dx)
        dweight, dbias = _weight_gradients(x, g, taps, weight.shape[0])
        return dx[0] if shared else dx, dweight, dbias.new_empty(0) if bias is None else dbias


def replicated(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """See :mod:`backbones.ops.depthwise.replicated`."""
    check_device("x", x)
    with device_of(x):
        return _gather(contiguous_rows(x), weight, None, taps, x.dtype, False, False, False, summed=True)[0]


def replicated_backward(
    grad: Tensor, x: Tensor, weight: Tensor, taps: Tensor, frame_taps: Tensor, folds: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, contiguous."""
    with device_of(x):
        x, grad = contiguous_rows(x), contiguous_rows(grad)
        frame = _gather(grad, weight, None, frame_taps, torch.float32, False, False, False, summed=True)[0]
        dx = _gather(frame, None, None, folds, x.dtype, False, False, False)[0]
        return dx, _weight_gradients(x, grad, taps, weight.shape[0])[0]


def _weight_gradients(x: Tensor, g: Tensor, taps: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(k, c, j) of the weight and (k, c) of the bias from the gradient before act, of each order or one of all."""
    b, _, c = x.shape[-3:]
    tables, j, rows = taps.shape
    key = ("weight", x.shape, x.dtype, x.stride(), g.dtype, g.stride(), k, taps.shape)
    found = _launches.get(key)
    if found is None:
        block_m, block_c = tile(rows, c, SUMMED)
        row_tiles, group = cdiv(rows, block_m), min(j, TAPS)
        programs = k * cdiv(c, block_c) * cdiv(j, group)
        parts = min(b * row_tiles, cdiv(_PROGRAMS, programs))
        made = Launch(
            weight_kernel, (parts * programs,),
            (*_strides(x), *_strides(g), j * rows if tables > 1 else 0, k, b * row_tiles, row_tiles, rows, c),
            4, J=j, TAPS=group, BLOCK_M=block_m, BLOCK_C=block_c, WIDE=_is_wide(x),
        )  # fmt: skip
        found = remember(_launches, key, (made, (parts, k * c * (j + 1))))
    run, shape = found
    sums = empty(shape, torch.float32, x.device)
    run(x, g, taps, sums)
    dweight, dbias = column_sums(sums).split_with_sizes([k * c * j, k * c])
    return dweight.view(k, c, j), dbias.view(k, c)


def _gather(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    dtype: torch.dtype,
    silu: bool,
    gelu: bool,
    residual: bool,
    grad: Tensor | None = None,
    summed: bool = False,
    y: Tensor | None = None,
) -> Tensor:
    """(k, b, rows, c) from x (b, l, c) or (k, b, l, c), or, ``summed`` over the orders, (1, b, rows, c).

    Without a ``weight`` all are 1, of one order. ``y`` takes the result.
    """
    k = 0 if weight is None else weight.shape[0]
    of_grad = None if grad is None else (grad.stride(), grad.dtype)
    of_y = None if y is None else y.stride()
    key = (
        x.shape, x.dtype, x.stride(), bias is None, k, table.shape, dtype, silu, gelu, residual, of_grad, summed, of_y,
    )  # fmt: skip
    found = _launches.get(key)
    if found is None:
        b, _, c = x.shape[-3:]
        k, (tables, j, rows) = max(k, 1), table.shape
        each = 1 if summed else k
        of_y = (b * rows * c, rows * c, c) if of_y is None else of_y[:3]
        block_m, block_c = tile(rows, c, GATHERED)
        made = Launch(
            gather_kernel, (cdiv(c, block_c) * each * cdiv(rows, block_m) * b,),
            (
                *_strides(x), *((0, 0, 0) if grad is None else grad.stride()[:3]), *of_y,
                j * rows if tables > 1 else 0, each, k // each, rows, c,
            ),
            4, J=j, BLOCK_M=block_m, BLOCK_C=block_c, UNROLL=min(j, TAPS),
            WEIGHTED=weight is not None, HAS_BIAS=bias is not None, RESIDUAL=residual, SILU=silu, GELU=gelu,
            SLOPE=grad is not None, WIDE=_is_wide(x),
        )  # fmt: skip
        found = remember(_launches, key, (made, (each, b, rows, c)))
    run, shape = found
    y = empty(shape, dtype, x.device) if y is None else y
    run(x, weight, bias, table, grad, y)
    return y


def tile(rows: int, c: int, numbers: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C): channels in blocks that leave few lanes idle, rows to fill the rest."""
    block_c = 128 if c % 128 == 0 else 64 if c % 64 == 0 else 32
    block_c = min(block_c, next_power_of_2(c))
    return min(numbers // block_c, next_power_of_2(rows)), block_c


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of order, image and token; the first is 0 where all orders read one x."""
    return x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2)


def _is_wide(x: Tensor) -> bool:
    """Whether the offset of some row of an image needs more than 31 bits."""
    return x.shape[-2] * x.stride(-2) >= 2**31
