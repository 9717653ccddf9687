"""The selective scan with its projections on a GPU: products by cuBLAS, and what stands between them in few launches.

An operation of its own for each step, with autograd's bookkeeping, keeps the host busy for longer than the GPU. Here
forward takes a product, the decay rates with a block-diagonal weight (where all orders read the same u), a product, the
scan and the sum of its orders; backward the scan, three products with their weights' gradients, and one launch that
takes partial sums to the gradients of B, C, A_log, D and bias.
"""

# mypy: ignore-errors

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.remember import remember
from backbones.ops.rows import contiguous_rows
from backbones.ops.scan.triton.decay import negative_exp_of
from backbones.ops.scan.triton.launch import _Scan
from backbones.ops.scan.visits import Visits
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty

_CONVERTED = 1024  # numbers that are only copied or converted to a program
_SUMMED = 128  # columns of the partial sums to a program
_ROWS = 32  # and rows at once
_PARTS = 16  # of the tokens, whose weight gradients are batches of their own

_launches: dict[tuple, Launch] = {}


@triton.jit
def parameters_kernel(weight, blocks, A_log, A, count, k, o, r, width, numbers, n, spreading, BLOCK: tl.constexpr):
    """What the products and the scan read of two parameters, BLOCK numbers to a program.

    The first ``spreading`` programs write ``blocks`` (k o, k width), of ``count`` numbers: its i-th block begins with
    the r columns of the i-th of ``weight`` (k, o, r), and all else is 0. The others write A (k, n, o) = -exp(A_log), of
    ``numbers`` from A_log (k, o, n).
    """
    if tl.program_id(0) < spreading:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = at // (k * width)
        column = at % (k * width)
        inside = (column // width == row // o) & (column % width < r) & (at < count)
        value = tl.load(weight + row * r + column % width, mask=inside, other=0.0)
        tl.store(blocks + at, value.to(blocks.dtype.element_ty), mask=at < count)
    else:
        rate_at = (tl.program_id(0) - spreading) * BLOCK + tl.arange(0, BLOCK)
        source = (rate_at // (o * n) * o + rate_at % o) * n + rate_at // o % n
        log = tl.load(A_log + source, mask=rate_at < numbers, other=0.0)
        tl.store(A + rate_at, -tl.exp(log), mask=rate_at < numbers)


@triton.jit
def gradients_kernel(
    partials, parts, A, product, dx, dA_log, dD, dbias, ddt_weight,
    tokens, k, n, c, of_order, of_row, first, blocks, rows, converting, summing,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Unrelated ends of a backward pass in one launch.

    The first ``converting`` programs sum partials (2, blocks, tokens, k, n), gradients of B and C, over blocks, and
    write them to the columns from ``first`` on of the rows of dx. The next ``summing`` ones sum parts
    (rows, k c (n + 2)), gradients of A (k, n, c), D and bias (k, c) one behind the other, over rows. Both in a fixed
    order. With DIAGONAL the others take ddt_weight (k, c, first) out of the blocks of product (k c, of_row).
    """
    if tl.program_id(0) < converting:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < tokens * k * 2 * n
        row = at // (2 * n)
        column = at % (2 * n)
        each = tl.cast(tokens, tl.int64) * k * n
        source = partials + (column // n) * blocks * each + row * n + column % n
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(blocks):
            total += tl.load(source + i * each, mask=mask, other=0.0).to(tl.float32)
        target = dx + row % k * of_order + row // k * of_row + first + column
        tl.store(target, total.to(dx.dtype.element_ty), mask=mask)
    elif tl.program_id(0) < converting + summing:
        column_at = (tl.program_id(0) - converting) * COLUMNS + tl.arange(0, COLUMNS)
        of_A = k * n * c
        width = of_A + 2 * k * c
        summed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, rows, ROWS):
            r = begin + tl.arange(0, ROWS)
            within = (r[:, None] < rows) & (column_at[None, :] < width)
            summed += tl.load(parts + r.to(tl.int64)[:, None] * width + column_at[None, :], mask=within, other=0.0)
        sums = tl.sum(summed, axis=0)
        rate = tl.load(A + column_at, mask=column_at < of_A, other=0.0)  # d exp(A_log) is A itself
        place = (column_at // (n * c) * c + column_at % c) * n + column_at // c % n
        tl.store(dA_log + place, sums * rate, mask=column_at < of_A)
        tl.store(dD + column_at - of_A, sums, mask=(column_at >= of_A) & (column_at < of_A + k * c))
        tl.store(dbias + column_at - of_A - k * c, sums, mask=(column_at >= of_A + k * c) & (column_at < width))
    elif DIAGONAL:
        taken_at = (tl.program_id(0) - converting - summing) * BLOCK + tl.arange(0, BLOCK)
        taken = taken_at < k * c * first
        block_row = (taken_at // first).to(tl.int64)
        place_in = block_row * of_row + block_row // c * of_order + taken_at % first
        tl.store(ddt_weight + taken_at, tl.load(product + place_in, mask=taken, other=0.0), mask=taken)


class Saved(NamedTuple):
    """What forward leaves to backward, besides its arguments.

    ``x``: u times x_weight, (k, b l, i) where every order has a u of its own, else (b l, k i). ``blocks``: the
    block-diagonal weight, or dt_weight itself. ``delta`` (b, l, k, c), ``A`` (k, n, c), ``states``.
    """

    x: Tensor
    blocks: Tensor
    delta: Tensor
    A: Tensor
    states: Tensor


def forward(
    u: Tensor, x_weight: Tensor, dt_weight: Tensor, bias: Tensor, A_log: Tensor, D: Tensor, orders: Tensor | None,
    out: str, window: int, visits: Visits | None, into: Tensor | None, save: bool,
) -> tuple[Tensor, Saved | None]:  # fmt: skip
    """See :mod:`backbones.ops.scan.projected`."""
    check_device("u", u)
    with device_of(u):
        b, length = u.shape[:2]
        k, o, r = dt_weight.shape
        if u.dim() == 4:
            x = torch.bmm(_per_order(u), x_weight.transpose(1, 2))
            delta = torch.bmm(_first(x, r), dt_weight.transpose(1, 2))
            delta = delta.as_strided((b, length, k, o), (length * o, o, b * length * o, 1))
            blocks, A = dt_weight, negative_exp_of(A_log)
        else:
            width = x_weight.shape[1]
            x = torch.mm(u.reshape(b * length, -1), x_weight.view(k * width, -1).t())
            blocks, A = _prepared(dt_weight, A_log, width)
            delta = torch.mm(x, blocks.t()).view(b, length, k, o)
        tensors = (contiguous_rows(u), delta, A, *_weights(x, x_weight, b, length, r), D, orders, bias)
        y, states = _Scan.of(tensors, True, out, window, visits).forward(tensors, save, into)
        return y, Saved(x, blocks, delta, A, states) if states is not None else None


def backward(
    grad: Tensor, saved: Saved, u: Tensor, x_weight: Tensor, dt_weight: Tensor, bias: Tensor, D: Tensor,
    orders: Tensor | None, out: str, window: int, visits: Visits | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, x_weight, dt_weight, bias, A_log and D."""
    with device_of(u):
        b, length = u.shape[:2]
        (k, o, r), i = dt_weight.shape, x_weight.shape[1]
        n, tokens = (i - r) // 2, b * length
        u = contiguous_rows(u)
        tensors = (u, saved.delta, saved.A, *_weights(saved.x, x_weight, b, length, r), D, orders, bias)
        scan = _Scan.of(tensors, True, out, window, visits)
        du, ddelta, partials, parts = scan.backward(
            contiguous_rows(grad), tensors, saved.states, order_by_order=u.dim() == 4
        )
        du = scan.collect(du, scan.shared, u.dtype, orders)
        ddelta = scan.collect(ddelta, False, u.dtype, orders)
        if scan.facts.repeats:
            shape = partials.shape
            partials = scan.collect(partials.flatten(0, 2), False, partials.dtype, orders)
            partials = partials.view(*shape[:3], *partials.shape[1:])
        dx = torch.empty_like(saved.x)
        if u.dim() == 4:
            ddelta = _per_order(ddelta)
            torch.bmm(ddelta, dt_weight, out=_first(dx, r))
            product, ddt_weight = None, product_per_order(ddelta, _first(saved.x, r), b)
            of_order, of_row, taking = tokens * i, i, 0
        else:
            ddelta = ddelta.view(tokens, k * o)
            torch.mm(ddelta, saved.blocks, out=dx)
            product, ddt_weight = torch.mm(ddelta.t(), saved.x), torch.empty_like(dt_weight)
            of_order, of_row, taking = i, k * i, cdiv(dt_weight.numel(), _CONVERTED)

        dA_log = empty((k, o, n), torch.float32, u.device)
        dD, dbias = (empty((k, o), torch.float32, u.device) for _ in range(2))
        converting, summing = cdiv(tokens * k * 2 * n, _CONVERTED), cdiv(k * o * (n + 2), _SUMMED)
        run = scan.launches.get(("gradients", of_order, partials.shape[1], partials.dtype))
        if run is None:
            run = Launch(
                gradients_kernel, (converting + summing + taking,),
                (tokens, k, n, o, of_order, of_row, r, partials.shape[1], parts.shape[0], converting, summing), 4,
                BLOCK=_CONVERTED, COLUMNS=_SUMMED, ROWS=_ROWS, DIAGONAL=product is not None,
            )  # fmt: skip
            scan.launches["gradients", of_order, partials.shape[1], partials.dtype] = run
        run(partials, parts, saved.A, product, dx, dA_log, dD, dbias, ddt_weight if product is not None else None)

        if u.dim() == 4:
            rows = _per_order(u)
            dx_weight = product_per_order(dx, rows, b)
            _per_order(du).baddbmm_(dx, x_weight)
        else:
            rows = u.reshape(tokens, -1)
            dx_weight = torch.mm(dx.t(), rows).view(x_weight.shape)
            du.view(tokens, -1).addmm_(dx, x_weight.view(k * i, -1))
        return du, dx_weight, ddt_weight, dbias, dA_log, dD


def _weights(x: Tensor, x_weight: Tensor, b: int, length: int, r: int) -> tuple[Tensor, Tensor]:
    """B and C (b, l, k, n), views of the projected u."""
    k, i = x_weight.shape[:2]
    n = (i - r) // 2
    x = x.view(k, b, length, i).permute(1, 2, 0, 3) if x.dim() == 3 else x.view(b, length, k, i)
    _, B, C = x.split_with_sizes((r, n, n), 3)
    return B, C


def _first(x: Tensor, r: int) -> Tensor:
    """The first r columns of x (k, m, i), in half the time that an index takes."""
    return x.as_strided((*x.shape[:2], r), x.stride())


def _per_order(x: Tensor) -> Tensor:
    """(b, l, k, c) as (k, b l, c); a view where the orders lie one behind the other."""
    b, length, k, c = x.shape
    return x.permute(2, 0, 1, 3).reshape(k, b * length, c)


def product_per_order(grad: Tensor, x: Tensor, b: int) -> Tensor:
    """(k, o, i), sums over m of grad (k, m, o) times x (k, m, i), in their dtype.

    cuBLAS does not split the sums of batched products, which leaves most of a GPU idle: tokens of ``b`` images are
    batches of their own, up to 16 for each order.
    """
    k, m, o = grad.shape
    i, parts = x.shape[2], min(b & -b, _PARTS)  # a power of two
    grad, x = (t.reshape(k * parts, m // parts, t.shape[2]) for t in (grad, x))
    return torch.bmm(grad.transpose(1, 2), x).view(k, parts, o, i).sum(1)


def _prepared(dt_weight: Tensor, A_log: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The block-diagonal weight and A, see `parameters_kernel`."""
    k, o, r = dt_weight.shape
    n = A_log.shape[2]
    key = (k, o, r, width, n, dt_weight.dtype)
    run = _launches.get(key)
    count, numbers = k * o * k * width, k * o * n
    if run is None:
        spreading = cdiv(count, _CONVERTED)
        made = Launch(
            parameters_kernel, (spreading + cdiv(numbers, _CONVERTED),),
            (count, k, o, r, width, numbers, n, spreading), 4, BLOCK=_CONVERTED,
        )  # fmt: skip
        run = remember(_launches, key, made)
    blocks = empty((k * o, k * width), dt_weight.dtype, dt_weight.device)
    A = empty((k, n, o), torch.float32, dt_weight.device)
    run(dt_weight, blocks, A_log, A)
    return blocks, A
