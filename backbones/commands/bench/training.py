"""The whole training command (files, augmentation, averages, clipping) against its loader alone and a bare loop."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from PIL import Image
from rich.progress import Progress

import backbones
from backbones.commands.bench.measure import ParityError, Rows, train_step, wait
from backbones.images import read_image
from backbones.mm import Runner
from backbones.mm.app.cli import read_config
from backbones.mm.models.classifier import create_network

MODES = ("eager", "graphs")
SIZE = (500, 375)  # width and height of most photographs of ImageNet
QUALITY = 95  # gives 110 KiB, the mean of ImageNet's files
DISTINCT = 200  # photographs; more would be read from memory as well
WARM_UP = 10  # steps
CORE_IMAGES = 100


def bench_training(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """A row for each mode and number of workers. Yields the rows so far."""
    if args.device == "cuda" and not args.loader_only and not torch.cuda.is_available():
        raise ParityError("training: PyTorch sees no GPU; --loader-only needs none")
    modes = args.modes or (MODES if args.device == "cuda" else MODES[:1])
    with tempfile.TemporaryDirectory() as folder:
        config = _config(args, Path(folder))
        dataset = config.train_dataloader.dataset
        images = (WARM_UP + args.steps) * config.train_dataloader.batch_size
        size = make_photographs(Path(folder, "images", dataset.split), dataset.num_classes, images)
        core = _core_ms(config)
        rows: Rows = []
        jobs = [(mode, workers) for mode in (["none"] if args.loader_only else modes) for workers in args.workers]
        for mode, workers in progress.track(jobs, description="modes and workers"):
            config.train_dataloader.num_workers = workers
            row: dict[str, object] = {"mode": mode, "workers": workers, "jpeg_kib": size / 1024, **core}
            row["loader_img_s"] = _loader(config)
            if not args.loader_only:
                row["bare_img_s"] = _bare(config, mode, args)
                row["command_img_s"] = _command(config, mode, args, Path(folder, f"{mode}_{workers}"))
                row["of_bare"] = row["command_img_s"] / row["bare_img_s"]  # type: ignore[operator]
            rows.append(row)
            yield rows


def _config(args: argparse.Namespace, folder: Path) -> Config:
    """The config, for one epoch on made images, without validation and files that a run leaves."""
    config = read_config(args.config, options=args.cfg_options)
    if config.train_dataloader.dataset.get("type") != "ImageFolder":
        raise ParityError("training: this config does not train on an ImageFolder")
    config.train_dataloader.dataset.data_root = str(folder / "images")
    config.train_dataloader.batch_size = args.batch or config.train_dataloader.batch_size
    config.train_cfg.update(max_epochs=1, val_interval=2)
    for key in ("cfg", "dataloader", "evaluator"):
        config[f"val_{key}"] = config[f"test_{key}"] = None
    config.default_hooks.update(checkpoint=None)  # one of mmengine's own, which would be put back
    for hook in ("progress", "report"):
        config.default_hooks.pop(hook, None)
    config.visualizer.vis_backends = []
    config.optim_wrapper.type = "BFloat16OptimWrapper"
    return config


def make_photographs(folder: Path, classes: int, images: int) -> float:
    """At least ``images`` JPEG files in folders of classes, links to a few distinct ones; returns their mean bytes.

    Noise of falling amplitude from coarse to fine, which compresses as photographs do.
    """
    rng = np.random.default_rng(0)
    width, height = SIZE
    folder.mkdir(parents=True)
    made = []
    for i in range(min(DISTINCT, images)):
        pixels = np.full((height, width, 3), 128.0)
        for side in (4, 8, 16, 32, 64, 128, 256):
            coarse = rng.normal(0, 1, (side * height // width + 1, side, 3)) * 50 / side**0.2
            image = [
                np.asarray(
                    Image.fromarray(coarse[..., channel].astype(np.float32)).resize(SIZE, Image.Resampling.BICUBIC)
                )
                for channel in range(3)
            ]
            pixels += np.stack(image, axis=-1)
        made.append(folder.parent / f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(made[-1], quality=QUALITY)
    for label in range(classes):
        (folder / f"{label:04}").mkdir()
    for i in range(max(images, classes)):
        os.link(made[i % len(made)], folder / f"{i % classes:04}" / f"{i}.jpg")
    return statistics.mean(path.stat().st_size for path in made)


def _core_ms(config: Config) -> dict[str, float]:
    """Milliseconds of one core for an image: reading the file, and everything until it is in a batch."""
    from mmengine.registry import DATASETS

    dataset: BaseDataset = DATASETS.build(config.train_dataloader.dataset)
    count = min(CORE_IMAGES, len(dataset))
    chosen = [dataset.get_data_info(i)["img_path"] for i in range(count)]
    start = time.process_time()
    for path in chosen:
        read_image(path)
    middle = time.process_time()
    for i in range(count):
        dataset[i]
    end = time.process_time()
    return {"read_ms": 1e3 * (middle - start) / count, "core_ms": 1e3 * (end - middle) / count}


def _loader(config: Config) -> float:
    """Images per second, when nobody trains on them."""
    batches = iter(Runner.build_dataloader(config.train_dataloader, seed=0))
    for _ in range(WARM_UP):
        next(batches)
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch["inputs"])
    return images / (time.perf_counter() - start)


def _bare(config: Config, mode: str, args: argparse.Namespace) -> float:
    """Images per second of the network on one batch that stays on the GPU: forward, backward, fused AdamW."""
    torch.manual_seed(0)
    batch, size = config.train_dataloader.batch_size, config.train_dataloader.dataset.transform.input_size
    model = create_network(**config.model.network).to(args.device).train()
    if mode == "graphs":
        backbones.cuda_graphs(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(batch, config.model.network.get("in_chans", 3), size, size, device=args.device)
    for steps in (WARM_UP, args.steps):
        wait(args.device)
        start = time.perf_counter()
        for _ in range(steps):
            train_step(model, images, optimizer)
        wait(args.device)
    return batch * args.steps / (time.perf_counter() - start)


class _Clock(Hook):
    """Images per second of the steps behind ``WARM_UP``."""

    priority = "LOWEST"

    def __init__(self, device: str) -> None:
        self.device = device

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if batch_idx + 1 == WARM_UP:
            wait(self.device)
            self.start = time.perf_counter()
        elif batch_idx + 1 == len(runner.train_dataloader):
            wait(self.device)
            steps = len(runner.train_dataloader) - WARM_UP
            self.rate = steps * runner.train_dataloader.batch_size / (time.perf_counter() - self.start)


def _command(config: Config, mode: str, args: argparse.Namespace, folder: Path) -> float:
    """Images per second of the run that ``train --amp`` starts, and ``--cuda-graphs``."""
    config = Config(config._cfg_dict)
    config.update(work_dir=str(folder), experiment_name=folder.name)
    if mode == "graphs":
        config.custom_hooks = [*config.get("custom_hooks", []), {"type": "CudaGraphsHook"}]
    runner = Runner.from_cfg(config)
    clock = _Clock(args.device)
    runner.register_hook(clock)
    runner.train()
    del runner
    gc.collect()
    return clock.rate
