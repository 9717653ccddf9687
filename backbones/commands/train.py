"""Train what a config describes; the task follows from the config.

ssm-backbones train vim-tiny_digits
ssm-backbones train --data FOLDER --model vmamba_tiny_s1l8
ssm-backbones train mask-rcnn_vmamba-tiny-s1l8_fpn_digits --resume auto
torchrun --standalone --nproc_per_node=2 -m ssm_backbones train CONFIG --launcher pytorch
srun --ntasks-per-node=8 --gres=gpu:8 ssm-backbones train CONFIG --launcher slurm
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.device import get_device

from backbones.mm.app import recipe
from backbones.mm.app.cli import add_common_arguments, load_config, run_tool
from backbones.mm.engine.checkpoints import find_latest, require_folder, write_text
from backbones.mm.engine.runner import Runner
from backbones.mm.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a file, or the name of a config that comes with the package")
    own = parser.add_argument_group("own images", "instead of a config, which is then written")
    own.add_argument(
        "--data", metavar="FOLDER", help="train/ and val/ with a folder for each class, or these folders alone"
    )
    own.add_argument("--model", metavar="NAME", help="registered name, such as vmamba_tiny_s1l8")
    own.add_argument(
        "--weights", metavar="FILE", help="begin with these weights (default: those that the authors published)"
    )
    own.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    own.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    own.add_argument("--gray", action="store_true", help="feed one channel of grey instead of three")
    own.add_argument("--epochs", type=int, help="(default: by the number of images)")
    own.add_argument("--val-share", type=float, help="held out where there is no val/ (default: 0.2)")
    own.add_argument("--write-only", action="store_true", help="write the config and leave")
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
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the images per step, relative to those of the recipe",
    )
    add_common_arguments(parser)
    return run_tool(parser.prog, run, parser.parse_args(argv))


_OF_DATA = ("model", "weights", "from_scratch", "image_size", "epochs", "val_share", "gray", "write_only")


def prepare(args: argparse.Namespace) -> bool:
    """Write the config that ``--data`` asks for, and name it in ``args``; returns whether there is something to train.

    Raises:
        UserError: options that do not go together, or data or a model that cannot be trained.
    """
    if args.data is None:
        given = [name for name in _OF_DATA if getattr(args, name) not in (None, False)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --data, a config says it itself")
        if args.config is None:
            raise UserError("expected a config, or --data FOLDER and --model NAME")
        return True
    if args.config is not None:
        raise UserError(f"--data writes a config, got {args.config} beside it")
    if args.model is None:
        raise UserError("--data needs --model NAME, such as --model vmamba_tiny_s1l8")
    if args.weights is not None and args.from_scratch:
        raise UserError("--weights and --from-scratch exclude each other")
    if args.launcher != "none":
        raise UserError("--data runs in one process: write the config by --write-only, and train with it in several")
    data = recipe.look_at(args.data, 0.2 if args.val_share is None else args.val_share)
    weights = None if args.from_scratch else args.weights or "published"
    chosen = recipe.choose(args.model, data, weights, args.image_size, args.epochs, args.gray)
    print(recipe.describe(chosen, data))
    work_dir = Path(args.work_dir or Path("work_dirs", f"{args.model}_{data.root.resolve().name}"))
    file = work_dir.parent / f"{work_dir.name}.py"
    text = recipe.write(chosen, data, file)
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{file} is there already, and edited or for other settings: train with it, or delete it")
    require_folder(file.parent)
    write_text(file, text)
    print(f"config: {file}")
    args.config, args.work_dir = str(file), str(work_dir)
    return not args.write_only


def run(args: argparse.Namespace) -> None:
    """Train what the command line asks for."""
    if not prepare(args):
        return
    config = load_config(args, ("train_dataloader", "val_dataloader"))
    if args.amp == "bfloat16":
        config.optim_wrapper.type = "BFloat16OptimWrapper"
    elif args.amp == "float16":
        if get_device() == "cpu":
            raise UserError("--amp float16 needs a GPU; on a CPU use --amp bfloat16")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(
                f"--auto-scale-lr: {config.filename} does not state the batch size of its recipe, "
                "auto_scale_lr=dict(base_batch_size=...)"
            )
        config.auto_scale_lr.enable = True
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
