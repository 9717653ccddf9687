"""-exp(x) in one launch, laid out as the scan reads it."""

# mypy: ignore-errors

import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.remember import remember
from backbones.ops.triton_host import Launch, cdiv, device_of, empty


@triton.jit
def negative_exp_kernel(x, y, count, c, n, BLOCK: tl.constexpr):
    """y (k, n, c) = -exp(x), x (k, c, n), BLOCK of ``count`` numbers per program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    source = (at // (c * n) * c + at % c) * n + at // c % n
    tl.store(y + at, -tl.exp(tl.load(x + source, mask=mask, other=0.0)), mask=mask)


_launches: dict[tuple[int, ...], Launch] = {}


def negative_exp(x: Tensor) -> Tensor:
    """-exp(x) of a contiguous x (k, c, n) in float32, stored as (k, n, c)."""
    with device_of(x):
        return negative_exp_of(x).transpose(1, 2)


def negative_exp_of(x: Tensor) -> Tensor:
    """-exp(x) as (k, n, c), on the current GPU."""
    k, c, n = x.shape
    run = _launches.get(x.shape)
    if run is None:
        count = k * c * n
        made = Launch(negative_exp_kernel, (cdiv(count, 1024),), (count, c, n), 4, BLOCK=1024)
        run = remember(_launches, x.shape, made)
    y = empty((k, n, c), x.dtype, x.device)
    run(x, y)
    return y
