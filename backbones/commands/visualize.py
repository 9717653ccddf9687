"""Draw how a scan walks, what a model sees, and how much one place reaches another; to a PNG, PDF or SVG.

    ssm-backbones visualize orders hilbert --size 7 9
    ssm-backbones visualize orders msvmamba_tiny
    ssm-backbones visualize field vmamba_tiny_s1l8 --image cat.jpg
    ssm-backbones visualize attention vim-tiny_digits --checkpoint work_dirs/a --image 7.png
    ssm-backbones visualize features vim_tiny --pretrained --image cat.jpg
    ssm-backbones visualize tokens vim_tiny --pretrained --image cat.jpg --keep 0.7

orders     the traversals of a scan pattern, or of a model's scans, on a grid of --size cells
field      effective receptive field: the gradient of the centre of a feature map with respect to the image, averaged
           over the images (Understanding the Effective Receptive Field, arXiv:1701.04128); noise if there are none
attention  how much the other places reach one place in a scan, from its dt, A, B and C (arXiv:2403.01590)
features   size and three principal components of the feature maps
tokens     the patches that a plain model keeps where it drops or merges tokens (backbones.reduce_tokens)

A model is a name of timm's, or a config for classification, detection or segmentation. Photographs keep their shape: of
one that is not shaped as --size, the model sees the centre. --checkpoint takes a file, or the work directory of a run,
whose best checkpoint is meant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from backbones.analysis.hidden_attention import RecordedScan, hidden_attention, recorded_scans
from backbones.analysis.tokens import LeftTokens, left_tokens
from backbones.base import reduce_tokens
from backbones.base.reduction import plain_backbone
from backbones.commands.orders import count_grids, draw_orders
from backbones.commands.outputs import unwritable
from backbones.commands.subject import Subject, load_image, load_subject
from backbones.images import PICTURE_SUFFIXES, write_picture
from backbones.layers import Scan
from backbones.patterns import PATTERNS

__all__ = ["draw_orders"]


def picture_of_orders(args: argparse.Namespace) -> Figure:
    """Every order of a pattern, or of all patterns in a model."""
    if args.model in PATTERNS:
        patterns = [PATTERNS[args.model]]
    else:
        found = (getattr(module, "scan", None) for module in load_subject(args).module.modules())
        patterns = list(dict.fromkeys(scan.pattern for scan in found if isinstance(scan, Scan)))
        if not patterns:
            raise ValueError(f"{args.model} has no scan")
    height, width = args.size or (7, 7)
    if max(height, width) > 64:
        raise ValueError(f"--size: got a grid of {height} x {width} cells, expected at most 64 x 64, to be readable")
    figure = Figure(layout="constrained")
    sizes = []
    for pattern, ax in zip(patterns, figure.subplots(len(patterns), 1, squeeze=False)[:, 0], strict=True):
        draw_orders(pattern, height, width, ax)
        ax.set_title(f"{pattern.name} on {height} x {width} cells", fontsize=10)
        grids = count_grids(pattern, height, width)
        columns = min(grids, 4)
        sizes.append((columns * (width + 1), -(-grids // columns) * (height + 3)))
    figure.set_size_inches(0.36 * max(w for w, _ in sizes), 0.36 * sum(h for _, h in sizes))
    return figure


def receptive_field(subject: Subject, images: Tensor, stage: int) -> Tensor:
    """How much each pixel moves the centre of a map: |gradient|, (height, width), summed over colours and images."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        maps = subject.maps(images)
        if not -len(maps) <= stage < len(maps):
            raise ValueError(f"--stage: got {stage}, expected 0 to {len(maps) - 1}, or -1 for the last")
        y = maps[stage]
        centre = y[:, :, y.shape[2] // 2, y.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, images)
    return gradient.abs().sum((0, 1))


def picture_of_field(args: argparse.Namespace) -> Figure:
    """The receptive field of the centre, over the image that was given first."""
    subject = load_subject(args)
    size = subject.size or (224, 224)
    pictures = [load_image(path, size) for path in args.image]
    if pictures:
        images = torch.cat([subject.prepare(picture) for picture in pictures])
    else:
        images = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
    field = receptive_field(subject, images, args.stage)
    figure = Figure(figsize=(4.8 * (1 + bool(pictures)), 4.1 * size[0] / size[1] + 0.6), layout="constrained")
    *left, ax = figure.subplots(1, 1 + bool(pictures), squeeze=False)[0]
    if left:
        _show(
            left[0], pictures[0], pictures[0].info["title"].replace("image", "first image" if pictures[1:] else "image")
        )
    drawn = ax.imshow((field / field.max()).numpy(), norm=PowerNorm(0.25, vmin=0, vmax=1), cmap="magma")
    figure.colorbar(drawn, ax=ax, label="gradient, largest = 1", shrink=0.8)
    half, most = (_side(field, share) for share in (0.5, 0.95))
    ax.set_title(f"half of it within {half} x {half} pixels, 95 % within {most} x {most}", fontsize=9)
    ax.set_axis_off()
    what = f"{len(pictures)} image{'s' if len(pictures) > 1 else ''}" if pictures else "noise"
    which = "last map" if args.stage == -1 else f"map {args.stage}"
    figure.suptitle(f"{subject.title}\nreceptive field of the centre of the {which}, {what}", fontsize=10)
    return figure


def _side(field: Tensor, share: float) -> int:
    """Side of the smallest square around the centre that holds a share of the field."""
    height, width = field.shape
    rows, columns = (torch.arange(n) - n // 2 for n in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    by_distance = torch.zeros(int(distance.max()) + 1).index_add(0, distance.flatten(), field.flatten())
    return 2 * int((by_distance.cumsum(0) < share * field.sum()).sum()) + 1


def picture_of_attention(args: argparse.Namespace) -> Figure:
    """Receptive field of one place in a scan, order by order, and of all orders together."""
    subject = load_subject(args)
    picture = _only_image(args, subject)
    with recorded_scans(subject.module) as scans:
        subject.maps(subject.prepare(picture))
    scan = _chosen(scans, args)
    height, width = scan.grid
    row, column = ((place * n // 100) for place, n in zip(args.at, scan.grid, strict=True))
    weights = hidden_attention(scan, [scan.token(row, column)])[:, 0].abs().mean(-1)  # (k, l)
    maps = scan.to_map(weights)
    titles = [f"order {k + 1}" for k in range(len(maps))]
    if len(maps) > 1:
        maps, titles = torch.cat([maps.sum(0, keepdim=True), maps]), ["all orders", *titles]
    figure = Figure(figsize=(2.6 * (len(maps) + 1), 2.6 * picture.height / picture.width + 0.6), layout="constrained")
    axes = figure.subplots(1, len(maps) + 1)
    _show(axes[0], picture, picture.info["title"])
    grey = picture.convert("L")
    for ax, values, title in zip(axes[1:], maps, titles, strict=True):
        _show(ax, grey, title)
        drawn = ax.imshow(
            (values / maps.max()).numpy(), norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="inferno", alpha=0.75,
            extent=(0, picture.width, picture.height, 0), interpolation="nearest",
        )  # fmt: skip
    for ax in axes:
        ax.plot((column + 0.5) / width * picture.width, (row + 0.5) / height * picture.height, "+", color="cyan", ms=9)
    figure.colorbar(drawn, ax=list(axes), label="mean |weight|, largest = 1", shrink=0.7)
    where = f"cell ({row}, {column}) of {height} x {width}"
    figure.suptitle(f"{subject.title}\nwhat reaches {where} in {scan.name}", fontsize=10)
    return figure


def _chosen(scans: list[RecordedScan], args: argparse.Namespace) -> RecordedScan:
    if not scans:
        raise ValueError(f"{args.model} has no scan")
    if args.layer is None:
        return scans[len(scans) // 2]
    found = [scan for scan in scans if f"{scan.name}.".startswith(f"{args.layer}.")]
    if len(found) == 1:
        return found[0]
    names = ", ".join(scan.name for scan in found or scans)
    raise ValueError(f"--layer: got {args.layer!r}, expected one of {names}")


def picture_of_features(args: argparse.Namespace) -> Figure:
    """Norm and principal components of up to four maps."""
    subject = load_subject(args)
    picture = _only_image(args, subject)
    maps = [x[0].float() for x in subject.maps(subject.prepare(picture))]
    chosen = sorted({round(i * (len(maps) - 1) / 3) for i in range(4)})
    height = 4.8 * picture.height / picture.width + 0.6
    figure = Figure(figsize=(2.5 * (len(chosen) + 1), height), layout="constrained")
    axes = figure.subplots(2, len(chosen) + 1)
    _show(axes[0, 0], picture, picture.info["title"])
    axes[1, 0].set_axis_off()
    for i, (norm_ax, color_ax) in zip(chosen, axes[:, 1:].T, strict=True):
        x = maps[i]
        norm_ax.imshow(x.norm(dim=0).numpy(), cmap="magma")
        norm_ax.set_title(f"map {i}: {x.shape[0]} channels, {x.shape[1]} x {x.shape[2]}", fontsize=9)
        color_ax.imshow(_principal_components(x).numpy())
        for ax in (norm_ax, color_ax):
            ax.set_axis_off()
    for ax, text in zip(axes[:, 1], ("length", "principal components"), strict=True):
        ax.text(-0.04, 0.5, text, transform=ax.transAxes, rotation=90, va="center", ha="right", fontsize=9)
    figure.suptitle(f"{subject.title}\nfeature maps", fontsize=10)
    return figure


def picture_of_tokens(args: argparse.Namespace) -> Figure:
    """The patches that are left behind each reduction: dropped ones faded, merged ones in their mean colour."""
    subject = load_subject(args)
    picture = _only_image(args, subject)
    if args.keep is not None or args.merge is not None or plain_backbone(subject.module).token_reduction is None:
        merging = args.merge is not None
        reduce_tokens(subject.module, args.merge if merging else args.keep, "merge" if merging else "prune")
    reduction = plain_backbone(subject.module).token_reduction
    steps = left_tokens(subject.module, subject.prepare(picture))
    if not steps:
        raise ValueError("--keep, --merge: nothing is removed, so there is nothing to draw")
    chosen = sorted({round(i * (len(steps) - 1) / 2) for i in range(3)})
    figure = Figure(figsize=(3.2 * (1 + len(chosen)), 3.2 * picture.height / picture.width + 0.7), layout="constrained")
    axes = figure.subplots(1, 1 + len(chosen))
    height, width = steps[0].grid
    _show(axes[0], picture, f"all {height * width} patches")
    for ax, i in zip(axes[1:], chosen, strict=True):
        step = steps[i]
        title = f"from block {step.block}: {step.cells.shape[1]} left"
        _show(ax, _of_left_tokens(picture, step, reduction.mode == "merge"), title)
    how = "merged as in R-MeeTo" if reduction.mode == "merge" else f"pruned by {reduction.score!r}, as in ToP-ViM"
    figure.suptitle(f"{subject.title}\ntokens {how}", fontsize=10)
    return figure


def _of_left_tokens(picture: Image.Image, step: LeftTokens, merged: bool) -> Image.Image:
    """The picture with dropped patches faded, or merged ones in the mean colour of all that are merged together."""
    height, width = step.grid
    rows, columns = (torch.arange(n) * cells // n for n, cells in ((picture.height, height), (picture.width, width)))
    cell = rows[:, None] * width + columns  # of each pixel
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float()
    if merged:
        group = step.owner[0][cell].flatten()
        count = torch.zeros(step.cells.shape[1]).index_add(0, group, torch.ones(len(group)))
        colour = torch.zeros(len(count), 3).index_add(0, group, pixels.flatten(0, 1)) / count[:, None]
        return Image.fromarray(colour[group].view_as(pixels).byte().numpy())
    kept = torch.zeros(height * width, dtype=torch.bool).index_fill(0, step.cells[0], True)
    faded = 255 - (255 - pixels) * 0.15
    return Image.fromarray(torch.where(kept[cell].unsqueeze(-1), pixels, faded).byte().numpy())


def _principal_components(x: Tensor) -> Tensor:
    """The first three components of a map (c, h, w) as colours (h, w, 3) in 0..1."""
    tokens = x.flatten(1).T
    tokens = tokens - tokens.mean(0)
    components = torch.linalg.svd(tokens, full_matrices=False).U[:, :3]
    components = torch.nn.functional.pad(components, (0, 3 - components.shape[1]))
    low, high = components.amin(0), components.amax(0)
    return ((components - low) / (high - low).clamp(min=1e-9)).unflatten(0, x.shape[1:])


def _only_image(args: argparse.Namespace, subject: Subject) -> Image.Image:
    if len(args.image) != 1:
        raise ValueError(f"--image: got {len(args.image)} images, expected one")
    return load_image(args.image[0], subject.size)


def _show(ax: Axes, picture: Image.Image, title: str) -> None:
    ax.imshow(picture, cmap="grey", extent=(0, picture.width, picture.height, 0))
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="orders|field|attention|features|tokens", dest="command")
    for name, picture in PICTURES.items():
        command = commands.add_parser(name, help=picture.__doc__)
        what = "a pattern, " if name == "orders" else ""
        command.add_argument("model", metavar="MODEL", help=f"{what}a name of timm's, or a config")
        unit = "cells of the grid (default: 7 7)" if name == "orders" else "pixels (default: what the model is for)"
        command.add_argument("--size", nargs="+", type=int, metavar="N", help=f"side, or height and width, in {unit}")
        command.add_argument("--out", type=Path, help="a PNG, PDF or SVG (default: <model>_<command>.png)")
        command.add_argument(
            "--checkpoint", metavar="FILE", help="weights, or the work directory of a run; without, they are random"
        )
        command.add_argument("--pretrained", action="store_true", help="download the published weights")
        if name != "orders":
            several = "+" if name == "field" else 1
            command.add_argument("--image", nargs=several, default=[], required=name != "field", metavar="FILE")
        if name == "tokens":
            how = command.add_mutually_exclusive_group()
            how.add_argument("--keep", type=float, metavar="SHARE", help="prune: the share to keep (default: 0.8)")
            how.add_argument("--merge", type=int, metavar="N", help="merge: how many tokens per step")
        if name == "field":
            command.add_argument("--stage", type=int, default=-1, help="which feature map (default: the last)")
        if name == "attention":
            command.add_argument("--layer", help="name of a block or scan in the model (default: the middle scan)")
            command.add_argument(
                "--at",
                nargs=2,
                type=int,
                choices=range(100),
                default=(50, 50),
                metavar=("Y", "X"),
                help="the place that is reached, in percent of height and width (default: 50 50)",
            )
    return parser


def check(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what follows from other arguments.

    Raises:
        ValueError: arguments that no picture can be drawn with.
    """
    if args.size and (len(args.size) > 2 or min(args.size) < 1):
        raise ValueError(f"--size: got {args.size}, expected a side, or height and width, of at least 1")
    args.size = (args.size[0], args.size[-1]) if args.size else None
    args.out = args.out or Path(f"{Path(args.model).stem}_{args.command}.png")
    if reason := unwritable(args.out, *PICTURE_SUFFIXES):
        raise ValueError(f"--out: {reason}")
    return args


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw one picture; returns the exit status."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        args = check(args)
        with torch.no_grad():
            figure = PICTURES[args.command](args)
        write_picture(figure, args.out, dpi=130)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


PICTURES: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "orders": picture_of_orders,
    "field": picture_of_field,
    "attention": picture_of_attention,
    "features": picture_of_features,
    "tokens": picture_of_tokens,
}
