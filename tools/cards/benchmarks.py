"""Tables of speed, from the CSV files of ``benchmarks/results``; conditions come from the comments at their top."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .markdown import table

# What the shapes of the GPU benchmark are taken from.
_SHAPES = {
    "a": "a: Vim-Ti, 224 px, batch 128",
    "d": "d: Vim-Ti, 1248 px, batch 1",
    **{f"b1s{i}": f"b1s{i}: VMamba-T s1l8, stage {i}, batch 128" for i in range(1, 5)},
    "b16": "b16: first VMamba-T, stage 1, batch 32",
}
_LAUNCHES = (  # columns of the table of launches, and their titles
    ("launches_inference", "launches, inference"),
    ("launches_training", "training"),
    ("host_inference_ms", "host ms, inference"),
    ("host_training_ms", "training"),
    ("inference_img_s", "images/s, inference"),
    ("training_img_s", "training"),
    ("gpu_training_ms", "GPU ms, training"),
    ("peak_training_mib", "peak MiB, training"),
)


@dataclass(frozen=True)
class Results:
    """A file's rows, and the lines of comment above them."""

    path: Path
    conditions: list[str]
    rows: list[dict[str, str]]

    def need(self, *columns: str) -> None:
        """Raises ValueError where a column is missing."""
        missing = [name for name in columns if not self.rows or name not in self.rows[0]]
        if missing:
            raise ValueError(f"{self.path}: no column {', '.join(missing)}")


def read(path: Path) -> Results:
    """A CSV file whose first lines begin with ``#``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    return Results(path, comments, list(csv.DictReader(line for line in lines if not line.startswith("#"))))


def conditions(files: Iterable[Results], root: Path, prefix: str = "") -> str:
    """The files' own comments, each line once, with links to the files; ``prefix`` leads to ``root``."""
    said: set[str] = set()
    bullets = []
    for file in files:
        new = [line for line in file.conditions if line not in said]
        said.update(new)
        link = f"[{file.path.name}]({prefix}{file.path.relative_to(root).as_posix()})"
        bullets.append(f"- {link}{': ' if new else ''}{'; '.join(new)}")
    return "\n".join(bullets)


def cpu_table(results: Results) -> str:
    """The ``cpu`` backend's times, and how many times longer the others take."""
    forward, both = "forward ms", "forward + backward ms"
    results.need("shape", "of", "backend", forward, both)
    by_shape: dict[str, dict[str, dict[str, str]]] = {}
    for row in results.rows:
        by_shape.setdefault(row["shape"], {})[row["backend"]] = row
    rows = []
    for backends in by_shape.values():
        cpu = backends["cpu"]
        cells = [f"{_times(backends, name, column)}" for column in (forward, both) for name in ("textbook", "naive")]
        rows.append([cpu["of"], cpu[forward], cells[0], cells[1], cpu[both], cells[3]])
    header = ["shape", "forward, ms", "textbook loop", "`naive`", "forward + backward, ms", "`naive`"]
    return table(header, rows)


def _times(backends: dict[str, dict[str, str]], name: str, column: str) -> str:
    """How many times as long another backend takes."""
    other = backends.get(name, {}).get(column)
    return f"{float(other) / float(backends['cpu'][column]):.3g}x" if other else ""


def gpu_scan_table(files: Iterable[Results]) -> str:
    """The ``triton`` backend beside the official CUDA kernels, bfloat16, one output for each order."""
    rows: dict[str, list[str]] = {}
    for results in files:
        ours = ("forward_ms", "forward_backward_ms")
        official = tuple(f"official_{name}" for name in ours)
        results.need("shape", "dtype", "out", "deterministic", *ours, *official)
        for row in results.rows:
            if (row["dtype"], row["out"], row["deterministic"]) == ("bf16", "per_order", "False"):
                pairs = [(row[mine], row[theirs]) for mine, theirs in zip(ours, official, strict=True)]
                cells = [(mine, theirs, f"{float(theirs) / float(mine):.1f}x") for mine, theirs in pairs]
                rows[row["shape"]] = [_SHAPES.get(row["shape"], row["shape"]), *cells[0], *cells[1]]
    header = ["shape", "forward, ms", "official", "ratio", "forward + backward, ms", "official", "ratio"]
    named = [shape for shape in _SHAPES if shape in rows]
    return table(header, [rows[shape] for shape in (*named, *sorted(rows.keys() - set(named)))])


