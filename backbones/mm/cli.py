"""What the command line tools share: reading a config, a look at the data before the run, plain messages."""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config, DictAction

from backbones.checkpoints import CheckpointError

from .errors import UserError


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


def load_config(args: Namespace) -> Config:
    """Read ``args.config``, apply the common arguments and check that the data are there.

    Raises:
        UserError: no such config, or a data folder that does not exist.
    """
    path = Path(args.config)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, (p.name for p in path.parent.glob("*.py")), n=3)
        raise UserError(f"config {path} does not exist{'; did you mean ' + ', '.join(near) + '?' if near else ''}")
    config = Config.fromfile(path)
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
    config.launcher = args.launcher
    config.verbose = args.verbose
    config.work_dir = args.work_dir or config.get("work_dir") or str(Path("work_dirs", path.stem))
    for root in sorted(set(_data_roots(config))):
        if not Path(root).is_dir():
            raise UserError(f"data folder {root} does not exist; {config.get('data_hint', 'set data_root')}")
    return config


def run_tool(main: Callable[[], Any]) -> None:
    """Call ``main``; an error of the user's ends it with the message and status 2, Ctrl-C with 130."""
    try:
        main()
        if dist.is_initialized():
            # Gloo's threads would abort a process that ends without this.
            dist.destroy_process_group()
    except (UserError, CheckpointError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def _data_roots(config: Any) -> Iterator[str]:
    """Every ``data_root`` of the data loaders, however deep the dataset is wrapped."""
    if isinstance(config, dict | Config):
        for key, value in config.items():
            if key == "data_root" and isinstance(value, str):
                yield value
            else:
                yield from _data_roots(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _data_roots(value)
