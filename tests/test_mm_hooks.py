"""Hooks alone, with a run that only says where it stands: seeds, validations that are due, the time that is left."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from backbones.mm.data.datasets import RepeatedAugmentationSampler
from backbones.mm.engine import hooks
from backbones.mm.engine.hooks import ProgressHook, ResumeHook, validation_due


def numbers(
    monkeypatch: pytest.MonkeyPatch, moment: str, rank: int = 0, seed: int = 0, iteration: int = 3
) -> list[float]:
    """One random number of each library after a moment of a run."""
    monkeypatch.setattr(hooks, "get_rank", lambda: rank)
    run: Any = SimpleNamespace(seed=seed, iter=iteration)
    hook = ResumeHook()
    if moment == "epoch":
        hook.before_train_epoch(run)
    elif moment == "before":
        hook.before_train_iter(run, 0)
    else:
        hook.after_train_iter(run, 0)
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("moment", ["epoch", "before", "after"])
def test_every_rank_seed_and_iteration_draws_its_own_numbers(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    first = numbers(monkeypatch, moment)
    assert numbers(monkeypatch, moment) == first
    for changed in ({"rank": 1}, {"seed": 1}, {"iteration": 4}):
        assert all(a != b for a, b in zip(first, numbers(monkeypatch, moment, **changed), strict=True)), changed


def test_data_that_start_anew_are_drawn_as_those_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers(monkeypatch, "after", iteration=3) == numbers(monkeypatch, "epoch", iteration=4)
    assert numbers(monkeypatch, "before") != numbers(monkeypatch, "epoch")


def test_ranks_share_the_order_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def indices(rank: int, world_size: int) -> list[int]:
        monkeypatch.setattr("backbones.mm.data.datasets.get_rank", lambda: rank)
        monkeypatch.setattr("backbones.mm.data.datasets.get_world_size", lambda: world_size)
        sampler = RepeatedAugmentationSampler(range(768), num_repeats=3, seed=5)
        sampler.set_epoch(2)
        return list(sampler)

    whole = indices(0, 1)
    assert [indices(rank, 2) for rank in (0, 1)] == [whole[0::2], whole[1::2]]


def loop(kind: type, last: int, interval: int, begin: int = 1) -> Any:
    """A train loop that has not been run."""
    made = kind.__new__(kind)
    made.val_interval, made.val_begin = interval, begin
    setattr(made, "_max_epochs" if kind is EpochBasedTrainLoop else "_max_iters", last)
    return made


@pytest.mark.parametrize("kind", [EpochBasedTrainLoop, IterBasedTrainLoop])
@pytest.mark.parametrize(
    ("last", "interval", "begin", "due"),
    [(12, 5, 1, [5, 10, 12]), (4, 4, 1, [4]), (6, 2, 3, [4, 6]), (3, 10, 1, [3]), (3, 1, 5, [])],
)
def test_validation_is_due_at_the_last_step(kind: type, last: int, interval: int, begin: int, due: list[int]) -> None:
    run: Any = SimpleNamespace(train_loop=loop(kind, last, interval, begin), val_loop=object())
    assert [step for step in range(1, last + 1) if validation_due(run, step)] == due
    run.val_loop = None
    assert not any(validation_due(run, step) for step in range(1, last + 1))


@pytest.mark.parametrize("start", [0, 100])
def test_the_time_left_counts_from_where_the_run_began_or_resumed(
    start: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: clock[0])
    run: Any = SimpleNamespace(
        iter=start,
        max_iters=200,
        experiment_name="run_20260101_000000",
        model=torch.nn.Linear(1, 1),
        train_dataloader=SimpleNamespace(dataset=range(3)),
        train_loop=loop(IterBasedTrainLoop, 200, 10),
    )
    hook = ProgressHook()
    hook.before_train(run)
    printed = capsys.readouterr().out
    assert ("resumed after iteration 100/200" in printed) == bool(start)
    clock[0] += 20
    hook._report(run, "step", start + 10, {})
    # 2 s for each of the iterations that are left.
    left = {0: "0:06:20", 100: "0:03:00"}[start]
    assert capsys.readouterr().out == f"step  20.0 s  {left} left\n"
    clock[0] += 10
    hook._report(run, "step", start + 20, {})  # 1.5 s for each
    left = {0: "0:04:30", 100: "0:02:00"}[start]
    assert capsys.readouterr().out == f"step  10.0 s  {left} left\n"
    hook._report(run, "end", 200, {})
    assert "left" not in capsys.readouterr().out
