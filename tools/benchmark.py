"""Times the selective scan and whole models: ratios from one interleaved run, medians, conditions stated.

    python tools/benchmark.py op                        every backend against a textbook loop
    python tools/benchmark.py model vim_tiny            images per second beside timm's own models

Whatever fails parity is not timed. With --csv, the rows are also written to a file whose header states the
conditions.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import backbones
from backbones import ops
from backbones.ops import selective_scan
from backbones.ops.naive import selective_scan_naive

PARITY = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # RMS error over RMS value, against float64
COMPANIONS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny")
console = Console()


@dataclass(frozen=True)
class Shape:
    """A call of the operator as a model makes it."""

    where: str
    b: int
    k: int
    c: int
    length: int
    n: int
    shared_u: bool = True

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        """Inputs in the value ranges of a trained model."""
        b, length, k, c, n = self.b, self.length, self.k, self.c, self.n
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        steps = torch.arange(length)
        return {
            "u": normal(*((b, length, c) if self.shared_u else (b, length, k, c))).to(dtype),
            "delta": normal(b, length, k, c).to(dtype),
            "A": -torch.arange(1.0, n + 1).expand(k, c, n).contiguous(),
            "B": normal(b, length, k, n).to(dtype),
            "C": normal(b, length, k, n).to(dtype),
            "D": normal(k, c),
            "delta_bias": normal(k, c) * 0.7 - 4.5,
            "orders": torch.stack([steps if i % 2 == 0 else steps.flip(0) for i in range(k)]).int(),
        }


SHAPES = {
    "a": Shape("Vim-Ti, 224 px", 8, 2, 384, 197, 16, shared_u=False),
    "b1": Shape("VMamba-T stage 1, ssm_ratio 2", 8, 4, 192, 3136, 1),
    "b1s": Shape("VMamba-T stage 1", 8, 4, 96, 3136, 1),
    "b16": Shape("VMamba-T stage 1, 16 states", 2, 4, 192, 3136, 16),
    "c2": Shape("VMamba-T stage 2, ssm_ratio 2", 8, 4, 384, 784, 1),
    "c3": Shape("VMamba-T stage 3, ssm_ratio 2", 8, 4, 768, 196, 1),
    "c4": Shape("VMamba-T stage 4, ssm_ratio 2", 8, 4, 1536, 49, 1),
    "d": Shape("Vim-Ti, 1248 px", 1, 2, 384, 6084, 16, shared_u=False),
}


class TextbookLoop:
    """The recurrence as papers and public references write it: channels-first, one step after the other.

    B and C are repeated for every channel, as there. The inputs are in visiting order already: the copies that this
    takes are not counted.
    """

    def __init__(self, t: dict[str, Tensor]) -> None:
        orders = t["orders"].long()
        b, length, k, c = t["delta"].shape
        u = t["u"] if t["u"].dim() == 4 else t["u"].unsqueeze(2).expand(b, length, k, c)

        def visited(x: Tensor) -> Tensor:
            return torch.stack([x[:, order, i] for i, order in enumerate(orders)], 1).transpose(2, 3).contiguous()

        self.u, self.delta, self.B, self.C = (visited(x) for x in (u, t["delta"], t["B"], t["C"]))  # (b, k, c or n, t)
        self.A, self.D, self.bias = t["A"], t["D"], t["delta_bias"]

    def __call__(self) -> Tensor:
        """(b, k, c, t)."""
        c = self.u.shape[2]
        B, C = (x.unsqueeze(2).expand(-1, -1, c, -1, -1).contiguous() for x in (self.B, self.C))  # (b, k, c, n, t)
        dt = F.softplus(self.delta + self.bias.unsqueeze(-1))
        decay = torch.exp(torch.einsum("bkct,kcn->bkctn", dt, self.A))
        inputs = torch.einsum("bkct,bkcnt,bkct->bkctn", dt, B, self.u)
        h = torch.zeros_like(inputs[..., 0, :])
        y = []
        for i in range(dt.shape[-1]):
            h = decay[..., i, :] * h + inputs[..., i, :]
            y.append(torch.einsum("bkcn,bkcn->bkc", h, C[..., i]))
        return torch.stack(y, -1) + self.D.unsqueeze(-1) * self.u


def check_parity(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Ends the program unless ``found`` is the function that is to be timed."""
    error = ((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    if not error <= PARITY[dtype]:
        sys.exit(f"{name}: not timed, its relative error of {error:.1e} against float64 exceeds {PARITY[dtype]:.0e}")


def medians(
    contestants: dict[str, Callable[[], object]], rounds: int, progress: Progress, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each contestant; every round runs each of them once, after two rounds of warm-up."""
    # Processor time leaves out what other processes do to a single thread; with more threads it would add them up.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return clock()

    times: dict[str, list[float]] = {name: [] for name in contestants}
    task = progress.add_task(", ".join(contestants), total=(rounds + 2) * len(contestants))
    for _ in range(rounds + 2):
        for name, function in contestants.items():
            start = now()
            function()
            times[name].append(now() - start)
            progress.advance(task)
    progress.remove_task(task)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def bench_op(args: argparse.Namespace, progress: Progress) -> list[dict[str, object]]:
    """Forward, and forward with backward, of every backend that runs here, at the shapes of real models."""
    dtype = getattr(torch, args.dtype)
    backends = [name for name, reason in ops.backends().items() if reason is None and name != "triton"]
    rows = []
    for key in args.shapes:
        shape = SHAPES[key]
        tensors = shape.tensors(dtype)
        loop = TextbookLoop({name: x.float() if x.is_floating_point() else x for name, x in tensors.items()})
        exact: dict[str, Any] = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        expected = selective_scan_naive(**exact)
        check_parity("textbook", loop(), TextbookLoop(exact)(), torch.float32)
        forward: dict[str, Callable[[], object]] = {"textbook": loop}
        both: dict[str, Callable[[], object]] = {}
        for backend in backends:
            check_parity(backend, selective_scan(**tensors, backend=backend), expected, dtype)
            forward[backend] = partial(selective_scan, **tensors, backend=backend)
            leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
            both[backend] = partial(_forward_and_backward, leaves, backend)
        with torch.no_grad():
            seconds = medians(forward, args.rounds, progress)
        seconds_both = medians(both, args.rounds, progress)
        for name in forward:
            rows.append(
                {
                    "shape": key,
                    "of": shape.where,
                    "backend": name,
                    "forward ms": seconds[name] * 1e3,
                    "times textbook": seconds["textbook"] / seconds[name],
                    "forward + backward ms": seconds_both[name] * 1e3 if name in both else None,
                    "times naive": seconds_both["naive"] / seconds_both[name] if name in both else None,
                }
            )
    return rows


def _forward_and_backward(tensors: dict[str, Any], backend: str) -> None:
    selective_scan(**tensors, backend=backend).sum().backward()


def bench_model(args: argparse.Namespace, progress: Progress) -> list[dict[str, object]]:
    """Inference and training steps of whole models beside timm's."""
    names = [*args.names, *COMPANIONS]
    sized = {name: {"img_size": args.size} for name in names if name.startswith(("vim", "lbvim", "deit", "swin"))}
    models = {name: timm.create_model(name, **sized.get(name, {})).to(args.device) for name in names}
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    for name in args.names:
        check_model(name, models[name], images[:1], sized.get(name, {}))
    autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.amp)

    def infer(name: str) -> None:
        with torch.no_grad(), autocast():
            models[name].eval()(images)

    def train(name: str) -> None:
        with autocast():
            outputs = models[name].train()(images)
        sum(x.float().square().mean() for x in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        models[name].zero_grad()

    seconds = medians({name: partial(infer, name) for name in names}, args.rounds, progress, args.device)
    seconds_train = medians({name: partial(train, name) for name in names}, args.rounds, progress, args.device)
    return [
        {
            "model": name,
            "inference img/s": args.batch / seconds[name],
            **{f"x {other.split('_')[0]}": seconds[other] / seconds[name] for other in COMPANIONS[:2]},
            "training img/s": args.batch / seconds_train[name],
            **{f"x {other.split('_')[0]} ": seconds_train[other] / seconds_train[name] for other in COMPANIONS[:2]},
        }
        for name in names
    ]


@torch.no_grad()
def check_model(name: str, model: torch.nn.Module, image: Tensor, options: dict[str, Any]) -> None:
    """Ends the program unless the model computes what it does on the naive backend."""
    reference = timm.create_model(name, scan_backend="naive", **options).to(image.device)
    reference.load_state_dict(model.state_dict())
    found, expected = model.eval()(image), reference.eval()(image)
    error = ((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    if not error <= 1e-3:
        sys.exit(f"{name}: not timed, its logits differ by {error:.1e} from those of the naive backend")


def conditions(args: argparse.Namespace) -> dict[str, object]:
    """What a reader needs to judge the figures."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        **({"gpu": torch.cuda.get_device_name()} if getattr(args, "device", "cpu") == "cuda" else {}),
        "cpu": _cpu_name(),
        "instruction set": ops.cpu.instruction_set() if ops.backends()["cpu"] is None else "no kernel",
        "threads": torch.get_num_threads(),
        "allocator": "keeps freed memory" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default",
        "torch": torch.__version__,
        "backbones": backbones.__version__,
        "commit": commit or "unknown",
        "arguments": " ".join(f"{key}={value}" for key, value in vars(args).items() if key not in ("run", "csv")),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(rows: list[dict[str, object]], facts: dict[str, object]) -> None:
    """The rows as a table, under their conditions."""
    table = Table(title="; ".join(f"{key} {value}" for key, value in facts.items()), title_style="dim")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write_csv(path: Path, rows: list[dict[str, object]], facts: dict[str, object]) -> None:
    """The rows, under comment lines with their conditions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in facts.items())
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="op|model")
    op = commands.add_parser("op", help="time the operator's backends")
    op.set_defaults(run=bench_op)
    op.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=["a", "b1", "c3"],
        metavar="NAME",
        help=", ".join(SHAPES),
    )
    op.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    model = commands.add_parser("model", help="time whole models")
    model.set_defaults(run=bench_model)
    model.add_argument("names", nargs="+")
    model.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    model.add_argument("--batch", type=int, default=8)
    model.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    model.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    for command in (op, model):
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--rounds", type=int, default=7, help="timed repetitions of each contestant")
        command.add_argument("--csv", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Starts the program again with an allocator that reuses what was freed, for all contestants alike.

    Otherwise glibc returns large blocks to the system, and the page faults of getting them back dominate the figures.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if sys.platform == "linux" and not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def main() -> None:
    """Runs one benchmark."""
    args = parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    with Progress(console=console, transient=True) as progress:
        rows = args.run(args, progress)
    facts = conditions(args)
    show(rows, facts)
    if args.csv:
        write_csv(args.csv, rows, facts)


if __name__ == "__main__":
    main()
