"""Compare training runs: their curves in one picture, and their last and best values in a table.

    ssm-backbones analyze work_dirs/a work_dirs/b --keys loss lr coco/bbox_mAP

Curves are drawn over iterations or, to compare runs of different batch sizes, --by epoch. Reads every
vis_data/scalars.json that mmengine left in a work directory. Where a run was resumed, the later log counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from backbones.commands.outputs import unwritable
from backbones.images import PICTURE_SUFFIXES
from backbones.mm.app import pictures
from backbones.mm.app.cli import run_tool
from backbones.mm.errors import UserError

Curve = list[tuple[float, float]]  # iterations, counted from 1, or epochs; and values

_NOT_METRICS = re.compile(r"(data_)?time|step|memory|validated/.*")
_DETAILS = re.compile(r".*_mAP_\w+")


def read_run(work_dir: Path, by: str = "iteration") -> dict[str, Curve]:
    """Every scalar of a run over its iterations, those of training before those of validation.

    Args:
        by: "iteration" or "epoch".

    Raises:
        UserError: there is no log in ``work_dir``, it is damaged, or it does not tell how long an epoch is.
    """
    files = sorted(work_dir.glob("*/vis_data/scalars.json")) or sorted(work_dir.glob("vis_data/scalars.json"))
    records: list[dict[str, Any]] = []
    for file in files:
        new = _read_file(file)
        start = min((x["iter"] for x in new if "iter" in x), default=0)
        records = [x for x in records if _iteration(x, records) < start] + new
    if not records:
        raise UserError(f"{work_dir} has no <time>/vis_data/scalars.json with records of a training run")
    length = 1.0 if by == "iteration" else _epoch_length(records, work_dir)
    curves: dict[str, Curve] = {}
    for record in sorted(records, key=lambda x: "iter" not in x):
        for key, value in record.items():
            if key not in ("iter", "epoch") and not _NOT_METRICS.fullmatch(key) and isinstance(value, int | float):
                curves.setdefault(key, []).append((_iteration(record, records) / length, value))
    return curves


def _read_file(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1:
                break  # a run that was killed leaves half a line
            raise UserError(f"{file}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{file}, line {number} is no record of mmengine's: {line[:60]}")
        records.append(record)
    return records


def _iteration(record: dict[str, Any], records: Iterable[dict[str, Any]]) -> int:
    """Iterations done when ``record`` was written; one of validation names the epoch where training counts them."""
    if "iter" in record:
        return record["iter"]
    if "validated/iter" in record:
        return int(record["validated/iter"])
    done = [x["iter"] for x in records if "iter" in x and x.get("epoch", record["step"] + 1) <= record["step"]]
    return max(done, default=record["step"])


def _epoch_length(records: Sequence[dict[str, Any]], work_dir: Path) -> float:
    """Iterations in an epoch: between the first records of two epochs, which stand at the same place in them."""
    first: dict[int, int] = {}
    for record in records:
        if "iter" in record and "epoch" in record:
            first[record["epoch"]] = min(record["iter"], first.get(record["epoch"], record["iter"]))
    if len(first) > 1:
        (start, a), *_, (end, b) = sorted(first.items())
        return (b - a) / (end - start)
    validated = [(x["validated/iter"], x["step"]) for x in records if x.get("validated/iter") and x["step"]]
    if first and validated:
        iteration, epoch = validated[-1]
        return iteration / epoch
    reason = "one epoch only, and no validation" if first else "iterations, and not epochs"
    raise UserError(f"--by epoch: the log in {work_dir} counts {reason}")


def default_keys(runs: Iterable[dict[str, Curve]]) -> list[str]:
    """The loss, and up to three results of validation, those of all runs together."""
    found = dict.fromkeys(key for run in runs for key in run)
    trained = {key for key in found if "loss" in key or "lr" in key or key in ("grad_norm", "acc") or ".acc" in key}
    results = [key for key in found if key not in trained and not _DETAILS.fullmatch(key)]
    return ["loss"] * ("loss" in found) + results[:3]


def best(key: str, curve: Curve) -> tuple[float, float]:
    """The lowest value of a loss or an error, the highest of another scalar."""
    lower = "loss" in key or "error" in key
    return min(curve, key=lambda x: x[1]) if lower else max(curve, key=lambda x: x[1])


def table(runs: dict[str, dict[str, Curve]], keys: Sequence[str], by: str = "iteration") -> str:
    """For each key and run: the last iteration (or epoch) and value, and the best."""
    rows = [("", "run", f"{by}s", "last", "best", "at")]
    for key in keys:
        for name, run in runs.items():
            if key in run:
                (last, value), (at, top) = run[key][-1], best(key, run[key])
                rows.append((key, name, _count(last), f"{value:.4g}", f"{top:.4g}", _count(at)))
            else:
                rows.append((key, name, "-", "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True))
        for row in rows
    )


def _count(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


def draw(runs: dict[str, dict[str, Curve]], keys: Sequence[str], by: str = "iteration") -> Figure:
    """One plot for each key, one line for each run."""
    columns = min(len(keys), 2)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(6 * columns, 3.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    for ax, key in zip(axes[: len(keys)], keys, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            if key in run:
                marker = "o" if len(run[key]) <= 30 else None
                ax.plot(*zip(*run[key], strict=True), color=f"C{number}", marker=marker, markersize=3.5, label=name)
        ax.set(title=key, xlabel=by)
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 4))
    return figure


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR")
    parser.add_argument("--keys", nargs="+", help="scalars to compare (default: the loss and results of validation)")
    parser.add_argument("--by", choices=("iteration", "epoch"), default="iteration", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="a PNG, PDF or SVG (default: %(default)s)")
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Compare the runs."""
    if reason := unwritable(args.out, *PICTURE_SUFFIXES):
        raise UserError(f"--out: {reason}")
    names = [path.resolve().name for path in args.work_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in args.work_dirs]
    runs = {name: read_run(path, args.by) for name, path in zip(names, args.work_dirs, strict=True)}
    keys = args.keys or default_keys(runs.values())
    for key in keys:
        if not any(key in run for run in runs.values()):
            known = ", ".join(sorted({key for run in runs.values() for key in run}))
            raise UserError(f"--keys: no run has {key!r}; there are {known}")
    pictures.save(draw(runs, keys, args.by), args.out)
    print(table(runs, keys, args.by))
    print(args.out)
