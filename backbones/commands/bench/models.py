"""Whole models beside timm's own."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn

from backbones.commands.bench.measure import check_parity, medians

COMPANIONS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny")
KINDS = ("inference", "training")
LOGITS = 1e-3  # relative RMS between backends, through all layers
# Models whose position embeddings or windows are made for one size.
_SIZED = ("vim", "lbvim", "deit", "swin")


def options_of(name: str, size: int) -> dict[str, Any]:
    """Arguments of a registered model for images of ``size`` x ``size`` pixels."""
    return {"img_size": size} if name.startswith(_SIZED) else {}


def bench_model(args: argparse.Namespace, progress: Progress) -> list[dict[str, object]]:
    """Images a second, in inference and in a training step (forward and backward)."""
    names = list(dict.fromkeys([*args.names, *args.against]))
    options = {name: options_of(name, args.size) for name in names}
    models = {name: timm.create_model(name, **options[name]).to(args.device) for name in names}
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    for name in args.names:
        check_model(name, models[name], images[:1], options[name])
    autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.amp)

    def infer(name: str) -> None:
        with torch.inference_mode(), autocast():
            models[name].eval()(images)

    def train(name: str) -> None:
        with autocast():
            outputs = models[name].train()(images)
        logits = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([x.float().square().mean() for x in logits]).sum().backward()
        models[name].zero_grad()

    inference = medians({name: partial(infer, name) for name in names}, args.rounds, progress, args.device)
    training = medians({name: partial(train, name) for name in names}, args.rounds, progress, args.device)
    rows = []
    for name in names:
        row: dict[str, object] = {"model": name}
        for kind, seconds in zip(KINDS, (inference, training), strict=True):
            row[f"{kind} img/s"] = args.batch / seconds[name]
            row |= {f"{kind} over {other.split('_')[0]}": seconds[other] / seconds[name] for other in args.against}
        rows.append(row)
    return rows


@torch.no_grad()
def check_model(name: str, model: nn.Module, image: Tensor, options: dict[str, Any]) -> None:
    """Raises ParityError unless the model computes what it does on the naive backend."""
    reference = timm.create_model(name, scan_backend="naive", **options).to(image.device)
    reference.load_state_dict(model.state_dict())
    check_parity(name, model.eval()(image), reference.eval()(image), LOGITS)
