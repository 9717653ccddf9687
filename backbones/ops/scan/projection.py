"""The projection of step sizes, for backends that leave it to matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.tracing import is_transformed


def per_order_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (b, l, k, i) times weight (k, o, i) gives (b, l, k, o) in the dtype of x, stored as (k, b, l, o): one small
    product for each order, without copies of the result.
    """
    b, length, k, width = x.shape
    y = _PerOrderProduct.apply(x.permute(2, 0, 1, 3).reshape(k, b * length, width), weight.to(x.dtype))
    return y.unflatten(1, (b, length)).permute(1, 2, 0, 3)


class _PerOrderProduct(torch.autograd.Function):
    """x (k, m, i) times the transpose of weight (k, o, i).

    As ``torch.bmm``, but the weight's gradient is one product for each order: batched, cuBLAS does not split its
    sums over m = b l tokens, and so takes 3 to 20 times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx = torch.bmm(grad, weight)
        if torch.is_grad_enabled():  # to be differentiated again
            return dx, torch.stack([g.T @ rows for g, rows in zip(grad, x, strict=True)])
        dweight = torch.empty_like(weight)
        for g, rows, y in zip(grad, x, dweight, strict=True):
            torch.mm(g.T, rows, out=y)
        return dx, dweight


def joint_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The r leading columns of x (b, l, k, i) times weight (k, o, r) give (b, l, k, o): all orders in one product.

    Its weight is block-diagonal: k times the operations, yet on a GPU a third of the time, because the rows of all
    orders together are aligned where r = 6 columns of one are not.
    """
    k, o, rank = weight.shape
    if torch.compiler.is_compiling() or is_transformed(x, weight):
        blocks = torch.block_diag(*F.pad(weight, (0, x.shape[-1] - rank)).unbind(0))
    else:
        blocks = _BlockDiagonal.apply(weight, x.shape[-1], x.dtype)
    return F.linear(x.flatten(2), blocks).unflatten(-1, (k, o))


class _BlockDiagonal(torch.autograd.Function):
    """(k o, k i) in ``dtype``, whose k-th block begins with the r columns of the k-th of ``weight`` (k, o, r).

    As ``torch.block_diag`` of padded weights, in two launches.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        k, o, _ = weight.shape
        blocks = weight.new_zeros((k * o, k * width), dtype=dtype)
        _diagonal(blocks, weight.shape).copy_(weight)
        return blocks

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _diagonal(grad, ctx.shape).to(ctx.dtype).contiguous(), None, None


def _diagonal(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The blocks' leading columns (k, o, r), a view."""
    k, o, rank = shape
    return blocks.view(k, o, k, -1).diagonal(dim1=0, dim2=2)[:, :rank].permute(2, 0, 1)


def projection_gradients(grad: Tensor, delta: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of delta (b, l, k, r), in its dtype, and of dt_weight (k, c, r), from that of their product."""
    b, length = grad.shape[:2]
    grad = grad.to(dt_weight.dtype).flatten(0, 1).transpose(0, 1)  # (k, b * l, c)
    low = delta.to(dt_weight.dtype).flatten(0, 1).permute(1, 2, 0).contiguous()  # (k, r, b * l)
    # Both products with the rank, which is small, in front: with it at the end, MKL takes up to ten times as long.
    with torch.autocast(grad.device.type, enabled=False):  # where backward itself is called under it
        ddelta = torch.bmm(dt_weight.transpose(1, 2).contiguous(), grad.transpose(1, 2))  # (k, r, b * l)
        ddt_weight = torch.bmm(low, grad).transpose(1, 2).contiguous()
    return ddelta.permute(2, 0, 1).unflatten(0, (b, length)).to(delta.dtype).contiguous(), ddt_weight
