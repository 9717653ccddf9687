"""Evaluate a checkpoint on the test data of a config.

    ssm-backbones test work_dirs/vim-tiny_digits
    ssm-backbones test vim-tiny_digits work_dirs/vim-tiny_digits/epoch_3.pth
    ssm-backbones test work_dirs/vim-tiny_digits --tta

The work directory of a run stands for its config and its best checkpoint. A detector or segmentor leaves
predictions.png in --work-dir, predictions beside the ground truth of some images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import is_main_process

from backbones.mm.app.cli import add_common_arguments, load_config, run_tool
from backbones.mm.app.console import brief, print_average_precisions
from backbones.mm.app.tta import use_tta
from backbones.mm.engine.report import find_best
from backbones.mm.engine.runner import Runner
from backbones.mm.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", help="a file, the name of a config that comes with the package, or the work directory of a run"
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="a checkpoint, or the work directory of a run (default: where the config is one)"
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: merge predictions for several sizes of each image, mirrored if training mirrors",
    )
    add_common_arguments(parser)
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Evaluate what the command line asks for."""
    if args.checkpoint is None and not Path(args.config).is_dir():
        raise UserError(f"CHECKPOINT is missing; only the work directory of a run goes without it, got {args.config}")
    config = load_config(args, ("test_dataloader",))
    checkpoint = Path(args.checkpoint or args.config)
    config.load_from = str(find_best(checkpoint) if checkpoint.is_dir() else checkpoint)
    config.resume = False
    views = f"{use_tta(config)} of each, " if args.tta else ""
    runner = Runner.from_cfg(config)
    start = time.perf_counter()
    metrics = runner.test()
    seconds = time.perf_counter() - start
    if is_main_process():
        print_average_precisions(metrics)
        images = len(runner.test_dataloader.dataset)
        print(f"{brief(metrics)}  ({images} images, {views}{seconds:.1f} s, {config.load_from})")
