"""What docs/training.md shows beyond the recipes: accumulation, early stopping, averages, compile, scaled rates, ..."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config

from backbones.mm import Runner, UserError
from backbones.mm.engine.checkpoints import find_latest, read_checkpoint
from backbones.mm.engine.report import find_best
from tests import test_mm_runner
from tests.scripts import call_tool
from tests.test_mm_runner import Interrupt, histories, make_config, train

data_root = test_mm_runner.data_root  # a fixture

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(_base_ = .*?)^```$", PAGE, re.M | re.S)


def snippet(word: str) -> dict[str, Any]:
    """The settings of the one config in the page that has ``word``."""
    (text,) = (text for text in SNIPPETS if word in text)
    settings: dict[str, Any] = {}
    exec(text, {}, settings)
    assert (ROOT / settings.pop("_base_")).is_file()
    return settings


def resumed(data: Path, folder: Path, moment: str, **settings: Any) -> tuple[Runner, Runner]:
    """A run, and the same one that is interrupted in its second epoch and resumed."""
    whole = train(make_config(data, folder / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(make_config(data, folder / "cut", **settings), Interrupt(moment))
    latest = find_latest(folder / "cut")
    assert latest is not None
    return whole, train(make_config(data, folder / "cut", resume=True, load_from=str(latest), **settings))


def assert_same(whole: Runner, again: Runner) -> None:
    assert histories(again) == histories(whole)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_every_snippet_has_a_test() -> None:
    tested = ("accumulative_counts", "EarlyStoppingHook", "EMAHook", "compile", "WandbVisBackend", "report=")
    assert len(SNIPPETS) == len(tested)
    assert all(snippet(word) for word in tested)


def test_accumulated_gradients_are_resumed(
    data_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An epoch of four batches ends amid an accumulation of three: the checkpoint holds gradients of one."""
    settings = snippet("accumulative_counts")
    settings["optim_wrapper"]["accumulative_counts"] = 3
    whole, again = resumed(data_root, tmp_path, "training", **settings)
    assert_same(whole, again)
    assert "Resumed iteration number" not in "".join(capfd.readouterr())
    assert "gradients" in read_checkpoint(tmp_path / "whole" / "epoch_2.pth")
    last = read_checkpoint(tmp_path / "whole" / "epoch_3.pth")
    assert "gradients" not in last  # the last step takes what is left
    # Schedules count batches, not steps: the four of the first epoch warm up.
    rates = histories(whole)["train/lr"]
    assert len(rates) == 12 and rates.index(max(rates)) in (3, 4)


def test_early_stopping_counts_what_was_before_an_interruption(
    data_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (hook,) = snippet("EarlyStoppingHook")["custom_hooks"]
    # The second and third validations do not gain 1000 %, so the run ends behind the third of six epochs.
    settings = {"custom_hooks": [{**hook, "min_delta": 1000, "patience": 2}], "train_cfg.max_epochs": 6}
    whole, again = resumed(data_root, tmp_path, "validating", **settings)
    assert whole.epoch == again.epoch == 3
    assert_same(whole, again)
    assert capsys.readouterr().out.count("stopped early after epoch 3/6") == 2
    assert find_best(tmp_path / "whole").name == find_best(tmp_path / "cut").name
    # Resumed once more, it has nothing to do.
    latest = str(find_latest(tmp_path / "whole"))
    ended = train(make_config(data_root, tmp_path / "whole", resume=True, load_from=latest, **settings))
    assert ended.epoch == 3


def test_a_mistyped_metric_of_early_stopping_is_named(data_root: Path, tmp_path: Path) -> None:
    (hook,) = snippet("EarlyStoppingHook")["custom_hooks"]
    with pytest.raises(RuntimeError, match="top-1"):
        train(make_config(data_root, tmp_path, custom_hooks=[{**hook, "monitor": "accuracy/top-1"}]))


# Dynamo looks at the loss, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_with_averages_and_accumulation(data_root: Path, tmp_path: Path) -> None:
    """Checkpoints are those of the model itself, and what is compiled computes the same."""
    settings = {**snippet("EMAHook"), **snippet("accumulative_counts"), "train_cfg.max_epochs": 1}
    plain = train(make_config(data_root, tmp_path / "plain", **settings))
    assert snippet("compile")["compile"].keys() == {"backend"}
    compiled = train(make_config(data_root, tmp_path / "compiled", compile={"backend": "eager"}, **settings))
    a, b = (read_checkpoint(Path(x.work_dir, "epoch_1.pth"))["state_dict"] for x in (plain, compiled))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)


def test_weights_and_biases_gets_the_scalars(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[str] = []
    stub = ModuleType("wandb")
    stub.init = lambda **_: stub  # type: ignore[attr-defined]
    stub.log = lambda values, **_: logged.extend(values)  # type: ignore[attr-defined]
    stub.config = stub.run = type("Run", (), {"log_code": lambda *_, **__: None, "update": lambda *_, **__: None})()  # type: ignore[attr-defined]
    stub.define_metric = stub.finish = stub.join = lambda *_, **__: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    backends = snippet("WandbVisBackend")["visualizer"]["vis_backends"]
    train(make_config(data_root, tmp_path, **{"visualizer.vis_backends": backends, "train_cfg.max_epochs": 1}))
    assert "loss" in logged and "accuracy/top1" in logged


def test_the_picture_of_a_run_is_named(data_root: Path, tmp_path: Path) -> None:
    settings = {**snippet("report="), "train_cfg.max_epochs": 1}
    hooks = settings.pop("default_hooks")["report"]
    runner = train(
        make_config(data_root, tmp_path, **{f"default_hooks.report.{k}": v for k, v in hooks.items()}, **settings)
    )
    assert Path(runner.work_dir, "training.pdf").read_bytes().startswith(b"%PDF")
    assert not Path(runner.work_dir, "training.png").exists()


def test_the_learning_rate_follows_the_images_of_a_step(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two batches of 8 against a recipe for 64, with groups of other rates."""
    options = {
        "auto_scale_lr": {"base_batch_size": 64},
        "optim_wrapper.accumulative_counts": 2,
        "optim_wrapper.paramwise_cfg": {"custom_keys": {"head": {"lr_mult": 10.0}}},
        "train_cfg.max_epochs": 1,
    }
    config = make_config(data_root, tmp_path / "a", **options)
    config.dump(tmp_path / "a.py")
    monkeypatch.chdir(tmp_path)
    rates = {}
    for name, flags in (("plain", ()), ("scaled", ("--auto-scale-lr",))):
        call_tool("train", "a.py", "--work-dir", name, "--cfg-options", f"experiment_name={name}", *flags)
        groups = read_checkpoint(tmp_path / name / "epoch_1.pth")["optimizer"]["param_groups"]
        rates[name] = sorted(group["initial_lr"] for group in groups)
    assert rates["scaled"] == pytest.approx([x / 4 for x in rates["plain"]])
    assert capsys.readouterr().out.count("learning rate times 0.25: 16 images per step, 64 in the recipe") == 1


def test_a_recipe_without_a_batch_size_is_not_scaled(data_root: Path, tmp_path: Path) -> None:
    config = make_config(data_root, tmp_path)
    config.auto_scale_lr = {"enable": True}
    with pytest.raises(UserError, match="base_batch_size"):
        Runner.from_cfg(Config(config._cfg_dict)).train()
