"""-exp(x) in one launch, laid out as the scan reads it."""

# mypy: ignore-errors

import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_host import cdiv, device_of, empty, launch


@triton.jit
def negative_exp_kernel(x, y, count, c, n, BLOCK: tl.constexpr):
    """y (k, n, c) = -exp(x), x (k, c, n), BLOCK of ``count`` numbers per program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    source = (at // (c * n) * c + at % c) * n + at // c % n
    tl.store(y + at, -tl.exp(tl.load(x + source, mask=mask, other=0.0)), mask=mask)


def negative_exp(x: Tensor) -> Tensor:
    """-exp(x) of a contiguous x (k, c, n) in float32, stored as (k, n, c)."""
    k, c, n = x.shape
    y = empty((k, n, c), x.dtype, x.device)
    with device_of(x):
        launch(negative_exp_kernel, (cdiv(x.numel(), 1024),), (x, y), (x.numel(), c, n), 4, BLOCK=1024)
    return y.transpose(1, 2)
