"""What stands between the mixer's products and its scan: a norm of each group with the gate, the channel weights, and
the norm of the modulated output; and their gradients.

Groups of channels lie one behind the other, (k, tokens, w), as batched products read and write them. Rows are
normalised again in backward, which has them at hand, instead of reading their statistics.
"""

# mypy: ignore-errors

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.column_sums import column_sums
from backbones.ops.fused.gate.triton import silu
from backbones.ops.remember import remember
from backbones.ops.triton_host import Launch, cdiv, empty, multiprocessors, next_power_of_2

_PROGRAMS = 8  # to a multiprocessor, of those that walk over rows and leave a partial sum each
_CHANNELS = 16  # of which a program sums the weights' gradients over images


@triton.jit
def _normalised(value, mask, c, eps):
    """Rows at mean 0 and variance 1, and the reciprocal of their deviation."""
    centred = tl.where(mask, value - (tl.sum(value, 1) / c)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)
    return centred * scale[:, None], scale


@triton.jit
def _norm_gradient(g, normed, scale, c):
    """The gradient of rows from that of their normalised values."""
    return scale[:, None] * (g - (tl.sum(g, 1) / c)[:, None] - normed * (tl.sum(g * normed, 1) / c)[:, None])


@triton.jit
def gated_norm_kernel(x, z, weight, bias, y, z_k, z_row, rows, c, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (k, rows, c) = norm(x) SiLU(z), with weight and bias (k, c); program (tile of rows, group)."""
    k = tl.program_id(1)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (cs < c)
    at = (k.to(tl.int64) * rows + r) * c + cs
    normed, _ = _normalised(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), mask, c, eps)
    w = tl.load(weight + k * c + cs, mask=cs < c, other=0.0)
    value = normed * w + tl.load(bias + k * c + cs, mask=cs < c, other=0.0)
    gate, _ = silu(tl.load(z + k.to(tl.int64) * z_k + r * z_row + cs, mask=mask, other=0.0).to(tl.float32))
    tl.store(y + at, (value * gate).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward_kernel(
    grad, x, z, weight, bias, dx, dz, sums, z_k, z_row, rows, c, eps, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dx and dz, the latter as z lies, and sums (programs, 2, k, c), the parts of the gradients of weight and bias.

    Program (part, group) walks every so-manieth tile of rows.
    """
    k = tl.program_id(1)
    cs = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + k * c + cs, mask=cs < c, other=0.0)
    shift = tl.load(bias + k * c + cs, mask=cs < c, other=0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        r = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (r < rows) & (cs < c)
        at = (k.to(tl.int64) * rows + r) * c + cs
        z_at = k.to(tl.int64) * z_k + r * z_row + cs
        normed, scale = _normalised(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), mask, c, eps)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        gate, slope = silu(tl.load(z + z_at, mask=mask, other=0.0).to(tl.float32))
        tl.store(dz + z_at, (g * (normed * w + shift) * slope).to(dz.dtype.element_ty), mask=mask)
        g *= gate
        dw += g * normed
        db += g
        tl.store(dx + at, _norm_gradient(g * w, normed, scale, c).to(dx.dtype.element_ty), mask=mask)
    groups = tl.num_programs(1)
    channel = tl.arange(0, BLOCK)
    sums += (tl.program_id(0) * 2 * groups + k) * c + channel
    tl.store(sums, tl.sum(dw, 0), mask=channel < c)
    tl.store(sums + groups * c, tl.sum(db, 0), mask=channel < c)


