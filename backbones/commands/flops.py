"""Parameters, operations and activations of models, stage by stage, the selective scans included.

    ssm-backbones flops vmamba_tiny_s1l8 swin_tiny_patch4_window7_224
    ssm-backbones flops vim_tiny --size 512 384
    ssm-backbones flops mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco

Operations are counted as the papers count them: a multiply-add is one, a scan 9 for each step, channel and state.
Nothing is computed, so large images cost no memory.

Of a detector, box heads are counted for all regions that are proposed and mask heads for the most objects that are
found. Not counted are RoIAlign, non-maximum suppression, the making of boxes and masks, and heads for training alone.
Without --size, images are those of the test pipeline, but 800 x 1280 where they are resized to at most 1333 x 800.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backbones.analysis.flops import Cost, ModelCost, count
from backbones.configs import is_config

COLUMNS = ("", "parameters (M)", "GFLOPs", "of them scans", "activations (M)")


def table(cost: ModelCost) -> str:
    """One line for each stage, and their total."""
    stages = {**cost.stages, "total": cost.total}
    rows = [COLUMNS, *((name, *_values(stage)) for name, stage in stages.items())]
    first = max(len(row[0]) for row in rows)
    lines = [
        row[0].ljust(first)
        + "".join(f"  {cell:>{len(title)}}" for cell, title in zip(row[1:], COLUMNS[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*lines[:-1], "-" * len(lines[0]), lines[-1]])


def _values(cost: Cost) -> tuple[str, ...]:
    return (
        f"{cost.parameters / 1e6:.3f}",
        f"{cost.flops / 1e9:.3f}",
        f"{cost.scan / 1e9:.3f}",
        f"{cost.activations / 1e6:.2f}",
    )


def _count_config(file: str, size: tuple[int, int] | None) -> ModelCost:
    from backbones.mm.app.cli import read_config
    from backbones.mm.app.cost import count_config

    return count_config(read_config(file), size)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="a model of timm's registry, ours among them, or a config (a file or a name)",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar="PIXELS",
        help="side of the image, or height and width (default: what the model was published for)",
    )
    args = parser.parse_args(argv)
    try:
        if args.size and len(args.size) > 2:
            raise ValueError(f"--size: got {len(args.size)} numbers, expected a side, or height and width")
        size = None if args.size is None else (args.size[0], args.size[-1])
        counts = {name: _count_config(name, size) if is_config(name) else count(name, size) for name in args.names}
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    for name, cost in counts.items():
        print(f"{name}, {cost.size[0]} x {cost.size[1]} pixels\n{table(cost)}\n")
    return 0
