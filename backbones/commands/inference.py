"""Show what a trained model finds in images, from its config and checkpoint.

    ssm-backbones inference 7.png --checkpoint work_dirs/vim-tiny_digits
    ssm-backbones inference 7.png --config vim-tiny_digits --checkpoint vim-tiny.pth

Prints one line per image and writes OUT/<image>.png: the most likely classes, boxes and masks, or the label map.
For one image, OUT may also be the name of a picture, such as figure.pdf; --format pdf writes many.
The work directory of a training run stands for its config and its best checkpoint.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.config import DictAction

from backbones.commands.outputs import unwritable, unwritable_folder
from backbones.images import PICTURE_SUFFIXES
from backbones.mm.app import pictures
from backbones.mm.app.cli import read_config, run_tool
from backbones.mm.app.inference import Predictor, load_predictor, read_image
from backbones.mm.engine.report import find_best
from backbones.mm.errors import UserError

_WIDTH = 6.5  # of a picture, in inches: a page between its margins


def show(predictor: Predictor, path: Path, args: argparse.Namespace) -> tuple[str, Figure]:
    """Prediction for one image, in words and as a picture."""
    image = read_image(path)
    result = predictor(path)
    figure = Figure(figsize=(_WIDTH, _WIDTH * image.height / image.width), layout="constrained")
    if predictor.task == "classification":
        scores, labels = (x.tolist() for x in result.topk(min(args.topk, len(predictor.classes))))
        found = [(predictor.classes[label], score) for label, score in zip(labels, scores, strict=True)]
        _draw_scores(figure, image, found)
        return ", ".join(f"{name} {score:.3f}" for name, score in found), figure
    ax = figure.subplots()
    ax.imshow(image)
    ax.set_axis_off()
    if predictor.task == "detection":
        found = result.pred_instances
        found = found[found.scores >= args.score]
        pictures.draw_instances(ax, found, predictor.colors)
        counts = Counter(predictor.classes[label] for label in found.labels.tolist())
        return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "nothing", figure
    labels = result.pred_sem_seg.data.squeeze().cpu().numpy()
    pictures.draw_labels(ax, result.pred_sem_seg, predictor.colors)
    shares = sorted(zip(*np.unique(labels, return_counts=True), strict=True), key=lambda x: -x[1])
    predictor.colors.add_legend(figure, (int(label) for label, _ in shares))
    return ", ".join(f"{predictor.classes[label]} {count / labels.size:.1%}" for label, count in shares), figure


def _draw_scores(figure: Figure, image: Any, found: list[tuple[str, float]]) -> None:
    figure.set_size_inches(_WIDTH, 2.9)
    picture, bars = figure.subplots(1, 2)
    picture.imshow(image)
    picture.set_axis_off()
    bars.barh(range(len(found)), [score for _, score in found], color="tab:blue", height=0.6)
    bars.set_yticks(range(len(found)), [name for name, _ in found])
    bars.set(xlim=(0, 1), xlabel="probability")
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--config",
        help="a file, or the name of a config that comes with the package (default: that of the work directory)",
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or the work directory of a training run")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder, or a PNG, PDF or SVG (default: %(default)s)"
    )
    parser.add_argument("--format", choices=[x[1:] for x in PICTURE_SUFFIXES], help="of pictures (default: png)")
    parser.add_argument("--score", type=float, default=pictures.SCORE, help="of boxes at least (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=5, help="classes of an image (default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="bfloat16, where `ssm-backbones doctor` says that it pays")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Show every image."""
    if args.config is None and not Path(args.checkpoint).is_dir():
        raise UserError(f"--config is missing; only the work directory of a run goes without it, got {args.checkpoint}")
    args.config = args.config or args.checkpoint
    single = args.out.suffix in PICTURE_SUFFIXES and not args.out.is_dir()
    if single and len(args.images) > 1:
        raise UserError(
            f"--out: got {args.out} for {len(args.images)} images, expected a folder; --format chooses the end"
        )
    if single and args.format:
        raise UserError(f"--format: the name {args.out} states the format")
    repeated = [name for name, count in Counter(path.stem for path in args.images).items() if count > 1]
    if repeated:
        raise UserError(f"several images are called {repeated[0]}, and so would their pictures in {args.out}")
    if reason := unwritable(args.out) if single else unwritable_folder(args.out):
        raise UserError(f"--out: {reason}")
    for path in args.images:
        read_image(path)
    if args.topk < 1:
        raise UserError(f"--topk: got {args.topk}, expected at least 1")
    config = read_config(args.config, options=args.cfg_options)
    checkpoint = Path(args.checkpoint)
    predictor = load_predictor(config, find_best(checkpoint) if checkpoint.is_dir() else checkpoint)
    predictor = replace(predictor, amp=args.amp)
    if not single:
        args.out.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        text, figure = show(predictor, path, args)
        out = args.out if single else args.out / f"{path.stem}.{args.format or 'png'}"
        pictures.save(figure, out)
        print(f"{path}: {text}  ({out})")
