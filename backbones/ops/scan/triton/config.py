"""How the scan's kernels are cut for a shape."""

import functools
from dataclasses import dataclass, replace

from backbones.ops.triton_host import cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: padded states, channels a program, steps a group, warps a program."""

    N: int
    BLOCK_C: int
    U: int
    num_warps: int


@functools.cache
def forward_config(n: int, c: int, chains: int, multiprocessors: int) -> Config:
    """A fixed choice by shape, for ``chains`` = b k recurrences (measured on an H200).

    Tuning at run time would make the order of sums, and so the results, depend on a race between candidates.
    """
    N, block, warps = _tile(n, c, chains, multiprocessors)
    return Config(N, block, 8 if N == 1 and block < 128 else 4, warps)


@functools.cache
def backward_config(n: int, c: int, chains: int, multiprocessors: int) -> Config:
    """As :func:`forward_config`; with more than 16 states, half as many a thread."""
    N, block, warps = _tile(n, c, chains, multiprocessors)
    block = block // 2 if N > 16 else block
    return Config(N, block, 4 if N <= 8 and block < 128 else 2, warps)


def backward_window_config(config: Config) -> Config:
    """Where LBMamba's local scan follows: it adds to what it has to load, which takes registers."""
    return replace(config, BLOCK_C=config.BLOCK_C // 2) if 4 < config.N <= 16 else config


def _tile(n: int, c: int, chains: int, multiprocessors: int) -> tuple[int, int, int]:
    """(N, BLOCK_C, num_warps): at most 16 states a thread, so that all of them stay in registers.

    With one state a warp may take 4 channels a lane, if that leaves 11 warps for every multiprocessor.
    """
    N = next_power_of_2(n)
    block = 32 if N <= 16 else max(8, 512 // N)
    if N == 1:
        wide = (x for x in (128, 64) if x <= c and chains * cdiv(c, x) >= 11 * multiprocessors)
        block = next(wide, block)
    return N, block, max(1, N * block // 512)
