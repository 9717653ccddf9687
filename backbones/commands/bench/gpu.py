"""Where a GPU's time goes: launches, time of the host, throughput and memory, in eager mode and with CUDA graphs."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import backbones
from backbones.commands.bench.measure import ParityError, Rows, check_parity, train_step
from backbones.models import family_names

MODES = ("eager", "graphs")
KINDS = {"infer": "inference", "train": "training"}  # what a contestant does, and what its columns are called
HOST_BATCH = 2  # so little work that nothing waits for the GPU
LOGITS = 1e-2  # relative RMS of a graph against eager mode, both under bfloat16 autocast
HOST_COLUMNS = ("model", "mode", "launches_inference", "launches_training", "host_inference_ms", "host_training_ms")
COLUMNS = (
    *HOST_COLUMNS,
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

    def ready(self, kind: str) -> Callable[[], object]:
        """``infer`` or ``train``, the model in that mode: changing it is no part of a call."""
        self.model.train(kind == "train")
        return getattr(self, kind)

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Logits."""
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(self.images)

    def train(self) -> None:
        """Forward, backward and one step of AdamW."""
        train_step(self.model, self.images, self.optimizer)


Key = tuple[str, str]  # model and mode


def bench_host(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """The columns of `bench_gpu` about launches and the host alone."""
    rows = _rows(args.names)
    task = progress.add_task("models", total=1)
    _host(rows, args.size, args.rounds)
    progress.advance(task)
    yield [{column: row[column] for column in HOST_COLUMNS} for row in rows.values()]


def bench_gpu(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """A row for each model and mode.

    What the host limits is timed by turns of all models: its own speed may change by half from minute to minute.
    """
    rows = _rows(args.names)
    task = progress.add_task("models", total=len(rows) + 2)
    _host(rows, args.size, args.rounds)
    progress.advance(task)
    eager = {key: row for key, row in rows.items() if key[1] == "eager"}
    _throughput(eager, {key: Contestant(*key, args.batch, args.size) for key in eager}, args.rounds)
    progress.advance(task)
    for key, row in rows.items():
        _alone(key, row, args.batch, args.size, args.rounds)
        progress.advance(task)
    yield [{column: row[column] for column in COLUMNS} for row in rows.values()]


def _rows(names: list[str]) -> dict[Key, dict[str, object]]:
    """A row for each model and mode, of which models of others have one."""
    if not torch.cuda.is_available():
        raise ParityError("gpu: PyTorch sees no GPU")
    ours = timm.list_models(module=list(family_names()))
    keys = [(name, mode) for name in names for mode in MODES if mode == "eager" or name in ours]
    return {key: dict(zip(("model", "mode"), key, strict=True)) for key in keys}


def _host(rows: dict[Key, dict[str, object]], size: int, rounds: int) -> None:
    """Launches, and the time until a call returns."""
    contestants = {key: Contestant(*key, HOST_BATCH, size) for key in rows}
    for (name, mode), contestant in contestants.items():
        if mode != "eager":
            check_parity(f"{name}, {mode}", _logits(contestant), _logits(contestants[name, "eager"]), LOGITS)
    for kind, column in KINDS.items():
        for key, milliseconds in _turns(contestants, kind, rounds, wait=False).items():
            rows[key][f"host_{column}_ms"] = milliseconds
        for key, contestant in contestants.items():
            rows[key][f"launches_{column}"] = _kernels(contestant.ready(kind))[0]


def _logits(contestant: Contestant) -> Tensor:
    contestant.ready("infer")
    return contestant.infer()


def _throughput(rows: dict[Key, dict[str, object]], contestants: dict[Key, Contestant], rounds: int) -> None:
    """Images a second, until the GPU is done."""
    for kind, column in KINDS.items():
        for key, milliseconds in _turns(contestants, kind, rounds, wait=True).items():
            rows[key][f"{column}_img_s"] = 1e3 * len(contestants[key].images) / milliseconds


def _alone(key: Key, row: dict[str, object], batch: int, size: int, rounds: int) -> None:
    """What is measured alone in memory: peaks, the kernels' time, and the throughput of a model with graphs, each of
    which keeps its activations.
    """
    gc.collect()  # models with graphs are cycles
    left = torch.cuda.memory_allocated()  # such as workspaces of cuBLAS, one for each stream that a capture used
    contestant = Contestant(*key, batch, size)
    for kind, column in KINDS.items():
        row[f"peak_{column}_mib"] = (_peak(contestant.ready(kind)) - left) >> 20
    if key[1] != "eager":
        _throughput({key: row}, {key: contestant}, rounds)
    row["gpu_training_ms"] = _kernels(contestant.ready("train"))[1]


def _turns(contestants: dict[Key, Contestant], kind: str, rounds: int, wait: bool) -> dict[Key, float]:
    """Milliseconds of a call, medians: until it returns, or with ``wait`` until the GPU is done."""
    calls = {key: contestant.ready(kind) for key, contestant in contestants.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if wait:
                torch.cuda.synchronize()
            times[key].append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return {key: statistics.median(values) for key, values in times.items()}


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
    """Bytes allocated at most, the model included; the first call counts, as it captures what graphs keep."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
