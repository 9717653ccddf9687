"""Times the selective scan and whole models: ratios from one interleaved run, medians, conditions stated.

    ssm-backbones benchmark limits                    what this machine can do, and the floor of every shape
    ssm-backbones benchmark op                        every backend against a textbook loop and the floor
    ssm-backbones benchmark model vim_tiny            images per second beside timm's own models
    ssm-backbones benchmark tokens vim_tiny           what fewer tokens save on a CPU (backbones.reduce_tokens)
    ssm-backbones benchmark gpu vim_tiny              launches, host time, throughput: eager mode and CUDA graphs
    ssm-backbones benchmark host vim_tiny             of these, launches and host time alone
    ssm-backbones benchmark dense configs/coco/*_1x_* a training step of detectors and segmentors: time, peak memory
    ssm-backbones benchmark scaling vim_tiny          training on two GPUs (--gpus) against one
    ssm-backbones benchmark training CONFIG           the whole training command against its loader and a bare loop

Whatever fails parity is not timed. With --csv, the rows are also written to a file whose header states the
conditions; what is measured so far stands there if the command is ended before its time.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import backbones  # noqa: F401  (registers the models in timm)
from backbones.commands.bench.gpu import bench_gpu, bench_host
from backbones.commands.bench.measure import ParityError, Rows, conditions
from backbones.commands.bench.models import COMPANIONS, KINDS, bench_model
from backbones.commands.bench.operator import bench_limits, bench_op
from backbones.commands.bench.scaling import MODES, bench_scaling
from backbones.commands.bench.shapes import SHAPES
from backbones.commands.bench.tokens import bench_tokens
from backbones.commands.outputs import unwritable, unwritable_folder
from backbones.ops import native
from backbones.suggest import did_you_mean

console = Console()


def show(rows: Rows, facts: dict[str, object]) -> None:
    """The rows as tables under their conditions."""
    console.print("; ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
    for title, group in _tables(rows).items():
        columns = [x for x in group[0] if any(row[x] is not None for row in group)]  # an empty column takes room
        table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
        for column in columns:
            text = isinstance(group[0][column], str)
            table.add_column(column, justify="left" if text else "right", no_wrap=text)
        for row in group:
            table.add_row(*(_text(row[column]) for column in columns))
        console.print(table)


def _tables(rows: Rows) -> dict[str, Rows]:
    """Rows by title, without what it says: a table for each shape of the operator or of the images, and for inference
    and training of models, narrow enough for a terminal.
    """
    tables: dict[str, Rows] = {}
    for row in rows:
        if "shape" in row:
            rest = {column: value for column, value in row.items() if column not in ("shape", "of")}
            tables.setdefault(f"{row['shape']}: {row['of']}", []).append(rest)
        elif "images" in row:
            rest = {column: value for column, value in row.items() if column != "images"}
            tables.setdefault(f"{row['images']} pixels", []).append(rest)
        elif f"{KINDS[0]} img/s" in row:
            for kind in KINDS:
                of_kind = {x.removeprefix(f"{kind} "): value for x, value in row.items() if x.startswith(f"{kind} ")}
                tables.setdefault(kind, []).append({"model": row["model"], **of_kind})
        else:
            tables.setdefault("", []).append(row)
    return tables


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write_csv(path: Path, rows: Rows, facts: dict[str, object]) -> None:
    """The rows, under comment lines with their conditions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in facts.items())
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="limits|op|model|tokens|gpu|host|dense|scaling|training")
    limits = commands.add_parser("limits", help="measure this machine's limits")
    limits.set_defaults(run=bench_limits)
    op = commands.add_parser("op", help="time the operator's backends")
    op.set_defaults(run=bench_op)
    op.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["a", "b1", "c3"], metavar="NAME", help=", ".join(SHAPES)
    )
    op.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    op.add_argument("--memory", action="store_true", help="also measure peaks of memory, each in a process of its own")
    model = commands.add_parser("model", help="time whole models")
    model.set_defaults(run=bench_model)
    model.add_argument("names", nargs="+")
    model.add_argument("--against", nargs="+", default=list(COMPANIONS), metavar="NAME", help="models of timm")
    model.add_argument("--size", type=_positive, default=224, help="side of the images in pixels")
    model.add_argument("--batch", type=_positive, default=8)
    model.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    model.add_argument("--amp", action="store_true", help="bfloat16 autocast, and against float32")
    tokens = commands.add_parser("tokens", help="time plain models with fewer and fewer tokens, on a CPU")
    tokens.set_defaults(run=bench_tokens)
    tokens.add_argument("names", nargs="+")
    tokens.add_argument("--sizes", nargs="+", type=_positive, default=[224, 512], help="sides of the images in pixels")
    tokens.add_argument(
        "--batch", type=_positive, default=8, help="images of 224 pixels; as many pixels at other sizes"
    )
    gpu = commands.add_parser("gpu", help="count launches and time models on a GPU, in eager mode and with CUDA graphs")
    gpu.set_defaults(run=bench_gpu, device="cuda", dtype="bfloat16 autocast")
    host = commands.add_parser("host", help="count launches, and time the host that makes them")
    host.set_defaults(run=bench_host, device="cuda", dtype="bfloat16 autocast")
    for command in (gpu, host):
        command.add_argument("names", nargs="+", help="models of this library, and of timm for comparison")
        command.add_argument("--size", type=_positive, default=224, help="side of the images in pixels")
    gpu.add_argument("--batch", type=_positive, default=128, help="images per batch for throughput and memory")
    dense = commands.add_parser("dense", help="time a training step of detectors and segmentors, as configs say")
    dense.set_defaults(run=_bench_dense, dtype="bfloat16 autocast")
    dense.add_argument("configs", nargs="+", help="files of configs/coco and configs/ade20k")
    dense.add_argument("--size", nargs=2, type=_positive, metavar=("HEIGHT", "WIDTH"), help="default: the config's")
    dense.add_argument("--batch", type=_positive, help="images per step (default: the config's, per GPU)")
    dense.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    scaling = commands.add_parser("scaling", help="time data-parallel training on several GPUs against one of them")
    scaling.set_defaults(run=bench_scaling, dtype="bfloat16 autocast")
    scaling.add_argument("names", nargs="+", help="models of this library or of timm")
    scaling.add_argument("--gpus", type=_positive, default=2)
    scaling.add_argument(
        "--modes", nargs="+", choices=MODES, metavar="MODE", help=f"{', '.join(MODES)} (default: the first two)"
    )
    scaling.add_argument("--size", type=_positive, default=224, help="side of the images in pixels")
    scaling.add_argument("--batch", type=_positive, default=128, help="images per step and GPU")
    scaling.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    training = commands.add_parser("training", help="time the training command with its loader, on made JPEG files")
    training.set_defaults(run=_bench_training, dtype="bfloat16 autocast")
    training.add_argument("config", help="of a classifier, such as vmamba-tiny-s1l8_8xb128_in1k")
    training.add_argument("--workers", nargs="+", type=_positive, default=[8], help="data loading processes")
    training.add_argument("--modes", nargs="+", choices=MODES[:2], metavar="MODE", help=f"{', '.join(MODES[:2])}")
    training.add_argument("--batch", type=_positive, help="images per step (default: the config's, per GPU)")
    training.add_argument("--steps", type=_positive, default=50, help="timed steps")
    training.add_argument("--loader-only", action="store_true", help="train nothing: what the images cost")
    training.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    training.add_argument("--cfg-options", nargs="+", action=_Options, metavar="KEY=VALUE", help="change the config")
    for command in (limits, op, model, tokens, gpu, host, dense, scaling, training):
        command.add_argument("--threads", type=_positive, default=1)
        command.add_argument("--rounds", type=_positive, default=7, help="timed repetitions of each contestant")
        command.add_argument("--csv", type=Path, help="also write the rows to this file, as they come")
    return parser.parse_args(arguments)