@triton.jit
def modulated_norm_kernel(
    y, x, scale, skip, weight, bias, out, length, c, w, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out (b, length, c) = norm(y skip x scale), with y (c / w, b, length, w), x as out, scale (b, c), skip (1).

    Program (tile of rows, image).
    """
    image = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.arange(0, BLOCK)[None, :]
    mask = (r < length) & (cs < c)
    token = image * length + r
    at = token * c + cs
    y_at = (cs // w * tl.num_programs(1).to(tl.int64) * length + token) * w + cs % w
    factor = tl.load(scale + image * c + cs, mask=cs < c, other=0.0) * tl.load(skip)
    value = tl.load(y + y_at, mask=mask, other=0.0).to(tl.float32) * factor
    value *= tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    normed, _ = _normalised(value, mask, c, eps)
    normed *= tl.load(weight + cs, mask=cs < c, other=0.0)
    normed += tl.load(bias + cs, mask=cs < c, other=0.0)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def modulated_norm_backward_kernel(
    grad, y, x, scale, skip, weight, dy, dx, sums, length, c, w, eps, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dy, dx, and sums (b, programs, 3, c): parts of the gradients of weight, bias, and skip scale (b, c).

    Program (part, image) walks every so-manieth tile of rows.
    """
    image = tl.program_id(1).to(tl.int64)
    cs = tl.arange(0, BLOCK)[None, :]
    factor = tl.load(scale + image * c + cs, mask=cs < c, other=0.0) * tl.load(skip)
    by = tl.load(weight + cs, mask=cs < c, other=0.0)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    dfactor = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        r = tile * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (r < length) & (cs < c)
        token = image * length + r
        at = token * c + cs
        y_at = (cs // w * tl.num_programs(1).to(tl.int64) * length + token) * w + cs % w
        y_value = tl.load(y + y_at, mask=mask, other=0.0).to(tl.float32)
        x_value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        normed, deviation = _normalised(y_value * factor * x_value, mask, c, eps)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        dw += g * normed
        db += g
        dvalue = _norm_gradient(g * by, normed, deviation, c)
        dfactor += tl.where(mask, dvalue * y_value * x_value, 0.0)
        tl.store(dy + y_at, (dvalue * x_value * factor).to(dy.dtype.element_ty), mask=mask)
        tl.store(dx + at, (dvalue * y_value * factor).to(dx.dtype.element_ty), mask=mask)
    channel = tl.arange(0, BLOCK)
    sums += (image * tl.num_programs(0) + tl.program_id(0)) * 3 * c + channel
    tl.store(sums, tl.sum(dw, 0), mask=channel < c)
    tl.store(sums + c, tl.sum(db, 0), mask=channel < c)
    tl.store(sums + 2 * c, tl.sum(dfactor, 0), mask=channel < c)


@triton.jit
def channel_weights_kernel(mean, w1, b1, w2, b2, hidden, scale, c, h, BLOCK: tl.constexpr, HIDDEN: tl.constexpr):
    """hidden (b, h) = relu(w1 mean + b1), scale (b, c) = sigmoid(w2 hidden + b2); a program for each image."""
    image = tl.program_id(0)
    cs = tl.arange(0, BLOCK)
    hs = tl.arange(0, HIDDEN)
    inside = (hs[:, None] < h) & (cs[None, :] < c)
    m = tl.load(mean + image * c + cs, mask=cs < c, other=0.0).to(tl.float32)
    first = tl.load(w1 + hs[:, None] * c + cs[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.sum(first * m[None, :], 1) + tl.load(b1 + hs, mask=hs < h, other=0.0).to(tl.float32)
    value = tl.maximum(value, 0.0)
    second = tl.load(w2 + cs[None, :] * h + hs[:, None], mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(second * value[:, None], 0) + tl.load(b2 + cs, mask=cs < c, other=0.0).to(tl.float32)
    tl.store(hidden + image * h + hs, value, mask=hs < h)
    tl.store(scale + image * c + cs, tl.sigmoid(logit), mask=cs < c)


@triton.jit
def channel_weights_backward_kernel(
    sums, scale, hidden, skip, w1, w2, dlogit, dhidden, dmean, dskip, parts, c, h, length,
    BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Gradients in front of the sigmoid (b, c) and the ReLU (b, h), of each token through their mean (b, c), and what
    each image adds to that of skip (b), from the sums of `modulated_norm_backward_kernel`; a program for each image.
    """
    image = tl.program_id(0)
    cs = tl.arange(0, BLOCK)
    hs = tl.arange(0, HIDDEN)
    inside = (hs[:, None] < h) & (cs[None, :] < c)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(sums + ((image.to(tl.int64) * parts + part) * 3 + 2) * c + cs, mask=cs < c, other=0.0)
    s = tl.load(scale + image * c + cs, mask=cs < c, other=0.0)
    tl.store(dskip + image, tl.sum(total * s, 0))
    g = total * tl.load(skip) * s * (1 - s)
    tl.store(dlogit + image * c + cs, g, mask=cs < c)
    second = tl.load(w2 + cs[None, :] * h + hs[:, None], mask=inside, other=0.0).to(tl.float32)
    active = tl.load(hidden + image * h + hs, mask=hs < h, other=0.0) > 0
    g = tl.where(active, tl.sum(second * g[None, :], 1), 0.0)
    tl.store(dhidden + image * h + hs, g, mask=hs < h)
    first = tl.load(w1 + hs[:, None] * c + cs[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dmean + image * c + cs, tl.sum(first * g[:, None], 0) / length, mask=cs < c)


@triton.jit
def channel_sums_kernel(
    dlogit, hidden, dhidden, mean, parts, dw1, db1, dw2, db2, dskip, batches, c, h,
    BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """The sums over images of the weights' gradients, dw1 (h, c) and dw2 (c, h), of the biases' and of ``parts``."""
    cs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hs = tl.arange(0, HIDDEN)
    inside = (hs[:, None] < h) & (cs[None, :] < c)
    of_first = tl.zeros((HIDDEN, BLOCK), tl.float32)
    of_second = tl.zeros((HIDDEN, BLOCK), tl.float32)
    of_logit = tl.zeros((BLOCK,), tl.float32)
    of_hidden = tl.zeros((HIDDEN,), tl.float32)
    of_skip = tl.zeros((1,), tl.float32)
    for image in range(batches):
        g = tl.load(dlogit + image * c + cs, mask=cs < c, other=0.0)
        g_hidden = tl.load(dhidden + image * h + hs, mask=hs < h, other=0.0)
        m = tl.load(mean + image * c + cs, mask=cs < c, other=0.0)
        of_second += tl.load(hidden + image * h + hs, mask=hs < h, other=0.0)[:, None] * g[None, :]
        of_first += g_hidden[:, None] * m[None, :]
        of_logit += g
        of_hidden += g_hidden
        of_skip += tl.load(parts + image + tl.arange(0, 1))
    tl.store(dw1 + hs[:, None] * c + cs[None, :], of_first.to(dw1.dtype.element_ty), mask=inside)
    tl.store(dw2 + cs[None, :] * h + hs[:, None], of_second.to(dw2.dtype.element_ty), mask=inside)
    tl.store(db2 + cs, of_logit.to(db2.dtype.element_ty), mask=cs < c)
    if tl.program_id(0) == 0:
        tl.store(db1 + hs, of_hidden.to(db1.dtype.element_ty), mask=hs < h)
        tl.store(dskip + tl.arange(0, 1), of_skip)


_launches: dict[tuple, tuple[Launch, tuple[int, ...]]] = {}


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(x) SiLU(z) over the last axis of x (k, rows, c), contiguous; z has rows at one distance."""
    y = torch.empty_like(x)
    key = ("gate", x.shape, x.dtype, z.stride(), eps)
    found = _launches.get(key)
    if found is None:
        k, rows, c = x.shape
        tile, block = _tile(c, 2048)
        made = Launch(
            gated_norm_kernel, (cdiv(rows, tile), k), (*z.stride()[:2], rows, c, eps), 4, ROWS=tile, BLOCK=block
        )
        found = remember(_launches, key, (made, ()))
    found[0](x, z, weight, bias, y)
    return y


def gated_norm_backward(
    grad: Tensor, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, dz: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias (k c); that of z goes to ``dz``, which lies as z does."""
    dx = torch.empty_like(x)
    key = ("gate backward", x.shape, x.dtype, z.stride(), eps, x.device)
    found = _launches.get(key)
    if found is None:
        k, rows, c = x.shape
        tile, block = _tile(c, 2048)
        tiles = cdiv(rows, tile)
        programs = min(tiles, cdiv(_PROGRAMS * max(1, multiprocessors(x.device)), k))
        made = Launch(
            gated_norm_backward_kernel, (programs, k), (*z.stride()[:2], rows, c, eps, tiles), 4, ROWS=tile, BLOCK=block
        )
        found = remember(_launches, key, (made, (programs, 2 * k * c)))
    run, shape = found
    sums = empty(shape, torch.float32, x.device)
    run(grad, x, z, weight, bias, dx, dz, sums)
    dweight, dbias = column_sums(sums).view(2, -1).unbind(0)
    return dx, dweight, dbias


def modulated_norm(
    y: Tensor, x: Tensor, scale: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """norm(y skip x scale) of x (b, l, c), y (k, b l, c / k), scale (b, c) and skip (1)."""
    out = torch.empty_like(x)
    key = ("modulated", x.shape, y.shape, x.dtype, eps)
    found = _launches.get(key)
    if found is None:
        b, length, c = x.shape
        tile, block = _tile(c, 4096)
        made = Launch(
            modulated_norm_kernel, (cdiv(length, tile), b), (length, c, y.shape[2], eps), 4, ROWS=tile, BLOCK=block
        )
        found = remember(_launches, key, (made, ()))
    found[0](y, x, scale, skip, weight, bias, out)
    return out


def modulated_norm_backward(
    grad: Tensor, y: Tensor, x: Tensor, scale: Tensor, skip: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, x, weight and bias, and parts (b p, 3 c) of sums, the last c of each for skip scale."""
    dy, dx = torch.empty_like(y), torch.empty_like(x)
    key = ("modulated backward", x.shape, y.shape, x.dtype, grad.dtype, eps, x.device)
    found = _launches.get(key)
    if found is None:
        b, length, c = x.shape
        tile, block = _tile(c, 2048)
        tiles = cdiv(length, tile)
        programs = min(tiles, cdiv(_PROGRAMS * max(1, multiprocessors(x.device)), b))
        made = Launch(
            modulated_norm_backward_kernel, (programs, b), (length, c, y.shape[2], eps, tiles), 4, ROWS=tile,
            BLOCK=block,
        )  # fmt: skip
        found = remember(_launches, key, (made, (b * programs, 3 * c)))
    run, shape = found
    sums = empty(shape, torch.float32, x.device)
    run(grad, y, x, scale, skip, weight, dy, dx, sums)
    dweight, dbias, _ = column_sums(sums).view(3, -1).unbind(0)
    return dy, dx, dweight, dbias, sums


def channel_weights(mean: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """relu(w1 mean + b1) (b, h), and sigmoid(w2 of it + b2) (b, c), in float32, of mean (b, c)."""
    (b, c), h = mean.shape, w1.shape[0]
    hidden, scale = empty((b, h), torch.float32, mean.device), empty((b, c), torch.float32, mean.device)
    key = ("weights", b, c, h, w1.dtype)
    found = _launches.get(key)
    if found is None:
        blocks = {"BLOCK": next_power_of_2(c), "HIDDEN": next_power_of_2(h)}
        found = remember(_launches, key, (Launch(channel_weights_kernel, (b,), (c, h), 8, **blocks), ()))
    found[0](mean, w1, b1, w2, b2, hidden, scale)
    return hidden, scale


def channel_weights_backward(
    sums: Tensor, length: int, mean: Tensor, hidden: Tensor, scale: Tensor, skip: Tensor, w1: Tensor, b1: Tensor,
    w2: Tensor, b2: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of each of ``length`` tokens through the mean (b, c), of w1, b1, w2, b2 and skip, from the parts that
    `modulated_norm_backward` leaves.
    """
    (b, c), h = mean.shape, w1.shape[0]
    parts = sums.shape[0] // b
    key = ("weights backward", b, c, h, w1.dtype, length, parts)
    found = _launches.get(key)
    if found is None:
        hidden_block = next_power_of_2(h)
        made = Launch(
            channel_weights_backward_kernel, (b,), (parts, c, h, length), 8, BLOCK=next_power_of_2(c),
            HIDDEN=hidden_block,
        )  # fmt: skip
        summing = Launch(channel_sums_kernel, (cdiv(c, _CHANNELS),), (b, c, h), 4, BLOCK=_CHANNELS, HIDDEN=hidden_block)
        found = remember(_launches, key, (made, summing))
    run, run_sums = found
    dlogit, dhidden, dmean = torch.empty_like(scale), torch.empty_like(hidden), torch.empty_like(scale)
    of_images = empty((b,), torch.float32, mean.device)
    run(sums, scale, hidden, skip, w1, w2, dlogit, dhidden, dmean, of_images)
    results = [torch.empty_like(x) for x in (w1, b1, w2, b2, skip)]
    run_sums(dlogit, hidden, dhidden, mean, of_images, *results)
    return dmean, *results


@functools.cache
def _tile(c: int, numbers: int) -> tuple[int, int]:
    """(rows, padded channels) of a program that holds about so many numbers at once."""
    block = next_power_of_2(c)
    return max(1, numbers // block), block