def gpu_model_table(results: Results, originals: Results) -> str:
    """Images a second of whole models, launched from Python and as a CUDA graph, and of the originals."""
    speeds = ("inference_img_s", "training_img_s")
    results.need("model", *speeds, *(f"graph_{name}" for name in speeds), "training_peak_mib")
    originals.need("model", *speeds, "training_peak_mib")
    official = {row["model"]: row for row in originals.rows}
    rows = []
    for row in results.rows:
        other = official.get(row["model"], {})
        cells = [x for name in speeds for x in (row[name], row[f"graph_{name}"], other.get(name))]
        rows.append([f"`{row['model']}`", *cells, row["training_peak_mib"], other.get("training_peak_mib")])
    header = ["model"]
    for what in ("inference", "training"):
        header += [f"{what}, images/s", "as a graph", "original"]
    return table([*header, "peak of training, MiB", "original"], rows)


def gpu_launches_table(results: Results) -> str:
    """Launches, the host's time and images per second of whole models, in eager mode and with CUDA graphs."""
    results.need("model", "mode", *(name for name, _ in _LAUNCHES))
    rows = [[f"`{row['model']}`", row["mode"], *(row[name] for name, _ in _LAUNCHES)] for row in results.rows]
    return table(["model", "mode", *(title for _, title in _LAUNCHES)], rows)


def summary_table(cpu: Results, cpu_long: Results, gpu: Results) -> str:
    """Images per second of two models over those of timm's, in inference and in training."""
    rows = []
    for results, what in ((cpu, "CPU, batch 8"), (cpu_long, "CPU, 1248 x 1248 pixels, batch 1")):
        for row in results.rows:
            for model, other in (("vmamba_tiny_s1l8", "swin"), ("vim_tiny", "deit")):
                if row["model"] == model:
                    ratios = (f"{float(row[f'{kind} over {other}']):.2f}" for kind in ("inference", "training"))
                    rows.append([f"`{model}` over `{other}_tiny`", what, *ratios])
    found = {(row["model"], row["mode"]): row for row in gpu.rows}
    swin = found["swin_tiny_patch4_window7_224", "eager"]
    for mode, what in (
        ("eager", "H100, bfloat16, batch 128"),
        ("graphs", "the same, with CUDA graphs; `swin_tiny` without"),
    ):
        ours = found["vmamba_tiny_s1l8", mode]
        ratios = (f"{float(ours[name]) / float(swin[name]):.2f}" for name in ("inference_img_s", "training_img_s"))
        rows.append(["`vmamba_tiny_s1l8` over `swin_tiny`", what, *ratios])
    return table(["images per second", "where", "inference", "training"], rows)


def gpu_compiled_table(results: Results, originals: Results) -> str:
    """Images a second of models under ``torch.compile``, and how many times as many as the originals'."""
    speeds = ("inference_img_s", "training_img_s")
    results.need("model", "mode", *speeds, "batch1_ms")
    official = {row["model"]: row for row in originals.rows}
    rows = []
    for row in results.rows:
        if row["mode"] == "graphs":
            other = official.get(row["model"])
            cells = [
                (f"{float(row[x]):.0f}", f"{float(row[x]) / float(other[x]):.2g}x" if other else "") for x in speeds
            ]
            rows.append([f"`{row['model']}`", *cells[0], *cells[1], f"{float(row['batch1_ms']):.2g}"])
    header = ["model", "inference, images/s", "over the original", "training, images/s", "over the original"]
    return table([*header, "one image, ms"], rows)


def cpu_model_table(results: Results) -> str:
    """Images a second of whole models on a CPU, and how many times as many as models of timm."""
    results.need("model", "inference img/s", "training img/s")
    row = results.rows[0]
    others = [name.removeprefix("inference over ") for name in row if name.startswith("inference over ")]
    kinds = ("inference", "training")
    header = ["model", *(x for kind in kinds for x in (f"{kind}, images/s", *(f"over {other}" for other in others)))]
    rows = [
        [
            f"`{row['model']}`",
            *(row[x] for kind in kinds for x in (f"{kind} img/s", *(f"{kind} over {o}" for o in others))),
        ]
        for row in results.rows
    ]
    return table(header, rows)
