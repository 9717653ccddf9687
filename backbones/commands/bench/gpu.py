"""Where a GPU's time goes: launches, time of the host, throughput and memory, in eager mode and with CUDA graphs."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import backbones
from backbones.commands.bench.measure import ParityError, check_parity, train_step
from backbones.models import family_names

HOST_BATCH = 2  # so little work that nothing waits for the GPU
LOGITS = 1e-2  # relative RMS of a graph against eager mode, both under bfloat16 autocast
COLUMNS = (
    *("model", "mode", "launches_inference", "launches_training", "host_inference_ms", "host_training_ms"),
    *("inference_img_s", "training_img_s", "gpu_training_ms", "peak_inference_mib", "peak_training_mib"),
)


class Contestant:
    """A model in one mode, for one batch size, with what a training loop calls in each step."""

    def __init__(self, name: str, mode: str, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = timm.create_model(name).cuda()
        if mode == "graphs":
            backbones.cuda_graphs(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.images = torch.randn(batch, 3, size, size, device="cuda")

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Logits in evaluation mode."""
        with torch.autocast("cuda", torch.bfloat16):
            return self.model.eval()(self.images)

    def train(self) -> None:
        """Forward, backward and one step of AdamW."""
        train_step(self.model.train(), self.images, self.optimizer)


def bench_gpu(args: argparse.Namespace, progress: Progress) -> list[dict[str, object]]:
    """A row for each model and mode; modes take turns, models follow one another."""
    if not torch.cuda.is_available():
        raise ParityError("gpu: PyTorch sees no GPU")
    rows: list[dict[str, object]] = []
    ours = timm.list_models(module=list(family_names()))
    task = progress.add_task("models", total=len(args.names))
    for name in args.names:
        modes = ("eager", "graphs") if name in ours else ("eager",)
        rows += _rows(name, modes, args.batch, args.size, args.rounds)
        progress.advance(task)
    return rows


def _rows(name: str, modes: tuple[str, ...], batch: int, size: int, rounds: int) -> list[dict[str, object]]:
    found: dict[str, dict[str, object]] = {mode: {"model": name, "mode": mode} for mode in modes}
    small = {mode: Contestant(name, mode, HOST_BATCH, size) for mode in modes}
    for mode in modes[1:]:
        check_parity(f"{name}, {mode}", small[mode].infer(), small["eager"].infer(), LOGITS)
    for kind in ("infer", "train"):
        column = "inference" if kind == "infer" else "training"
        for mode, milliseconds in _turns(small, kind, rounds, wait=False).items():
            found[mode][f"host_{column}_ms"] = milliseconds
    for mode, contestant in small.items():
        found[mode]["launches_inference"] = _kernels(contestant.infer)[0]
        found[mode]["launches_training"] = _kernels(contestant.train)[0]
    del small, contestant
    for mode in modes:  # alone in memory
        gc.collect()  # models with graphs are cycles
        contestant = Contestant(name, mode, batch, size)
        found[mode]["peak_inference_mib"] = _peak(contestant.infer)
        found[mode]["peak_training_mib"] = _peak(contestant.train)
        del contestant
    large = {mode: Contestant(name, mode, batch, size) for mode in modes}
    for kind in ("infer", "train"):
        column = "inference" if kind == "infer" else "training"
        for mode, milliseconds in _turns(large, kind, rounds, wait=True).items():
            found[mode][f"{column}_img_s"] = 1e3 * batch / milliseconds
    for mode, contestant in large.items():
        found[mode]["gpu_training_ms"] = _kernels(contestant.train)[1]
    return [{column: row[column] for column in COLUMNS} for row in found.values()]


def _turns(contestants: dict[str, Contestant], kind: str, rounds: int, wait: bool) -> dict[str, float]:
    """Milliseconds of a call, medians: until it returns, or with ``wait`` until the GPU is done."""
    calls = {mode: getattr(contestant, kind) for mode, contestant in contestants.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {mode: [] for mode in calls}
    for _ in range(rounds):
        for mode, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if wait:
                torch.cuda.synchronize()
            times[mode].append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return {mode: statistics.median(values) for mode, values in times.items()}


def _kernels(call: Callable[[], object]) -> tuple[int, float]:
    """Kernels that a call runs on the GPU, copies included: their number and milliseconds."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    return len(events), sum(event.device_time for event in events) / 1e3


def _peak(call: Callable[[], object]) -> int:
    """MiB allocated at most, the model included; the first call counts, as it captures what graphs keep."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() >> 20
