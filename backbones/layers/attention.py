"""Softmax attention, where a family has some beside its scans."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (b, heads, l, d) (Vaswani et al. 2017, section 3.2.1).

    Fused, but on "naive": PyTorch's fused attention has no second derivatives.
    """
    if backend == "naive":
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
