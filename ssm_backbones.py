"""The command line, ``ssm-backbones COMMAND``, also as ``python -m ssm_backbones`` and ``python -m backbones``.

It stands outside of the package ``backbones``, whose import loads PyTorch and timm: help appears at once, and what
OpenMP reads from the environment is set before PyTorch is loaded.
"""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        module: its ``main(argv, prog)`` does the work and returns the exit status.
        summary: one line for the list of commands.
        runs_models: whether it trains or evaluates, for which OpenMP must not spin.
    """

    module: str
    summary: str
    runs_models: bool = False


COMMANDS = {
    "models": Command("backbones.commands.models", "list the models: cost, accuracy, weights"),
    "demo": Command("backbones.commands.demo", "make scanned digits, train on them and test: a first run", True),
    "train": Command("backbones.commands.train", "train a classifier, detector or segmentor from a config", True),
    "test": Command("backbones.commands.test", "evaluate a checkpoint on the test data of a config", True),
    "inference": Command("backbones.commands.inference", "show what a trained model finds in images", True),
    "export": Command("backbones.commands.export", "write a model as ONNX or as a torch.export program"),
    "convert": Command("backbones.commands.convert", "convert an official weight file to safetensors"),
    "flops": Command("backbones.commands.flops", "count parameters, operations and activations"),
    "visualize": Command("backbones.commands.visualize", "draw scan orders, receptive fields, attention and features"),
    "browse": Command("backbones.commands.browse", "draw the images and annotations that a config feeds", True),
    "analyze": Command("backbones.commands.analyze", "compare the curves of training runs"),
    "benchmark": Command("backbones.commands.benchmark", "time operators and models on this machine"),
    "doctor": Command("backbones.doctor", "check this installation"),
    "data digits": Command("backbones.commands.digits", "make a small data set of scanned digits"),
    "data tissue": Command("backbones.commands.tissue", "make a small data set of stained tissue"),
}

# Packages that not every installation has, by the extra that brings them.
EXTRAS = {
    "mm": (
        *("contourpy", "cv2", "matplotlib", "mmcv", "mmdet", "mmengine", "mmseg", "pycocotools", "scipy"),
        *("skimage", "sklearn", "tensorboard", "torchvision"),
    ),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "triton": ("triton",),
}


def main(argv: Sequence[str] | None = None, prog: str = "ssm-backbones") -> int:
    """Runs the command that ``argv`` begins with; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return run(name, argv[words:], f"{prog} {name}")
    within = argv[0] if argv and any(name.startswith(f"{argv[0]} ") for name in COMMANDS) else ""
    parser = _parser(within, prog)
    args, rest = parser.parse_known_args(argv[1:] if within else argv)
    if not rest and not args.version:
        parser.print_help()
        return 2
    import backbones
    from backbones.suggest import did_you_mean

    if args.version:
        print(f"ssm-backbones {backbones.__version__}")
        return 0
    known = [name.removeprefix(f"{within} ") for name in COMMANDS if name.startswith(within)]
    print(f"{parser.prog}: error: unknown command {rest[0]!r}{did_you_mean(rest[0], known)}", file=sys.stderr)
    return 2


def run(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one command; returns the exit status.

    Args:
        name: a key of :data:`COMMANDS`.
        argv: its arguments, by default those of this process.
        prog: how the user called it, by default the name of the script that runs.
    """
    prog = prog or Path(sys.argv[0]).name
    command = COMMANDS[name]
    if command.runs_models:
        # Must come before PyTorch. Threads that spin while they wait stall small models on a busy machine: on two
        # shared cores a step of vim_tiny at 24 x 24 took 9 s instead of 0.3 s.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        importlib.import_module("backbones")
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises a RuntimeError
        print(
            f"{prog}: error: the library does not import ({error}); run: {sys.executable} -m pip install "
            "--force-reinstall torch torchvision timm packaging",
            file=sys.stderr,
        )
        return 2
    try:
        status: int = importlib.import_module(command.module).main(argv, prog)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(
            f"{prog}: error: {package} is not installed; install it with: pip install 'ssm-backbones[{extra}]'",
            file=sys.stderr,
        )
        return 2
    return status


def _parser(within: str, prog: str) -> ArgumentParser:
    """For help; its commands are all of them, or those that begin with the word ``within``."""
    names = [name for name in COMMANDS if not within or name.startswith(f"{within} ")]
    width = max(map(len, names))
    parser = ArgumentParser(
        prog=f"{prog} {within}".strip(),
        usage="%(prog)s COMMAND ...",
        description="Visual state-space backbones for timm and OpenMMLab." if not within else None,
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name.removeprefix(f'{within} '):{width}}  {COMMANDS[name].summary}" for name in names),
                "",
                f"{prog} COMMAND --help tells more.",
            ]
        ),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(version=False)
    if not within:
        parser.add_argument("--version", action="store_true", help="print the version and leave")
    return parser


if __name__ == "__main__":
    sys.exit(main(prog="python -m ssm_backbones"))
