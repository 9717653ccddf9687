"""Where a GPU's time goes: launches, time of the host, throughput and memory, in eager mode and with CUDA graphs."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import backbones
from backbones.commands.bench.measure import ParityError, Rows, check_parity, first_line, train_step
from backbones.models import family_names

MODES = ("eager", "graphs")
KINDS = {"infer": "inference", "train": "training"}  # what a contestant does, and what its columns are called
WARM = 6  # calls before what is measured, until all that will be recorded has been
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


class Attempts:
    """Says what is being measured, and goes on behind what cannot be, which it names on stderr.

    Args:
        progress: where a terminal shows it; elsewhere each attempt is a line on stderr.
        total: how many there will be.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self.wrong: list[str] = []  # what computes something else
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        """What is measured from now on."""
        self._progress.update(self._task, description=text)
        if not self._progress.console.is_terminal:
            print(f"{time.perf_counter() - self._start:4.0f} s  {text}", file=sys.stderr)

    @contextmanager
    def __call__(self, key: Key, what: str) -> Iterator[None]:
        """Ends early, and quietly but for a line, where a contestant is wrong or does not fit into memory."""
        name = ", ".join(key)
        self.say(f"{name}: {what}")
        try:
            yield
        except ParityError as error:
            self.wrong.append(name)
            print(error, file=sys.stderr)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: {what}: not measured, {first_line(error)}", file=sys.stderr)
        self._progress.advance(self._task)


def bench_host(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """The columns of `bench_gpu` about launches and the host alone."""
    rows = _rows(args.names, HOST_COLUMNS)
    attempt = Attempts(progress, 4 * len(rows))
    _host(rows, attempt, args.size, args.rounds)
    yield list(rows.values())
    _refuse(attempt)


def bench_gpu(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """A row for each model and mode.

    What the host limits is timed by turns of all models: its own speed may change by half from minute to minute. The
    rest follows model by model, in the order of their names. Yields all rows after each part, with blanks for the rest.
    """
    rows = _rows(args.names, COLUMNS)
    attempt = Attempts(progress, 9 * len(rows))
    right = _host(rows, attempt, args.size, args.rounds)
    yield list(rows.values())
    eager = {key: Contestant(*key, args.batch, args.size) for key in right if key[1] == "eager"}
    _throughput(rows, eager, attempt, args.rounds)
    del eager
    yield list(rows.values())
    for key in right:
        _alone(key, rows, attempt, args)
        yield list(rows.values())
    _refuse(attempt)


def _rows(names: list[str], columns: Sequence[str]) -> dict[Key, dict[str, object]]:
    """A blank row for each model and mode, of which models of others have one."""
    if not torch.cuda.is_available():
        raise ParityError("gpu: PyTorch sees no GPU")
    ours = timm.list_models(module=list(family_names()))
    keys = [(name, mode) for name in names for mode in MODES if mode == "eager" or name in ours]
    return {key: dict.fromkeys(columns) | dict(zip(("model", "mode"), key, strict=True)) for key in keys}


def _refuse(attempt: Attempts) -> None:
    """Raises ParityError where a contestant was wrong: the others were measured, but the command has failed."""
    if attempt.wrong:
        raise ParityError(f"gpu: not timed, as said above: {'; '.join(attempt.wrong)}")


def _host(rows: dict[Key, dict[str, object]], attempt: Attempts, size: int, rounds: int) -> list[Key]:
    """Launches, and the time until a call returns; gives those that compute what they should."""
    contestants: dict[Key, Contestant] = {}
    logits: dict[str, Tensor] = {}
    for name, mode in rows:
        with attempt((name, mode), "first call, and whether its logits are those of eager mode"):
            contestant = Contestant(name, mode, HOST_BATCH, size)
            contestant.ready("infer")
            found = contestant.infer()
            if mode == "eager":
                logits[name] = found
            elif name in logits:
                check_parity(f"{name}, {mode}", found, logits[name], LOGITS)
            else:
                raise ParityError(f"{name}, {mode}: not timed, for eager mode did not run")
            contestants[name, mode] = contestant
    for kind, column in KINDS.items():
        for key, milliseconds in _turns(contestants, kind, attempt, rounds, wait=False).items():
            rows[key][f"host_{column}_ms"] = milliseconds
    for key, contestant in contestants.items():
        with attempt(key, "launches"):
            for kind, column in KINDS.items():
                rows[key][f"launches_{column}"] = _kernels(contestant.ready(kind))[0]
    return list(contestants)


def _throughput(
    rows: dict[Key, dict[str, object]], contestants: dict[Key, Contestant], attempt: Attempts, rounds: int
) -> None:
    """Images a second, until the GPU is done."""
    for kind, column in KINDS.items():
        for key, milliseconds in _turns(contestants, kind, attempt, rounds, wait=True).items():
            rows[key][f"{column}_img_s"] = 1e3 * len(contestants[key].images) / milliseconds


def _alone(key: Key, rows: dict[Key, dict[str, object]], attempt: Attempts, args: argparse.Namespace) -> None:
    """What is measured alone in memory: peaks, the kernels' time, and the throughput of a model with graphs, each of
    which keeps its activations.
    """
    gc.collect()  # models with graphs are cycles
    left = torch.cuda.memory_allocated()  # such as workspaces of cuBLAS, one for each stream that a capture used
    contestant = Contestant(*key, args.batch, args.size)
    for kind, column in KINDS.items():
        with attempt(key, f"peak memory in {column}"):
            rows[key][f"peak_{column}_mib"] = (_peak(contestant.ready(kind)) - left) >> 20
    if key[1] != "eager":
        _throughput(rows, {key: contestant}, attempt, args.rounds)
    with attempt(key, "time of the kernels in training"):
        rows[key]["gpu_training_ms"] = _kernels(contestant.ready("train"))[1]


def _turns(
    contestants: dict[Key, Contestant], kind: str, attempt: Attempts, rounds: int, wait: bool
) -> dict[Key, float]:
    """Milliseconds of a call, medians: until it returns, or with ``wait`` until the GPU is done.

    Those that do not fit into memory are left out.
    """
    calls: dict[Key, Callable[[], object]] = {}
    for key, contestant in contestants.items():
        with attempt(key, f"first calls of {len(contestant.images)} images in {KINDS[kind]}"):
            call = contestant.ready(kind)
            for _ in range(WARM):
                call()
            calls[key] = call
    attempt.say(f"{rounds} rounds of {KINDS[kind]}")
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
    """Bytes allocated at most, the model included; the first calls count, which capture and record."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