def _bench_dense(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    from backbones.commands.bench.dense import bench_dense  # only this one needs OpenMMLab

    return bench_dense(args, progress)


def _bench_training(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    from backbones.commands.bench.training import bench_training

    return bench_training(args, progress)


class _Options(argparse.Action):
    """mmengine's, which the other benchmarks do without."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest, nargs=self.nargs)(parser, *arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def keep_freed_memory() -> None:
    """Starts the program again with an allocator that reuses what was freed, for all contestants alike.

    Otherwise glibc returns large blocks to the system, and the page faults of getting them back dominate the figures.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if sys.platform == "linux" and not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one benchmark; 2 where something cannot be timed."""
    args = parse_args(argv, prog)
    if args.run is bench_limits and native.unavailable_reason() is not None:
        print(f"limits: {native.unavailable_reason()}", file=sys.stderr)
        return 2
    names = (*getattr(args, "names", ()), *getattr(args, "against", ()))
    if unknown := [name for name in names if not timm.is_model(name)]:
        print(f"unknown model {unknown[0]!r}{did_you_mean(unknown[0], timm.list_models())}", file=sys.stderr)
        return 2
    if args.csv is not None and (reason := unwritable_folder(args.csv.parent) or unwritable(args.csv)):
        print(f"--csv: {reason}", file=sys.stderr)
        return 2
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    rows: Rows = []
    facts: dict[str, object] = {}
    status, errors = 0, Console(stderr=True)
    try:
        with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
            for rows in args.run(args, progress):
                facts = facts or conditions(args)  # before the file is written: that may change the tree of the commit
                if args.csv:
                    write_csv(args.csv, rows, facts)
    except ParityError as error:
        print(error, file=sys.stderr)
        status = 2
    if rows:
        show(rows, facts)
    return status
