"""The projection of step sizes, for backends that leave it to matrix products."""

import torch
from torch import Tensor


def per_order_linear(delta: Tensor, dt_weight: Tensor) -> Tensor:
    """delta (b, l, k, r) times dt_weight (k, c, r) gives (b, l, k, c) in the dtype of delta, stored as (k, b, l, c):
    one small product for each order, without copies of the result.
    """
    b, length, k, _ = delta.shape
    y = torch.bmm(delta.permute(2, 0, 1, 3).reshape(k, b * length, -1), dt_weight.transpose(1, 2).to(delta.dtype))
    return y.unflatten(1, (b, length)).permute(1, 2, 0, 3)


def projection_gradients(grad: Tensor, delta: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of delta (b, l, k, r), in its dtype, and of dt_weight (k, c, r), from that of their product."""
    b, length = grad.shape[:2]
    grad = grad.to(dt_weight.dtype).flatten(0, 1).transpose(0, 1)  # (k, b * l, c)
    low = delta.to(dt_weight.dtype).flatten(0, 1).permute(1, 2, 0).contiguous()  # (k, r, b * l)
    # Both products with the rank, which is small, in front: with it at the end, MKL takes up to ten times as long.
    ddelta = torch.bmm(dt_weight.transpose(1, 2).contiguous(), grad.transpose(1, 2))  # (k, r, b * l)
    ddt_weight = torch.bmm(low, grad).transpose(1, 2).contiguous()
    return ddelta.permute(2, 0, 1).unflatten(0, (b, length)).to(delta.dtype).contiguous(), ddt_weight
