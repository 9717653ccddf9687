"""Look at what a config feeds to its model: images behind the pipeline, with their boxes, masks or labels.

    ssm-backbones browse mask-rcnn_vmamba-tiny-s1l8_fpn_digits --count 8

Writes one PNG, PDF or SVG. Photographs keep their shape, and the background of a segmentation stays clear.
What mixes whole batches (mixup, cutmix) comes later, in the model, and is not shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, init_default_scope
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from backbones.commands.outputs import unwritable
from backbones.images import PICTURE_SUFFIXES
from backbones.mm.app import pictures
from backbones.mm.app.cli import read_config, run_tool
from backbones.mm.app.colors import ClassColors, stated_metainfo
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
    colors = ClassColors.of(classes, stated_metainfo(config[loader].dataset))
    samples = []
    for index in chosen.tolist():
        samples.append(dataset[index])
        if samples[-1] is None:
            raise UserError(f"sample {index} of {loader} cannot be read; the log names its file")

    columns = min(len(chosen), max(1, round((1.5 * len(chosen)) ** 0.5)))
    figure, axes = pictures.photograph_grid([x["inputs"].shape[1:] for x in samples], columns)
    shown: set[int] = set()
    for ax, sample in zip(axes, samples, strict=True):
        shown |= _draw(ax, sample, config, loader, colors)
    colors.add_legend(figure, sorted(shown))
    return figure


def _draw(ax: Axes, sample: Any, config: Config, loader: str, colors: ClassColors) -> set[int]:
    """Returns the labels that a legend must explain."""
    x = sample["inputs"].float()
    size = f"({x.shape[1]} x {x.shape[2]})"
    if "targets" in sample:
        _show(ax, _before_normalisation(x, config[loader].dataset))
        ax.set_title(f"{_short(str(colors.names[sample['targets']]))}  {size}", fontsize=8)
        return set()
    if config.model.data_preprocessor.get("bgr_to_rgb"):
        x = x.flip(0)
    _show(ax, x / 255)
    truth = sample["data_samples"]
    ax.set_title(f"{_short(Path(truth.img_path).name)}  {size}", fontsize=8)
    if "gt_sem_seg" in truth:
        return pictures.draw_labels(ax, truth.gt_sem_seg, colors)
    pictures.draw_instances(ax, truth.gt_instances, colors)
    return set()


def _show(ax: Axes, x: Tensor) -> None:
    """An image (channels, height, width) in 0..1; of many bands the first three, of two the first."""
    x = x.clamp(0, 1)
    ax.imshow((x[:3] if len(x) >= 3 else x[:1]).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)


def _before_normalisation(x: Tensor, dataset: Any) -> Tensor:
    """What a transform normalised, in 0..1 again; arrays in units of their own are stretched to it."""
    while "dataset" in dataset:
        dataset = dataset.dataset
    defaults = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    mean, std = (torch.tensor(dataset.transform.get(key, value)) for key, value in defaults.items())
    x = x * std[:, None, None] + mean[:, None, None]
    if x.amin() >= -0.01 and x.amax() <= 1.01:
        return x
    return (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-9)


def _short(name: str) -> str:
    """At most 24 letters, of a longer name its ends."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file, or the name of a config that comes with the package")
    parser.add_argument("--loader", choices=("train", "val", "test"), default="train", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=12, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and of the augmentations")
    parser.add_argument("--out", type=Path, help="a PNG, PDF or SVG (default: <config>_<loader>.png)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Draw what the command line asks for."""
    if args.count < 1:
        raise UserError(f"--count: got {args.count}, expected at least 1")
    out = args.out or Path(f"{Path(args.config).stem}_{args.loader}.png")
    if reason := unwritable(out, *PICTURE_SUFFIXES):
        raise UserError(f"--out: {reason}")
    loader = f"{args.loader}_dataloader"
    config = read_config(args.config, [loader], args.cfg_options)
    figure = draw_samples(config, loader, args.count, args.seed)
    pictures.save(figure, out)
    print(out)
