"""One scan in a process of its own: prints how many MiB it took at its peak."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from backbones.commands.bench.shapes import SHAPES, Shape, TextbookLoop
from backbones.ops import selective_scan


def high_water_mark() -> float:
    """MiB of memory that this process has held at most since it started, or since the mark was lowered."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main(name: str, dtype: str, backend: str, backward: bool) -> None:
    """Prints the peak above what was held before the call."""

    def call(shape: Shape) -> None:
        if backend == "textbook":
            loop = TextbookLoop(shape.tensors(torch.float32))
            _lower_mark()
            loop()
            return
        tensors = shape.leaves(getattr(torch, dtype)) if backward else shape.tensors(getattr(torch, dtype))
        _lower_mark()
        y = selective_scan(**tensors, backend=backend)
        if backward:
            wanted = [x for x in tensors.values() if x.requires_grad]
            torch.autograd.grad(y, wanted, torch.ones(()).expand_as(y))

    call(Shape("small", 1, 2, 32, 8, SHAPES[name].n))  # loads and starts all that is loaded once
    call(SHAPES[name])
    print(high_water_mark() - _before)


_before = 0.0


def _lower_mark() -> None:
    global _before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    _before = high_water_mark()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1")
