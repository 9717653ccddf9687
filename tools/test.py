#!/usr/bin/env python
"""Evaluate a checkpoint on the test data of a config.

    python tools/test.py configs/digits/vim-tiny_digits.py work_dirs/vim-tiny_digits

CHECKPOINT may be the work directory of a training run: then its best checkpoint is meant. A detector or segmentor
leaves predictions.png in --work-dir, predictions beside the ground truth of some images.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

# Must come before PyTorch; tools/train.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from mmengine.dist import is_main_process

from backbones.mm.app.cli import add_common_arguments, load_config, run_tool
from backbones.mm.app.console import brief, print_average_precisions
from backbones.mm.engine.report import find_best
from backbones.mm.engine.runner import Runner


def main() -> None:
    """Read the command line and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file under configs/")
    parser.add_argument("checkpoint", help="a checkpoint, or the work directory of a training run")
    add_common_arguments(parser)
    args = parser.parse_args()

    config = load_config(args, ("test_dataloader",))
    checkpoint = Path(args.checkpoint)
    config.load_from = str(find_best(checkpoint) if checkpoint.is_dir() else checkpoint)
    config.resume = False
    runner = Runner.from_cfg(config)
    start = time.perf_counter()
    metrics = runner.test()
    seconds = time.perf_counter() - start
    if is_main_process():
        print_average_precisions(metrics)
        images = len(runner.test_dataloader.dataset)
        print(f"{brief(metrics)}  ({images} images, {seconds:.1f} s, {config.load_from})")


if __name__ == "__main__":
    run_tool(main)
