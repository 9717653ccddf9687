"""The operator's backends beside a textbook loop, at the shapes of real models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from backbones import ops
from backbones.commands.bench.measure import PARITY, Rows, check_parity, limits, medians, peak_memory
from backbones.commands.bench.shapes import SHAPES, TextbookLoop
from backbones.ops import selective_scan
from backbones.ops.scan.naive import selective_scan_naive


def bench_limits(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """The machine's peak rates, and the least time of a forward pass that follows from them."""
    found = limits(args.rounds)
    rows: Rows = [
        {"limit": "memory read", "value": found["read bytes/s"] / 1e9, "unit": "GB/s"},
        {"limit": "exp2 of the kernel", "value": found["exp2/s"] / 1e9, "unit": "1e9/s"},
    ]
    floors = {key: shape.floor(4, found["read bytes/s"], found["exp2/s"]) for key, shape in SHAPES.items()}
    yield rows + [{"limit": f"forward of shape {key}", "value": x * 1e3, "unit": "ms"} for key, x in floors.items()]


def bench_op(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """Forward, and forward with backward, of every backend that runs here. Yields the rows so far after each shape."""
    dtype = getattr(torch, args.dtype)
    # Triton's interpreter is no contestant.
    backends = [name for name, reason in ops.backends().items() if reason is None and name != "triton"]
    found = limits(args.rounds) if "cpu" in backends else None
    rows: Rows = []
    for key in args.shapes:
        rows += _bench_shape(key, dtype, backends, found, args, progress)
        yield rows


def _bench_shape(
    key: str,
    dtype: torch.dtype,
    backends: list[str],
    found: dict[str, float] | None,
    args: argparse.Namespace,
    progress: Progress,
) -> Rows:
    shape = SHAPES[key]
    tensors = shape.tensors(dtype)
    loop = TextbookLoop({name: x.float() if x.is_floating_point() else x for name, x in tensors.items()})
    exact: dict[str, Any] = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected = selective_scan_naive(**exact)
    check_parity("textbook", loop(), TextbookLoop(exact)(), PARITY[torch.float32])
    del exact
    forward: dict[str, Callable[[], object]] = {"textbook": loop}
    both: dict[str, Callable[[], object]] = {}
    for backend in backends:
        check_parity(backend, selective_scan(**tensors, backend=backend), expected, PARITY[dtype])
        forward[backend] = partial(selective_scan, **tensors, backend=backend)
        both[backend] = partial(
            _forward_and_backward, shape.leaves(dtype), torch.ones_like(expected, dtype=dtype), backend
        )
    if "cpu" in backends:
        for window in (4, 16):
            forward[f"cpu, window {window}"] = partial(selective_scan, **tensors, backend="cpu", local_window=window)
    with torch.no_grad():
        seconds = medians(forward, args.rounds, progress)
    seconds_both = medians(both, args.rounds, progress)
    floor = found and shape.floor(dtype.itemsize, found["read bytes/s"], found["exp2/s"])
    rows = []
    for name in forward:
        measured = {"forward": seconds[name], "both": seconds_both.get(name)}
        peaks = args.memory and name in ("textbook", *backends)
        rows.append(
            {
                "shape": key,
                "of": shape.where,
                "backend": name,
                "forward ms": seconds[name] * 1e3,
                "times textbook": seconds["textbook"] / seconds[name],
                "over the floor": seconds[name] / floor if floor else None,
                "forward + backward ms": measured["both"] and measured["both"] * 1e3,
                "times naive": measured["both"] and seconds_both["naive"] / measured["both"],
                "backward over forward": measured["both"] and measured["both"] / seconds[name] - 1,
                "peak MiB forward": peak_memory(key, args.dtype, name, False) if peaks else None,
                "peak MiB both": peak_memory(key, args.dtype, name, True) if peaks and name in both else None,
            }
        )
    return rows


def _forward_and_backward(tensors: dict[str, Any], grad: torch.Tensor, backend: str) -> None:
    wanted = [x for x in tensors.values() if x.requires_grad]
    torch.autograd.grad(selective_scan(**tensors, backend=backend), wanted, grad)
