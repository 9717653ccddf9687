"""Train what a config describes; the task follows from the config.

ssm-backbones train configs/digits/vim-tiny_digits.py
ssm-backbones train configs/digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py --resume auto
torchrun --nproc_per_node=2 -m ssm_backbones train CONFIG --launcher pytorch
srun --ntasks-per-node=8 --gres=gpu:8 ssm-backbones train CONFIG --launcher slurm
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmengine.device import get_device

from backbones.mm.app.cli import add_common_arguments, load_config, run_tool
from backbones.mm.engine.checkpoints import find_latest
from backbones.mm.engine.runner import Runner
from backbones.mm.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file under configs/")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|CHECKPOINT",
        help="go on from CHECKPOINT, or from the newest one of the work directory ('auto', the same as nothing)",
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="bfloat16",
        choices=("bfloat16", "float16"),
        help="automatic mixed precision (without a value: bfloat16)",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="replay the network (or backbone) as CUDA graphs; for images of one fixed size",
    )
    add_common_arguments(parser)
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train what the command line asks for."""
    config = load_config(args, ("train_dataloader", "val_dataloader"))
    if args.amp == "bfloat16":
        config.optim_wrapper.type = "BFloat16OptimWrapper"
    elif args.amp == "float16":
        if get_device() == "cpu":
            raise UserError("--amp float16 needs a GPU; on a CPU use --amp bfloat16")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.cuda_graphs:
        if get_device() != "cuda":
            raise UserError(f"--cuda-graphs needs a CUDA GPU, this run is on {get_device()}")
        config.custom_hooks = [*config.get("custom_hooks", []), {"type": "CudaGraphsHook"}]
    if args.resume:
        checkpoint = find_latest(config.work_dir) if args.resume == "auto" else args.resume
        if checkpoint is None:
            print(f"no checkpoint in {config.work_dir} yet: training starts from the beginning")
        else:
            config.update(resume=True, load_from=str(checkpoint))
    elif latest := find_latest(config.work_dir):
        raise UserError(f"{latest} is of an earlier run: add --resume to go on with it, or choose another --work-dir")
    Runner.from_cfg(config).train()
