"""Export a model to ONNX or as a torch.export program, and compare what it computes there.

    ssm-backbones export vmamba_tiny_s1l8 --checkpoint vmamba_tiny.safetensors --onnx vmamba_tiny.onnx

The image size is fixed, the batch size is not. An ONNX file needs no custom operator. A program (.pt2) keeps the scan
as one operator: import backbones.ops before torch.export.load.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from backbones import ops
from backbones.commands.outputs import unwritable
from backbones.commands.progress import progress_line
from backbones.export import export_onnx, export_program
from backbones.models import family_names
from backbones.suggest import did_you_mean
from backbones.weights import CheckpointError

TOLERANCE = 1e-4  # of the largest output; float32 in another order of summation


class ExportError(ValueError):
    """Raised for what cannot be exported, with the reason."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="registered name, such as vim_tiny")
    parser.add_argument("--onnx", metavar="FILE", type=Path, help="write ONNX, and run it in onnxruntime")
    parser.add_argument("--pt2", metavar="FILE", type=Path, help="write a torch.export program, and load it again")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="weights in the official layout or in ours")
    weights.add_argument("--pretrained", action="store_true", help="download the released weights")
    parser.add_argument("--img-size", nargs="+", type=int, metavar="PIXELS", help="side, or height and width")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes of the checkpoint (default: 1000)")
    parser.add_argument("--features", action="store_true", help="give feature maps instead of logits")
    parser.add_argument("--scan-backend", metavar="NAME", help="of the program: naive runs anywhere (default: fastest)")
    args = parser.parse_args(argv)
    # Its remarks on constants that it does not fold are of no use to a user.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        run(args)
    except (ExportError, CheckpointError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Exports and compares; a file appears under its name only when what it computes agrees.

    Raises:
        ExportError: unusable arguments, a missing package, or outputs that differ.
        CheckpointError, OSError: unusable weights, or a file that cannot be written.
    """
    _check_arguments(args)
    cfg: Any = timm.create_model(args.name, device="meta").pretrained_cfg
    height, width = (args.img_size * 2)[:2] if args.img_size else cfg["input_size"][1:]
    image = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    if not args.checkpoint and not args.pretrained:
        print(f"{args.name}: random weights; --checkpoint or --pretrained takes trained ones")
    img_size = {"img_size": (height, width)} if cfg["fixed_input_size"] else {}
    if args.onnx is not None:
        model = _create(args, "naive", img_size)
        _write(args.onnx, model, image, export_onnx, _load_onnx)
    if args.pt2 is not None:
        model = _create(args, args.scan_backend, img_size)
        _write(args.pt2, model, image, _save_program, _load_program)


def _check_arguments(args: argparse.Namespace) -> None:
    names = timm.list_models(module=list(family_names()))
    if args.name not in names:
        raise ExportError(f"unknown model {args.name!r}{did_you_mean(args.name, names)}")
    if args.onnx is None and args.pt2 is None:
        raise ExportError("nothing to write: give --onnx FILE, --pt2 FILE, or both")
    for option, path, suffix in (("--onnx", args.onnx, ".onnx"), ("--pt2", args.pt2, ".pt2")):
        if path is not None and (reason := unwritable(path, suffix)):
            raise ExportError(f"{option}: {reason}")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 32):
        raise ExportError(f"--img-size: got {args.img_size}, expected one or two sides of at least 32 pixels")
    reason = ops.backends().get(args.scan_backend, "no such backend") if args.scan_backend else None
    if reason is not None:
        raise ExportError(f"--scan-backend {args.scan_backend}: {reason}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if args.onnx is not None and missing:
        raise ExportError(f"--onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _create(args: argparse.Namespace, backend: str | None, img_size: dict[str, Any]) -> nn.Module:
    arguments: dict[str, Any] = {"scan_backend": backend, "features_only": args.features, **img_size}
    if args.num_classes is not None:
        arguments["num_classes"] = args.num_classes
    if args.checkpoint:
        arguments["pretrained_cfg_overlay"] = {"file": args.checkpoint}
    return timm.create_model(args.name, bool(args.checkpoint or args.pretrained), **arguments).eval()


def _write(
    path: Path,
    model: nn.Module,
    image: Tensor,
    export: Callable[[nn.Module, Tensor, Path], None],
    load: Callable[[Path], Callable[[Tensor], Sequence[Tensor]]],
) -> None:
    """Exports beside ``path``, compares the outputs for one image and for three, and only then takes the name."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with progress_line() as show:
            show(f"exporting {path.name}")
            export(model, image, partial)
            show(f"loading {path.name}")
            run, errors = load(partial), []
            for batch in (image[:1], image):
                show(f"comparing {path.name} with PyTorch, batch {len(batch)}")
                with torch.no_grad():
                    expected = model(batch)
                expected = [expected] if isinstance(expected, Tensor) else expected
                for found, wanted in zip(run(batch), expected, strict=True):
                    errors.append((found - wanted).abs().max() / wanted.abs().max())
        worst = torch.stack(errors).max().item()  # NaN where one is, unlike Python's max
        if not worst <= TOLERANCE:
            raise ExportError(
                f"{path.name}: not written, its outputs differ from PyTorch's by {worst:.1e} of the largest"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    size = path.stat().st_size / 1e6
    print(
        f"{path}: {size:.1f} MB, images of {image.shape[2]} x {image.shape[3]} pixels, "
        f"outputs within {worst:.1e} of PyTorch's"
    )


def _load_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(y) for y in session.run(None, {"image": image.numpy()})]


def _save_program(model: nn.Module, image: Tensor, path: Path) -> None:
    torch.export.save(export_program(model, image), path)


def _load_program(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    program = torch.export.load(path).module()

    @torch.no_grad()
    def run(image: Tensor) -> Sequence[Tensor]:
        y = program(image)
        return [y] if isinstance(y, Tensor) else y

    return run
