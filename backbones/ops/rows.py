"""Rows of channels as kernels read them."""

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # subclasses, of quantized or distributed weights, have operators of their own


def contiguous_rows(x: Tensor) -> Tensor:
    """x, its last axis without gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def matrix(x: Tensor) -> Tensor:
    """(..., c) as (rows, c) with contiguous channels, a view where that is possible."""
    return contiguous_rows(x.reshape(-1, x.shape[-1]))
