"""Data-parallel training on several GPUs of one machine against one of them, in turns, and the memory of a GPU."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import timm
import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import backbones
from backbones.commands.bench.measure import ROOT, ParityError, Rows, train_step, wait
from backbones.commands.bench.models import options_of
from backbones.processes import leave_process_group

MODES = ("eager", "graphs", "sharded")  # the last in eager mode, with FullyShardedModel
WARM_UP = 5
STEPS = 5  # in a round: the host runs ahead of the GPU as in training


def bench_scaling(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """A row for each model and mode. Yields the rows so far."""
    if args.device == "cuda" and torch.cuda.device_count() < args.gpus:
        raise ParityError(f"scaling: PyTorch sees {torch.cuda.device_count()} GPUs, --gpus is {args.gpus}")
    modes = args.modes or (MODES[:2] if args.device == "cuda" else MODES[:1])
    if args.device == "cpu" and "graphs" in modes:
        raise ParityError("scaling: graphs need a GPU, choose other --modes")
    jobs = [(name, mode) for name in args.names for mode in modes]
    rows: Rows = []
    for name, mode in progress.track(jobs, description="models"):
        rows.append(_row(name, mode, args))
        yield rows


def _row(name: str, mode: str, args: argparse.Namespace) -> dict[str, object]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
    given = [name, mode, args.device, args.batch, args.size, args.rounds]
    command = [sys.executable, *launcher, "-m", "backbones.commands.bench.scaling", *map(str, given)]
    environment = {"OMP_NUM_THREADS": str(args.threads)} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParityError(f"scaling: {name}, {mode}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    one, several, peak = json.loads(done.stdout.splitlines()[-1])
    return {
        "model": name,
        "mode": mode,
        "gpus": args.gpus,
        "batch_per_gpu": args.batch,
        "one_img_s": args.batch / one,
        "all_img_s": args.gpus * args.batch / several,
        "speedup": args.gpus * one / several,
        "peak_mib": peak,
    }


class Training:
    """A model's training steps: forward and backward in bfloat16 autocast, averaged gradients, fused AdamW."""

    def __init__(self, name: str, mode: str, device: torch.device, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = timm.create_model(name, **options_of(name, size)).to(device).train()
        if mode == "graphs":
            backbones.cuda_graphs(self.model)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.device = device.type

    def spread(self, mode: str) -> Training:
        """Over all processes."""
        if mode == "sharded":
            from backbones.mm.engine.sharding import FullyShardedModel  # needs mmengine

            self.model = FullyShardedModel(self.model)
            self.model.shard()
        else:
            # Buffers stay each process's own, as in training.
            self.model = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return self

    def ready(self) -> Training:
        """With an optimizer of the parameters as they are now."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        return self

    def run(self, steps: int) -> float:
        """Seconds of a step, once everything before is done."""
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            train_step(self.model, self.images, self.optimizer)
        wait(self.device)
        return (time.perf_counter() - start) / steps


def measure(name: str, mode: str, device_type: str, batch: int, size: int, rounds: int) -> None:
    """In each process of torchrun; the first prints what :func:`_measure` gives."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    figures = _measure(name, mode, device, batch, size, rounds)
    if rank == 0:
        print(json.dumps(figures))
    leave_process_group()


def _measure(name: str, mode: str, device: torch.device, batch: int, size: int, rounds: int) -> list[float | None]:
    """The median seconds of a step, alone (in the first process) and of all together, and the MiB that the last
    process, which trains together only, had allocated at most.
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    together = Training(name, mode, device, batch, size).spread(mode).ready()
    alone = Training(name, mode, device, batch, size).ready() if rank == 0 else None
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for steps in (WARM_UP, *[STEPS] * rounds):
        if alone is not None:
            times["alone"].append(alone.run(steps))
        dist.barrier()  # the other GPUs rest meanwhile
        times["together"].append(together.run(steps))
        dist.barrier()
    peak = torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else None
    peaks: list[int | None] = [None] * (last + 1)
    dist.all_gather_object(peaks, peak)
    return [*(statistics.median(values[1:]) if values else None for values in times.values()), peaks[last]]


if __name__ == "__main__":
    model, mode, device_type, *numbers = sys.argv[1:]
    batch, size, rounds = map(int, numbers)
    measure(model, mode, device_type, batch, size, rounds)
