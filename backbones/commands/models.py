"""List the models: their cost, what their authors report, and whether there are weights.

    ssm-backbones models
    ssm-backbones models --task coco --max-params 30
    ssm-backbones models --family vmamba --configs

params     millions of parameters of the classifier
GFLOPs     of an image of the size that the model was published for, the scans included; measured by this library
top-1      ImageNet-1k, percent
box, mask  AP on COCO, of Mask R-CNN, schedule 1x
mIoU       on ADE20K, of UPerNet, at one scale
weights    of the classifier: downloaded with --pretrained (yes), from a page by hand (page), or none

Accuracies are those that the authors report; an empty cell means that they report none. Where the output is not a
terminal, tabs separate the cells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from backbones import configs, zoo
from backbones.models import family_names
from backbones.suggest import did_you_mean


class Row(NamedTuple):
    """What is listed of one model; None where nothing is known."""

    family: str
    model: str
    params: float
    gflops: float
    top1: float | None
    box_ap: float | None
    mask_ap: float | None
    miou: float | None
    weights: str | None


HEADER = ("family", "model", "params", "GFLOPs", "top-1", "box", "mask", "mIoU", "weights")
TASKS = {"imagenet": "top1", "coco": "box_ap", "ade20k": "miou"}  # a task's figure that models are sorted by


def rows() -> Iterator[Row]:
    """Every model of the zoo, family by family."""
    measured = zoo.load_measured()["models"]
    for family in family_names(guests=True):
        content = zoo.load_family(family)
        for name, facts in content["models"].items():
            reported = facts.get("reported", {})
            coco = zoo.dense_result(reported.get("coco", []), "Mask R-CNN") or {}
            ade = zoo.dense_result(reported.get("ade20k", []), "UPerNet") or {}
            yield Row(
                content["title"],
                name,
                facts["parameters"] / 1e6,
                measured[name]["compute"]["flops"] / 1e9,
                reported.get("imagenet", {}).get("top1"),
                coco.get("box_ap"),
                coco.get("mask_ap"),
                ade.get("miou"),
                _weights(facts.get("weights", {})),
            )


def _weights(given: dict[str, Any]) -> str | None:
    if "hf_hub_id" in given or "url" in given:
        return "yes"
    return "page" if "page" in given else None


def cells(row: Row) -> list[str]:
    """One text for each column, empty where nothing is known."""
    digits = {"params": 1, "gflops": 2, "top1": 1, "box_ap": 1, "mask_ap": 1, "miou": 1}
    return [
        "" if value is None else f"{value:.{digits[name]}f}" if name in digits else str(value)
        for name, value in row._asdict().items()
    ]


def show(found: Sequence[Row]) -> None:
    """A table on a terminal; elsewhere lines with tabs."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        for line in (HEADER, *map(cells, found)):
            print("\t".join(line))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in HEADER[1:]:  # a model's name tells its family, and the table fits 80 columns
        table.add_column(title, justify="left" if title in ("model", "weights") else "right", no_wrap=True)
    for row in found:
        table.add_row(*cells(row)[1:])
    console.print(table)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, help="models with a result there, the best first")
    parser.add_argument("--family", metavar="NAME", help="of one family, such as vmamba")
    parser.add_argument("--max-params", type=float, metavar="M", help="at most so many millions of parameters")
    parser.add_argument("--max-gflops", type=float, metavar="G", help="at most so many GFLOPs")
    parser.add_argument("--pretrained", action="store_true", help="only those whose weights can be downloaded")
    parser.add_argument("--configs", action="store_true", help="instead print the names of configs with these models")
    args = parser.parse_args(argv)

    found = list(rows())
    if args.family:
        titles = {name: zoo.load_family(name)["title"] for name in family_names(guests=True)}
        wanted = args.family.lower().replace("-", "")
        if wanted not in titles:
            near = did_you_mean(wanted, titles)
            print(f"{parser.prog}: error: --family: unknown family {args.family!r}{near}", file=sys.stderr)
            return 2
        found = [row for row in found if row.family == titles[wanted]]
    if args.task:
        figure = TASKS[args.task]
        found = sorted((x for x in found if getattr(x, figure) is not None), key=lambda x: -getattr(x, figure))
    limits = {"params": args.max_params, "gflops": args.max_gflops}
    found = [x for x in found if all(most is None or getattr(x, name) <= most for name, most in limits.items())]
    found = [x for x in found if not args.pretrained or x.weights == "yes"]
    if not found:
        print(f"{parser.prog}: error: there is no such model", file=sys.stderr)
        return 2
    if not args.configs:
        show(found)
        return 0
    for name in names_of_configs([row.model for row in found], args.task):
        print(name)
    return 0


def names_of_configs(models: Sequence[str], task: str | None) -> list[str]:
    """The configs of a public data set with these models, for one task or for all."""
    names = []
    for name, path in configs.by_name().items():
        parts = [part.replace("-", "_") for part in name.split("_")]
        if path.parent.name in ([task] if task else TASKS) and any(model in parts for model in models):
            names.append(name)
    return names
