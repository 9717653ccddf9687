"""The selective scan with its projections on a GPU: products by cuBLAS, and what stands between them in few launches.

An operation of its own for each step, with autograd's bookkeeping, keeps the host busy for longer than the GPU. Here
forward takes a product, a block-diagonal weight (where all orders read the same u), a product, the decay rates, the
scan and the sum of its orders; backward the scan, three products with their weights' gradients, and one launch that
takes partial sums to the gradients of B, C, A_log, D and bias.
"""

# mypy: ignore-errors

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.rows import contiguous_rows
from backbones.ops.scan.triton.decay import negative_exp_of
from backbones.ops.scan.triton.launch import _Scan
from backbones.ops.scan.visits import Visits
from backbones.ops.triton_host import Launch, cdiv, check_device, device_of, empty, launch

_CONVERTED = 1024  # numbers of the gradients of B and C to a program
_SUMMED = 128  # columns of the partial sums to a program
_ROWS = 32  # and rows at once


@triton.jit
def block_diagonal_kernel(weight, blocks, count, k, o, r, width, BLOCK: tl.constexpr):
    """blocks (k o, k width): the i-th block begins with the r columns of the i-th of ``weight`` (k, o, r), 0 elsewhere.

    BLOCK of ``count`` numbers to a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = at // (k * width)
    column = at % (k * width)
    inside = (column // width == row // o) & (column % width < r) & (at < count)
    value = tl.load(weight + row * r + column % width, mask=inside, other=0.0)
    tl.store(blocks + at, value.to(blocks.dtype.element_ty), mask=at < count)


@triton.jit
def gradients_kernel(
    partials, parts, A, dx, dA_log, dD, dbias,
    tokens, k, n, c, of_order, of_row, first, blocks, rows, converting,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Two unrelated ends of a backward pass in one launch.

    The first ``converting`` programs sum partials (2, blocks, tokens, k, n), gradients of B and C, over blocks, and
    write them to the columns from ``first`` on of the rows of dx. The others sum parts (rows, k c (n + 2)), gradients
    of A (k, n, c), D and bias (k, c) one behind the other, over rows. Both in a fixed order.
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
    else:
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


@dataclass
class Saved:
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
    out: str, window: int, visits: Visits | None, save: bool,
) -> tuple[Tensor, Saved | None]:  # fmt: skip
    """See :mod:`backbones.ops.scan.projected`."""
    check_device("u", u)
    with device_of(u):
        b, length = u.shape[:2]
        k, o, r = dt_weight.shape
        if u.dim() == 4:
            x = torch.bmm(_per_order(u), x_weight.transpose(1, 2))
            delta = torch.bmm(x[:, :, :r], dt_weight.transpose(1, 2))
            delta = delta.as_strided((b, length, k, o), (length * o, o, b * length * o, 1))
            blocks = dt_weight
        else:
            width = x_weight.shape[1]
            x = torch.mm(u.reshape(b * length, -1), x_weight.view(k * width, -1).t())
            blocks = empty((k * o, k * width), u.dtype, u.device)
            launch(
                block_diagonal_kernel, (cdiv(blocks.numel(), 1024),), (dt_weight, blocks),
                (blocks.numel(), k, o, r, width), 4, BLOCK=1024,
            )  # fmt: skip
            delta = torch.mm(x, blocks.t()).view(b, length, k, o)
        A = negative_exp_of(A_log)
        tensors = (contiguous_rows(u), delta, A, *_weights(x, x_weight, b, length, r), D, orders, bias)
        y, states = _Scan.of(tensors, True, out, window, visits).forward(tensors, save)
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
        du, ddelta, partials, (parts,) = scan.backward(
            contiguous_rows(grad), tensors, saved.states, order_by_order=u.dim() == 4
        )
        du = scan.collect(du, scan.shared, u.dtype, orders)
        dx = torch.empty_like(saved.x)
        if u.dim() == 4:
            ddelta = _per_order(ddelta)
            torch.bmm(ddelta, dt_weight, out=dx[:, :, :r])
            ddt_weight = _product_per_order(ddelta, saved.x[:, :, :r], dt_weight)
            of_order, of_row = tokens * i, i
        else:
            ddelta = ddelta.view(tokens, k * o)
            torch.mm(ddelta, saved.blocks, out=dx)
            blocks = torch.mm(ddelta.t(), saved.x)
            ddt_weight = blocks.as_strided((k, o, r), (o * k * i + i, k * i, 1)).contiguous()
            of_order, of_row = i, k * i

        dA_log = empty((k, o, n), torch.float32, u.device)
        dD, dbias = (empty((k, o), torch.float32, u.device) for _ in range(2))
        converting = cdiv(tokens * k * 2 * n, _CONVERTED)
        run = scan.launches.get(("gradients", of_order, partials.shape[1], partials.dtype))
        if run is None:
            run = Launch(
                gradients_kernel, (converting + cdiv(k * o * (n + 2), _SUMMED),),
                (tokens, k, n, o, of_order, of_row, r, partials.shape[1], parts.shape[0], converting), 4,
                BLOCK=_CONVERTED, COLUMNS=_SUMMED, ROWS=_ROWS,
            )  # fmt: skip
            scan.launches["gradients", of_order, partials.shape[1], partials.dtype] = run
        run(partials, parts, saved.A, dx, dA_log, dD, dbias)

        if u.dim() == 4:
            rows = _per_order(u)
            dx_weight = _product_per_order(dx, rows, x_weight)
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
    if x.dim() == 3:
        strides = (length * i, i, b * length * i, 1)
    else:
        strides = (length * k * i, k * i, i, 1)
    return x.as_strided((b, length, k, n), strides, r), x.as_strided((b, length, k, n), strides, r + n)


def _per_order(x: Tensor) -> Tensor:
    """(b, l, k, c) as (k, b l, c); a view where the orders lie one behind the other."""
    b, length, k, c = x.shape
    return x.permute(2, 0, 1, 3).reshape(k, b * length, c)


def _product_per_order(grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """(k, o, i), sums over m of grad (k, m, o) times x (k, m, i): batched, cuBLAS does not split sums over tokens."""
    y = torch.empty_like(like)
    for g, rows, product in zip(grad.transpose(1, 2).unbind(0), x.unbind(0), y.unbind(0), strict=True):
        torch.mm(g, rows, out=product)
    return y
