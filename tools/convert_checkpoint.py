#!/usr/bin/env python
"""Convert a weight file of one of the seven families into a safetensors file that loads through timm.

    python tools/convert_checkpoint.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny.safetensors --check

IN is an official file, a training state, one of ours, or a detector or segmentor around such a backbone. Names and
shapes tell which model it is. OUT.safetensors.sha256 holds the checksum, for `sha256sum --check`. What was dropped is
listed.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from backbones.conversion import Converted, convert, identify, load_call, model_names
from backbones.models import family_names
from backbones.weights import CheckpointError, files

AVERAGED = ("model_ema", "state_dict_ema", "ema_model")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN", type=Path, help="weight file: .pth, .ckpt, .safetensors, ...")
    parser.add_argument("output", metavar="OUT.safetensors", type=Path, nargs="?", help="not needed with --check")
    parser.add_argument("--model", metavar="NAME", help="registered name (default: recognised)")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a training state")
    parser.add_argument(
        "--check",
        action="store_true",
        help="also load the result into the model and look at its values; without OUT nothing is written",
    )
    args = parser.parse_args()
    try:
        run(args.input, args.output, args.model, args.ema, args.check)
    except (CheckpointError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(source: Path, target: Path | None, model: str | None, ema: bool, check: bool) -> None:
    """Converts ``source`` into ``target``, and prints what became of it.

    Raises:
        CheckpointError: unusable arguments, or a file that is broken, foreign, or of no model of ours.
        OSError: ``source`` cannot be read, or ``target`` not be written.
    """
    if target is None and not check:
        raise CheckpointError("OUT.safetensors is missing; only --check goes without it")
    if target is not None and (target.suffix != ".safetensors" or not target.parent.is_dir()):
        raise CheckpointError(f"{target}: expected a name that ends in .safetensors, in a folder that exists")
    if model is not None and model not in timm.list_models(module=list(family_names())):
        near = ", ".join(difflib.get_close_matches(model, model_names(), n=3, cutoff=0))
        raise CheckpointError(f"--model: got {model!r}, near names are {near}")

    content = files.load(source)
    try:
        name = model or identify(files.select(content, source))
        published: Any = timm.create_model(name, device="meta").weight_keys
        keys = AVERAGED if ema else published
        key = files.weight_key(content, keys)
        if ema and key is None:
            raise CheckpointError(f"holds no averaged weights: none of {', '.join(AVERAGED)}")
        weights = files.select(content, source, keys)
        converted = convert(weights, name)
        if check:
            try_loading(converted)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error

    print(f"{source}: {name}" + (f", weights under {key!r}" if key else ""))
    others = sorted(str(entry) for entry in content if entry != key) if key else []
    if others:
        print(f"left out of the training state: {', '.join(others)}")
    print(f"dropped {len(converted.dropped)} of {len(weights)} tensors")
    for dropped in converted.dropped:
        print(f"  {dropped}")
    if check:
        print(f"checked: {name} takes all {len(converted.weights)} tensors, and all of them are finite")
    if target is not None:
        digest = write(target, converted, source)
        print(f"{target}: {len(converted.weights)} tensors, sha256 {digest}")
        print(f"load it with {load_call(converted, str(target))}")


def try_loading(converted: Converted) -> None:
    """Loads the weights as timm would from the file, and looks at the values.

    Raises:
        CheckpointError: the model did not take a tensor as it is, or one is not finite; all are named.
    """
    overlay = {"state_dict": converted.weights}
    model = timm.create_model(converted.model, True, pretrained_cfg_overlay=overlay, **converted.arguments)
    loaded = getattr(model, "model", model).state_dict()  # timm wraps a model that gives features only
    for what, names in {
        "not finite": [name for name, x in loaded.items() if not x.isfinite().all()],
        "altered": [name for name, x in loaded.items() if not torch.equal(x, converted.weights[name].to(x.dtype))],
    }.items():
        if names:
            raise CheckpointError(f"{converted.model} loads it, but these are {what}: {', '.join(names)}")


def write(target: Path, converted: Converted, source: Path) -> str:
    """Writes the weights and their checksum, each complete or not at all; returns the SHA-256."""
    metadata = {"format": "pt", "model": converted.model, "source": source.name}
    partial = target.with_name(f".{target.name}.partial")
    try:
        # Slices of one tensor share memory, which the format does not allow.
        save_file(
            {name: x.clone(memory_format=torch.contiguous_format) for name, x in converted.weights.items()},
            partial,
            metadata,
        )
        checksum = hashlib.sha256()
        with partial.open("rb") as file:
            while chunk := file.read(1 << 20):
                checksum.update(chunk)
        digest = checksum.hexdigest()
        os.replace(partial, target)
        partial.write_text(f"{digest}  {target.name}\n", encoding="utf-8")
        os.replace(partial, f"{target}.sha256")
    finally:
        partial.unlink(missing_ok=True)
    return digest


if __name__ == "__main__":
    sys.exit(main())
