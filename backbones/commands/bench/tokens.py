"""Plain models that drop or merge tokens on their way, beside themselves with all of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from rich.progress import Progress

from backbones.analysis.flops import count
from backbones.commands.bench.measure import ParityError, Rows, medians

_KEEP = (0.9, 0.8, 0.7, 0.6)  # the share that each of ToP-ViM's three steps keeps
_MERGE = (0.025, 0.04, 0.055)  # the share of all patches that each of R-MeeTo's steps merges: 5, 8 and 11 of 196


def bench_tokens(args: argparse.Namespace, progress: Progress) -> Iterator[Rows]:
    """Time and counted operations of each reduction, over those of the whole model, for every size.

    Yields the rows so far after each size.
    """
    for name in args.names:
        if not hasattr(timm.create_model(name), "token_reduction"):
            raise ParityError(f"{name}: not timed, it is not a plain model, whose tokens can be reduced")
    rows: Rows = []
    for name in args.names:
        for size in args.sizes:
            rows += _rows(args, name, size, progress)
            yield rows


def _rows(args: argparse.Namespace, name: str, size: int, progress: Progress) -> Rows:
    batch = max(args.batch * 224**2 // size**2, 1)
    images, patches = torch.randn(batch, 3, size, size), (size // 16) ** 2
    reductions: dict[str, Any] = {"none": None}
    reductions |= {f"prune, keep {keep:g}": {"schedule": keep} for keep in _KEEP}
    merged = [round(share * patches) for share in _MERGE]
    reductions |= {f"merge, {number} a step": {"schedule": number, "mode": "merge"} for number in merged}
    models, operations, tokens = {}, {}, {}
    for mode, reduction in reductions.items():
        model: Any = timm.create_model(name, img_size=size, token_reduction=reduction).eval()
        total = count(name, size, token_reduction=reduction).total
        models[mode], operations[mode] = model, total.macs + total.scan + total.other
        with torch.inference_mode():
            tokens[mode] = model.forward_features(images[:1]).shape[1]

    def infer(mode: str) -> None:
        with torch.inference_mode():
            models[mode](images)

    seconds = medians({mode: partial(infer, mode) for mode in models}, args.rounds, progress)
    return [
        {
            "model": name, "size": size, "mode": mode, "tokens": tokens[mode],
            "operations": operations[mode] / operations["none"], "time": seconds[mode] / seconds["none"],
            "ms per image": 1e3 * seconds[mode] / batch,
        }
        for mode in models
    ]  # fmt: skip
