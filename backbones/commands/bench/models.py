"""Whole models beside timm's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from rich.progress import Progress
from torch import Tensor, nn

from backbones.commands.bench.measure import Rows, check_parity, medians

COMPANIONS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny")
KINDS = ("inference", "training")
LOGITS = 1e-3  # relative RMS between backends, through all layers
HALF_LOGITS = 3e-2  # of bfloat16 against float32, of which rounding to 8 bits takes up to half
# Models whose position embeddings or windows are made for one size.
_SIZED = ("vim", "lbvim", "deit", "swin")


def options_of(name: str, size: int) -> dict[str, Any]:
    """Arguments of a registered model for images of ``size`` x ``size`` pixels."""
    return {"img_size": size} if name.startswith(_SIZED) else {}


def bench_model(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """Images a second, in inference and in a training step (forward and backward).

    With ``args.amp`` under autocast to bfloat16, and how much faster that is than float32, from the same run.
    """
    names = list(dict.fromkeys([*args.names, *args.against]))
    options = {name: options_of(name, args.size) for name in names}
    models = {name: timm.create_model(name, **options[name]).to(args.device) for name in names}
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    for name in args.names:
        check_model(name, models[name], images[:1], options[name], args.amp)

    def infer(name: str, amp: bool) -> None:
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=amp):
            models[name].eval()(images)

    def train(name: str, amp: bool) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=amp):
            outputs = models[name].train()(images)
        logits = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([x.float().square().mean() for x in logits]).sum().backward()
        models[name].zero_grad()

    contestants = [(name, amp) for name in names for amp in ((False, True) if args.amp else (False,))]

    def seconds_of(run: Callable[[str, bool], None]) -> dict[tuple[str, bool], float]:
        calls: dict[str, Callable[[], object]] = {
            f"{name}{' amp' * amp}": partial(run, name, amp) for name, amp in contestants
        }
        return dict(zip(contestants, medians(calls, args.rounds, progress, args.device).values(), strict=True))

    inference, training = seconds_of(infer), seconds_of(train)
    rows = []
    for name in names:
        row: dict[str, object] = {"model": name}
        for kind, seconds in zip(KINDS, (inference, training), strict=True):
            own = seconds[name, args.amp]
            row[f"{kind} img/s"] = args.batch / own
            if args.amp:
                row[f"{kind} over float32"] = seconds[name, False] / own
            row |= {f"{kind} over {other.split('_')[0]}": seconds[other, args.amp] / own for other in args.against}
        rows.append(row)
    yield rows


@torch.no_grad()
def check_model(name: str, model: nn.Module, image: Tensor, options: dict[str, Any], amp: bool = False) -> None:
    """Raises ParityError unless the model computes what it does on the naive backend; ``amp``: in bfloat16, too."""
    reference = timm.create_model(name, scan_backend="naive", **options).to(image.device)
    reference.load_state_dict(model.state_dict())
    expected = reference.eval()(image)
    check_parity(name, model.eval()(image), expected, LOGITS)
    if amp:
        with torch.autocast(image.device.type, torch.bfloat16):
            check_parity(f"{name} in bfloat16", model(image), expected, HALF_LOGITS)
