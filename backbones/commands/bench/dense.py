"""One training step of detectors and segmentors as their configs train them: seconds and peak memory on a GPU."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from rich.progress import Progress
from torch import Tensor

from backbones.commands.bench.measure import ParityError, Rows, first_line, wait
from backbones.mm import Runner
from backbones.mm.app.cli import read_config

COLUMNS = ("step_ms", "images_s", "peak_mib")
WARM_UP = 3
INSTANCES = 7  # objects in an image of COCO, on average


def bench_dense(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """A row for each config; each is alone in memory. Yields the rows so far."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ParityError("dense: PyTorch sees no GPU")
    paths = [Path(config) for config in args.configs]
    for path in paths:
        if not path.is_file():
            raise ParityError(f"dense: no config {path}")
    rows: Rows = []
    task = progress.add_task("configs", total=len(paths))
    for path in paths:
        rows.append(_row(path, args))
        progress.advance(task)
        yield rows


def _row(path: Path, args: argparse.Namespace) -> dict[str, object]:
    config = read_config(path)
    size = args.size or _size(config.train_dataloader.dataset)
    batch = args.batch or config.train_dataloader.batch_size
    row = {"config": path.stem, "images": f"{batch} x {size[0]} x {size[1]}"} | dict.fromkeys(COLUMNS)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        times = _steps(config, batch, size, args)
    except torch.cuda.OutOfMemoryError as error:
        print(f"{path.stem}: no figures, {first_line(error)}", file=sys.stderr)
        return row
    seconds = statistics.median(times[WARM_UP:])
    row |= {"step_ms": 1e3 * seconds, "images_s": batch / seconds}
    if args.device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    return row


def _steps(config: Config, batch: int, size: Sequence[int], args: argparse.Namespace) -> list[float]:
    """Seconds of each training step: images to the GPU, forward, losses, backward, clipping, optimizer."""
    config.model.backbone.pop("init_cfg", None)  # nothing is downloaded
    config.optim_wrapper.type = "BFloat16OptimWrapper"
    data = _detection(config, batch, size) if config.default_scope == "mmdet" else _segmentation(config, batch, size)
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        runner = Runner.from_cfg(config)
        runner.model.init_weights()
        optim_wrapper = runner.build_optim_wrapper(config.optim_wrapper)
        times = []
        for _ in range(WARM_UP + args.rounds):
            wait(args.device)
            start = time.perf_counter()
            runner.model.train().train_step(data, optim_wrapper)
            wait(args.device)
            times.append(time.perf_counter() - start)
    return times


def _size(dataset: Any) -> Sequence[int]:
    """Height and width that the config trains at: its last crop, else its scale, which is width and height."""
    found: Sequence[int] = ()
    while "dataset" in dataset and "pipeline" not in dataset:
        dataset = dataset.dataset
    for step in dataset.pipeline:
        if step.type == "RandomCrop":
            found = step.crop_size
        elif step.type == "Resize":
            found = step.scale[::-1]
    if not found:
        raise ParityError("dense: this config trains at no fixed size; give --size")
    return found


def _images(batch: int, size: Sequence[int]) -> list[Tensor]:
    return [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(batch)]


def _detection(config: Config, batch: int, size: Sequence[int]) -> dict[str, Any]:
    """Noise with ellipses as objects, of a quarter of the image's sides on average."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    rng = np.random.default_rng(0)
    height, width = size
    roi_head = config.model.get("roi_head", {})
    head = roi_head.get("bbox_head") or config.model.bbox_head
    classes = (head[0] if isinstance(head, list) else head).num_classes
    y, x = np.ogrid[:height, :width]
    samples = []
    for _ in range(batch):
        extents = rng.uniform(0.05, 0.45, (INSTANCES, 2)) * (width, height)
        corners = rng.uniform(0, 1, (INSTANCES, 2)) * ((width, height) - extents)
        masks = [
            ((x - left) / w - 0.5) ** 2 + ((y - top) / h - 0.5) ** 2 <= 0.25
            for (left, top), (w, h) in zip(corners, extents, strict=True)
        ]
        objects = InstanceData(
            bboxes=torch.from_numpy(np.concatenate((corners, corners + extents), axis=1)).float(),
            labels=torch.from_numpy(rng.integers(classes, size=INSTANCES)),
        )
        if "mask_head" in roi_head:
            objects.masks = BitmapMasks(np.stack(masks).astype(np.uint8), height, width)
        samples.append(DetDataSample(metainfo=_meta(size), gt_instances=objects))
    return {"inputs": _images(batch, size), "data_samples": samples}


def _segmentation(config: Config, batch: int, size: Sequence[int]) -> dict[str, Any]:
    from mmseg.structures import SegDataSample

    classes = config.model.decode_head.num_classes
    samples = []
    for _ in range(batch):
        labels = PixelData(data=torch.randint(classes, (1, *size)))
        samples.append(SegDataSample(metainfo=_meta(size), gt_sem_seg=labels))
    return {"inputs": _images(batch, size), "data_samples": samples}


def _meta(size: Sequence[int]) -> dict[str, Any]:
    return {"img_shape": tuple(size), "ori_shape": tuple(size), "scale_factor": (1.0, 1.0)}
