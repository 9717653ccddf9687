"""-exp(x) in one launch."""

# mypy: ignore-errors

import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_host import cdiv, device_of, empty, launch


@triton.jit
def negative_exp_kernel(x, y, count, BLOCK: tl.constexpr):
    """y (count) = -exp(x), BLOCK numbers per program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    tl.store(y + at, -tl.exp(tl.load(x + at, mask=mask, other=0.0)), mask=mask)


def negative_exp(x: Tensor) -> Tensor:
    """-exp(x) of a contiguous x in float32."""
    y = empty(x.shape, x.dtype, x.device)
    with device_of(x):
        launch(negative_exp_kernel, (cdiv(x.numel(), 1024),), (x, y), (x.numel(),), 4, BLOCK=1024)
    return y
