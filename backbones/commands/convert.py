"""Convert a weight file of one of the seven families into a safetensors file that loads through timm.

    ssm-backbones convert vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny.safetensors --check

IN is an official file, a training state, one of ours, or a detector or segmentor around such a backbone. Names and
shapes tell which model it is. OUT.safetensors.sha256 holds the checksum, for `sha256sum --check`. What was dropped is
listed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from backbones.commands.progress import progress_line
from backbones.conversion import Converted, convert, identify, load_call, model_names
from backbones.models import family_names
from backbones.suggest import did_you_mean
from backbones.weights import CheckpointError, files

AVERAGED = ("model_ema", "state_dict_ema", "ema_model")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", type=Path, help="weight file: .pth, .ckpt, .safetensors, ...")
    parser.add_argument("output", metavar="OUT.safetensors", type=Path, nargs="?", help="not needed with --check")
    parser.add_argument("--model", metavar="NAME", help="registered name (default: recognised)")
    parser.add_argument(
        "--img-size",
        metavar=("HEIGHT", "WIDTH"),
        type=int,
        nargs=2,
        help="images that a plain model was made for, where the file does not tell and they are not square",
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a training state")
    parser.add_argument(
        "--check",
        action="store_true",
        help="also load the result into the model and look at its values; without OUT nothing is written",
    )
    args = parser.parse_args(argv)
    try:
        run(args.input, args.output, args.model, args.ema, args.check, args.img_size)
    except (CheckpointError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    source: Path, target: Path | None, model: str | None, ema: bool, check: bool, img_size: Sequence[int] | None = None
) -> None:
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
        raise CheckpointError(f"--model: got {model!r}, expected a registered name{did_you_mean(model, model_names())}")

    if target is not None:  # tells before the work whether it can be written
        for path in (target, checksum_of(target)):
            reserve(path).unlink()
    with progress_line() as show:
        show(f"reading {source.name}")
        content = files.load(source)
        try:
            show(f"recognising the model of {source.name}")
            name = model or identify(files.select(content, source))
            published: Any = timm.create_model(name, device="meta").weight_keys
            keys = AVERAGED if ema else published
            key = files.weight_key(content, keys)
            if ema and key is None:
                raise CheckpointError(f"holds no averaged weights: none of {', '.join(AVERAGED)}")
            weights = files.select(content, source, keys)
            show(f"converting to {name}")
            converted = convert(weights, name, (img_size[0], img_size[1]) if img_size else None)
            if check:
                show(f"loading into {name}")
                try_loading(converted)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
        if target is not None:
            show(f"writing {target.name}")
            digest = write(target, converted, source)

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
        print(f"{target}: {len(converted.weights)} tensors, sha256 {digest}")
        print(f"load it with {load_call(converted, str(target))}")


def try_loading(converted: Converted) -> None:
    """Loads the weights as timm would from the file, and looks at the values.

    Raises:
        CheckpointError: the model did not take a tensor as it is; all are named.
    """
    weights = OrderedDict(converted.weights)
    if grid := converted.weights.grids.get("pos_embed"):
        weights._metadata = {"": {files.GRID: grid}}  # type: ignore[attr-defined]  # as in a state dict of ours
    overlay = {"state_dict": weights}
    model = timm.create_model(converted.model, True, pretrained_cfg_overlay=overlay, **converted.arguments)
    loaded = getattr(model, "model", model).state_dict()  # timm wraps a model that gives features only
    altered = [name for name, x in loaded.items() if not torch.equal(x, converted.weights[name].to(x.dtype))]
    if altered:
        raise CheckpointError(f"{converted.model} loads it, but these are altered: {', '.join(altered)}")


def write(target: Path, converted: Converted, source: Path) -> str:
    """Writes the weights and their checksum, both complete or none at all; returns the SHA-256.

    Raises:
        OSError: they cannot be written.
    """
    metadata = {"format": "pt", "model": converted.model, "source": source.name}
    if grid := converted.weights.grids.get("pos_embed"):
        metadata[files.GRID] = f"{grid[0]} x {grid[1]}"
    partial, partial_sum = reserve(target), reserve(checksum_of(target))
    try:
        mode = partial.stat().st_mode & 0o777
        # Slices of one tensor share memory, which the format does not allow.
        save_file(
            {name: x.clone(memory_format=torch.contiguous_format) for name, x in converted.weights.items()},
            partial,
            metadata,
        )
        partial.chmod(mode)  # the writer gives its file to the owner alone
        checksum = hashlib.sha256()
        with partial.open("rb") as file:
            while chunk := file.read(1 << 20):
                checksum.update(chunk)
        digest = checksum.hexdigest()
        partial_sum.write_text(f"{digest}  {target.name}\n", encoding="utf-8")
        os.replace(partial, target)
        os.replace(partial_sum, checksum_of(target))
    except SafetensorError as error:
        raise OSError(f"{target}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
        partial_sum.unlink(missing_ok=True)
    return digest


def checksum_of(target: Path) -> Path:
    """Where the checksum of ``target`` stands."""
    return target.with_name(f"{target.name}.sha256")


def reserve(target: Path) -> Path:
    """An empty file beside ``target``, to be written and then renamed to it.

    Raises:
        OSError: ``target`` is a folder, or its folder cannot be written to.
    """
    if target.is_dir():
        raise IsADirectoryError(f"{target}: is a folder, expected a file to write")
    partial = target.with_name(f".{target.name}.partial")
    partial.touch()
    return partial
