#!/usr/bin/env python
"""Measures on the digits what token reduction costs and what pre-training without labels gains; writes CSV files.

    python tools/study_digits.py tokens          accuracy at keep ratios 1, 0.8 and 0.6, with and without fine-tuning
    python tools/study_digits.py pretraining     a tenth of the labels, from scratch and after SimMIM and MAE

Each takes some minutes on one core. The digits are made where there are none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from backbones.commands import digits  # noqa: E402
from backbones.commands.bench.measure import conditions  # noqa: E402
from backbones.commands.benchmark import write_csv  # noqa: E402
from backbones.mm.app.cli import read_config  # noqa: E402
from backbones.mm.engine.runner import Runner  # noqa: E402

Row = dict[str, object]
KEEP = (1.0, 0.8, 0.6)


def tokens(args: argparse.Namespace, pool: Executor) -> list[Row]:
    """Trains whole models, and goes on with fewer tokens from each, at a tenth of the learning rate."""
    config = "digits/vim-narrow_digits.py"
    weights, tuned = {}, {}
    for seed in args.seeds:
        weights[seed] = Path(args.work_dir, f"whole_{seed}")
    list(pool.map(train, repeat(config), weights.values(), args.seeds, repeat(args.epochs)))
    for seed, keep in product(args.seeds, KEEP):
        fewer = {} if keep == 1 else {"model.network.token_reduction": {"schedule": dict.fromkeys((1, 2, 3), keep)}}
        options = fewer | _from(weights[seed], headless=False)
        at_once = pool.submit(test, config, Path(args.work_dir, f"keep{keep}_{seed}"), options)
        options = options | {"optim_wrapper.optimizer.lr": 1e-4}
        for epochs in args.tune_epochs:
            folder = Path(args.work_dir, f"tuned{keep}_{epochs}_{seed}")
            tuned[seed, keep, epochs] = at_once, pool.submit(train, config, folder, seed, epochs, options)
    return [
        {"seed": seed, "keep": keep, "epochs": epochs, "at once": before.result(), "fine-tuned": after.result()}
        for (seed, keep, epochs), (before, after) in tuned.items()
    ]


def pretraining(args: argparse.Namespace, pool: Executor) -> list[Row]:
    """Pre-trains on all images without labels, then trains on 14 labelled images of each digit."""
    folders = {name: Path(args.work_dir, name) for name in ("simmim", "mae")}
    configs = [f"pretraining/{name}_vim-tiny_digits.py" for name in folders]
    list(pool.map(train, configs, folders.values(), repeat(0), repeat(args.epochs)))
    starts = {"scratch": {}, **{name: _from(folder, headless=True) for name, folder in folders.items()}}
    config, found = "pretraining/vim-tiny-patch4_digits.py", {}
    for epochs, seed in product(args.tune_epochs, args.seeds):
        for start, options in starts.items():
            folder = Path(args.work_dir, f"{start}_{epochs}_{seed}")
            found[epochs, seed, start] = pool.submit(train, config, folder, seed, epochs, options)
    return [
        {
            "supervised steps": 7 * epochs,
            "seed": seed,
            **{start: found[epochs, seed, start].result() for start in starts},
        }
        for epochs, seed in product(args.tune_epochs, args.seeds)
    ]


def _from(folder: Path, headless: bool) -> dict[str, Any]:
    """Options that start from the last weights of a run."""
    weights = max(folder.glob("epoch_*.pth"), key=lambda path: path.stat().st_mtime)
    return {
        f"model.init_cfg.{name}": x
        for name, x in {"type": "Pretrained", "checkpoint": str(weights), "headless": headless}.items()
    }


def train(config: str, folder: Path, seed: int, epochs: int, options: dict[str, Any] | None = None) -> float | None:
    """Trains for ``epochs``, a tenth of them to warm up; the accuracy of the last ones' weights, in percent."""
    runner = _runner(config, folder, seed, epochs, options or {})
    runner.train()
    return None if runner.cfg.get("test_dataloader") is None else _top1(runner)


def test(config: str, folder: Path, options: dict[str, Any]) -> float:
    """The accuracy of given weights, in percent."""
    runner = _runner(config, folder, 0, 1, options)
    runner.model.init_weights()
    return _top1(runner)


def _top1(runner: Runner) -> float:
    metrics = runner.test()
    return next(value for name, value in metrics.items() if name.endswith("top1"))


def _runner(config: str, folder: Path, seed: int, epochs: int, options: dict[str, Any]) -> Runner:
    cfg = read_config(ROOT / "configs" / config, work_dir=str(folder))
    cfg.merge_from_dict({"randomness.seed": seed, "train_cfg.max_epochs": epochs, **options})
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(loader) is not None:
            cfg[loader].dataset.data_root = str(DATA)
    warm_up = max(epochs // 10, 1)
    cfg.param_scheduler[0].end = cfg.param_scheduler[1].begin = warm_up
    cfg.param_scheduler[1].end = epochs
    if cfg.get("val_cfg") is not None:
        cfg.train_cfg.val_interval = epochs
    cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "interval": epochs, "save_last": True}
    for hook in ("report", "progress"):
        cfg.default_hooks.pop(hook)
    cfg.custom_hooks, cfg.experiment_name = [], folder.name
    return Runner.from_cfg(cfg)


DATA = Path("data", "digits")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="tokens|pretraining")
    for study, epochs, tune in ((tokens, 10, [10]), (pretraining, 15, [10, 40])):
        command = commands.add_parser(study.__name__, help=study.__doc__)
        command.set_defaults(study=study)
        command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        command.add_argument("--epochs", type=int, default=epochs, help="of the run that weights are taken from")
        command.add_argument("--tune-epochs", nargs="+", type=int, default=tune, help="of the runs that go on")
        command.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
        command.add_argument("--work-dir", default=f"work_dirs/study_{study.__name__}")
        results = ROOT / "benchmarks" / "results" / f"digits_{study.__name__}.csv"
        command.add_argument("--csv", type=Path, default=results, help="the file to write")
    args = parser.parse_args(argv)
    if not DATA.is_dir():
        digits.main(["--out", str(DATA)])
    torch.set_num_threads(1)
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = args.study(args, pool)
    facts = conditions(argparse.Namespace(seeds=args.seeds, epochs=args.epochs, tune_epochs=args.tune_epochs))
    write_csv(args.csv, rows, facts)
    print(args.csv.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
