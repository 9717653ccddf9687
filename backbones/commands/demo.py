"""Make a small data set, train a model on it and test the best checkpoint: everything once, without a download.

    ssm-backbones demo                 Vim tells scanned digits apart; minutes on a CPU
    ssm-backbones demo detection       VMamba with Mask R-CNN finds digits in photographs
    ssm-backbones demo segmentation    EfficientVMamba with UPerNet
    ssm-backbones demo unet            a U-Net on VMamba finds epithelium in tissue

Writes to data/ and work_dirs/ in the current folder, and goes on where an earlier demo stopped. Each step is a command
of its own, and is printed as such.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from backbones.mm.engine.report import find_best
from ssm_backbones import run


class Demo(NamedTuple):
    """One demo: the command that makes its data, and the config that it trains."""

    data: str
    arguments: list[str]
    config: str


DEMOS = {
    "classification": Demo("data digits", ["--out", "data/digits"], "vim-tiny_digits"),
    "detection": Demo(
        "data digits",
        ["--task", "detection", "--out", "data/digits_coco"],
        "mask-rcnn_vmamba-tiny-s1l8_fpn_digits",
    ),
    "segmentation": Demo(
        "data digits",
        ["--task", "segmentation", "--out", "data/digits_ade"],
        "upernet_efficientvmamba-tiny_digits",
    ),
    "unet": Demo("data tissue", ["--out", "data/tissue"], "unet_vmamba-tiny-s1l8_tissue"),
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=DEMOS, default="classification", help="default: %(default)s")
    args = parser.parse_args(argv)

    demo = DEMOS[args.task]
    work_dir = Path("work_dirs", demo.config)
    steps = [
        (demo.data, demo.arguments),
        ("train", [demo.config, "--work-dir", str(work_dir), "--resume"]),
        ("test", [str(work_dir)]),
    ]
    for command, arguments in steps:
        print(f"$ ssm-backbones {' '.join([command, *arguments])}", flush=True)
        if status := run(command, arguments, f"ssm-backbones {command}"):
            return status
    print(f"checkpoint  {find_best(work_dir)}")
    for name in ("training", "predictions"):
        if (picture := work_dir / f"{name}.png").is_file():
            print(f"picture     {picture}")
    return 0
