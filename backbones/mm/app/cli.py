"""Shared by the command line tools: reading a config, checking packages and data before the run, plain messages."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config, DictAction

from backbones import configs
from backbones.mm.app.console import hidden_prints
from backbones.mm.app.options import check_options, spread_classes
from backbones.mm.data.annotations import check_annotations
from backbones.mm.data.datasets import check_class_folders
from backbones.mm.errors import UserError
from backbones.processes import leave_process_group
from backbones.weights import CheckpointError

# What a config may need beyond mmengine.
_PACKAGES = ("mmdet", "mmseg")


def add_common_arguments(parser: ArgumentParser) -> None:
    """Arguments of every tool that runs a config."""
    parser.add_argument("--work-dir", help="where checkpoints and logs go (default: work_dirs/<config>)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change the config, for example optim_wrapper.optimizer.lr=1e-3",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="several processes")
    parser.add_argument("--verbose", action="store_true", help="print on the console what the log file gets")


def load_config(args: Namespace, loaders: Sequence[str] = ()) -> Config:
    """`read_config` with ``args.config`` and the arguments of `add_common_arguments`."""
    return read_config(args.config, loaders, args.cfg_options, args.work_dir, args.launcher, args.verbose)


def read_config(
    name: str | Path,
    loaders: Sequence[str] = (),
    options: dict[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
    verbose: bool = False,
) -> Config:
    """Read a config, change it, and check packages and data.

    Args:
        name: a file, the name of a config that comes with the package, or the work directory of a run, which holds the
            run's config.
        loaders: data loaders that are going to be used, such as "test_dataloader"; their annotations are checked
            unless the config says ``check_annotations=False``.
        options: what ``--cfg-options`` says.
        work_dir: None is that of the run or of the config, or one that is called as the config.

    Raises:
        UserError: no such config, an option or numbers of classes that cannot be meant, a package that is missing, a
            data folder that does not exist, or annotations that do not match.
    """
    try:
        path = configs.find(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        config = Config.fromfile(path)
    except ImportError as error:
        raise UserError(f"config {path} imports what is not installed: {error}") from error
    config.verbose = verbose
    _import_packages(config)  # whose types tell what options there are
    options = options or {}
    check_options(config, options)
    config.merge_from_dict(options)
    spread_classes(config, options)
    config.launcher = launcher
    run = str(name) if Path(name).is_dir() else None
    config.work_dir = work_dir or run or config.get("work_dir") or str(Path("work_dirs", path.stem))
    _import_packages(config)
    for root in sorted({root for loader in loaders for root in _data_roots(config.get(loader))}):
        if not Path(root).is_dir():
            raise UserError(f"data folder {root} does not exist; {config.get('data_hint', 'set data_root')}")
    if loaders:
        check_class_folders(config)
    if config.get("check_annotations", True):
        check_annotations(config, loaders)
    return config


def run_tool(prog: str, run: Callable[[Namespace], None], args: Namespace) -> int:
    """Call ``run``; returns the exit status: 2 with one line on stderr for an error of the user's, 130 for Ctrl-C.

    Args:
        prog: how the user called the tool.
    """
    try:
        run(args)
        if dist.is_initialized():
            leave_process_group()
    except (UserError, CheckpointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _import_packages(config: Config) -> None:
    """Import mmdet and mmseg where the config asks for them."""
    types = {value.split(".")[0] for value in _types(config) if "." in value}
    for package in _PACKAGES:
        if config.get("default_scope") != package and package not in types:
            continue
        try:
            with hidden_prints(config.verbose):
                for module in ("models", "datasets", "evaluation"):
                    importlib.import_module(f"{package}.{module}")
        # The packages assert that mmcv has a version that they know.
        except (ImportError, AssertionError) as error:
            raise UserError(
                f"{config.filename} needs {package}, which cannot be imported ({error}); "
                "install it with: pip install 'ssm-backbones[mm]'"
            ) from error


def _types(config: Any) -> Iterator[str]:
    if isinstance(config, dict | Config):
        for key, value in config.items():
            if key == "type" and isinstance(value, str):
                yield value
            else:
                yield from _types(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _types(value)


def _data_roots(config: Any) -> Iterator[str]:
    """Every ``data_root`` of a data loader, however deep the data set is wrapped."""
    if isinstance(config, dict | Config):
        for key, value in config.items():
            if key == "data_root" and isinstance(value, str):
                yield value
            else:
                yield from _data_roots(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _data_roots(value)
