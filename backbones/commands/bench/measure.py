"""Times, peaks of memory and limits of the machine, and the conditions under which they were measured."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

import backbones
from backbones import ops
from backbones.ops import native

PARITY = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # RMS error over RMS value, against float64
ROOT = Path(__file__).resolve().parents[3]
Rows = list[dict[str, object]]  # a table: the cells of each row by column


class ParityError(Exception):
    """Raised where the code to be timed computes something else."""


def first_line(error: Exception) -> str:
    """What an error says, without what follows in lines of its own, such as PyTorch's advice on memory."""
    return str(error).splitlines()[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS error over RMS value."""
    return ((found.double() - expected).square().mean().sqrt() / expected.double().square().mean().sqrt()).item()


def check_parity(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises ParityError unless ``found`` is the function that is to be timed."""
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise ParityError(f"{name}: not timed, its relative error of {error:.1e} exceeds {tolerance:.0e}")


def medians(
    contestants: dict[str, Callable[[], object]], rounds: int, progress: Progress, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each contestant; every round runs each of them once, after two rounds of warm-up."""
    # Processor time leaves out what other processes do to a single thread; with more threads it would add them up.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        wait(device)
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


def wait(device: str) -> None:
    """Returns when everything that was launched on a GPU is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def train_step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Forward in bfloat16 autocast, backward of a loss that every output enters, and a step of the optimizer."""
    with torch.autocast(images.device.type, torch.bfloat16):
        outputs = model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.stack([x.float().square().mean() for x in outputs]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def limits(rounds: int) -> dict[str, float]:
    """Bytes a second that all threads together read, and exponentials (2^x) a second that the kernel computes.

    The best of ``rounds``: whatever disturbs a measurement makes it slower.
    """
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter

    def fastest(function: Callable[[], object]) -> float:
        seconds = []
        for _ in range(rounds + 1):
            start = clock()
            function()
            seconds.append(clock() - start)
        return min(seconds[1:])

    far = torch.zeros(2**26 * threads)  # 256 MiB a thread: no cache holds that
    near = torch.linspace(-30, 0, 2048 * threads)  # 8 KiB a thread: in its first cache
    repeats = 20_000
    return {
        "read bytes/s": far.numel() * 4 / fastest(lambda: native.read(far)),
        "exp2/s": near.numel() * repeats / fastest(lambda: native.exp2(near, repeats)),
    }


def peak_memory(shape: str, dtype: str, backend: str, backward: bool) -> float:
    """MiB that one call takes at its peak, outputs included, in a process of its own."""
    command = [sys.executable, "-m", "backbones.commands.bench.peak", shape, dtype, backend, str(int(backward))]
    # Whatever is freed goes back to the system at once: else new blocks would hide in old ones.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return float(subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout)


def conditions(args: argparse.Namespace) -> dict[str, object]:
    """Conditions that a reader needs to judge the figures."""
    commit = ""
    if (ROOT / ".git").exists():  # an installed package may stand within a repository of something else
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    arguments = {key: value for key, value in vars(args).items() if key not in ("run", "csv")}
    return {
        **({"gpu": torch.cuda.get_device_name()} if getattr(args, "device", "cpu") == "cuda" else {}),
        "cpu": _cpu_name(),
        "instruction set": native.instruction_set() if ops.backends()["cpu"] is None else "no kernel",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if getattr(args, "amp", False) else getattr(args, "dtype", "float32"),
        "allocator": "keeps freed memory" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default",
        "torch": torch.__version__,
        "backbones": backbones.__version__,
        "commit": commit or "unknown",
        "arguments": " ".join(f"{key}={value}" for key, value in arguments.items()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
