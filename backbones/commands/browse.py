"""Look at what a config feeds to its model: images behind the pipeline, with their boxes, masks or labels.

    ssm-backbones browse configs/digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py --count 8

Writes one PNG. What mixes whole batches (mixup, cutmix) comes later, in the model, and is not shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, init_default_scope

from backbones.commands.outputs import unwritable
from backbones.mm.app import pictures
from backbones.mm.app.cli import load_config, run_tool
from backbones.mm.app.console import hidden_prints
from backbones.mm.errors import UserError


def draw_samples(config: Config, loader: str, count: int, seed: int) -> Figure:
    """A grid of random samples of a data loader's data set.

    Raises:
        UserError: the config has no such loader, or its data set is empty.
    """
    if loader not in config:
        raise UserError(f"{config.filename} has no {loader}")
    init_default_scope(config.get("default_scope", "mmengine"))
    with hidden_prints():
        dataset = DATASETS.build(config[loader].dataset)
    if not len(dataset):
        raise UserError(f"the data set of {loader} is empty")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # which OpenMMLab's transforms draw from
    chosen = rng.choice(len(dataset), size=min(count, len(dataset)), replace=False)
    classes = dataset.metainfo["classes"]
    colors = colormaps["tab20" if len(classes) <= 20 else "gist_ncar"].resampled(len(classes))

    columns = min(len(chosen), max(1, round((1.5 * len(chosen)) ** 0.5)))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    shown: set[int] = set()
    for ax, index in zip(axes, chosen.tolist(), strict=False):
        sample = dataset[index]
        if sample is None:
            raise UserError(f"sample {index} of {loader} cannot be read; the log names its file")
        shown |= _draw(ax, sample, config, classes, colors)
    if shown:
        handles = [Patch(color=colors(label), label=classes[label]) for label in sorted(shown)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 12), frameon=False)
    return figure


def _draw(ax: Axes, sample: Any, config: Config, classes: Any, colors: Colormap) -> set[int]:
    """Returns the labels that a legend must explain."""
    x = sample["inputs"].float()
    size = f"({x.shape[1]} x {x.shape[2]})"
    if "targets" in sample:  # normalised by timm's transform
        low, high = x.amin(), x.amax()
        ax.imshow(((x - low) / (high - low).clamp(min=1e-9)).permute(1, 2, 0).numpy())
        ax.set_title(f"{classes[sample['targets']]}  {size}", fontsize=9)
        return set()
    if config.model.data_preprocessor.get("bgr_to_rgb"):
        x = x.flip(0)
    ax.imshow((x.clamp(0, 255) / 255).permute(1, 2, 0).numpy())
    truth = sample["data_samples"]
    ax.set_title(f"{Path(truth.img_path).name}  {size}", fontsize=9)
    if "gt_sem_seg" in truth:
        return pictures.draw_labels(ax, truth.gt_sem_seg, colors)
    pictures.draw_instances(ax, truth.gt_instances, classes, colors)
    return set()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file under configs/")
    parser.add_argument("--loader", choices=("train", "val", "test"), default="train", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=12, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and of the augmentations")
    parser.add_argument("--out", type=Path, help="the PNG to write (default: <config>_<loader>.png)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what the command line asks for."""
    if args.count < 1:
        raise UserError(f"--count: got {args.count}, expected at least 1")
    out = args.out or Path(f"{Path(args.config).stem}_{args.loader}.png")
    if reason := unwritable(out, ".png"):
        raise UserError(f"--out: {reason}")
    loader = f"{args.loader}_dataloader"
    common = argparse.Namespace(**vars(args), launcher="none", verbose=False, work_dir=None)
    config = load_config(common, [loader])
    figure = draw_samples(config, loader, args.count, args.seed)
    pictures.save(figure, out)
    print(out)
