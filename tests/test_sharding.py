"""Training with fully sharded models (FSDP2) in two processes against data-parallel copies.

The processes talk through gloo, on the CPU, or through NCCL where there are two GPUs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.image_folders import write_images

pytest.importorskip("mmengine")

from backbones.mm import UserError
from backbones.mm.engine.checkpoints import read_checkpoint
from backbones.mm.engine.graphs import CudaGraphsHook
from backbones.mm.engine.sharding import FullyShardedModel
from tests.scripts import ROOT, call_tool, environment_of_two

# Absolute, after eight steps: sums of gradients are rounded in another order. Gradients that are clipped by the norm
# of a share, or averages of one, are 0.01 away.
TOLERANCE = 5e-6
# One model of each base; the second has batch norms, whose statistics are averaged, too.
NETWORKS = {
    "plain": dict(name="vim_tiny", img_size=32, patch_size=8, depth=2, embed_dim=32),
    "hierarchical": dict(name="efficientvmamba_tiny", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
}
# Everything that looks at parameters: rates by layer, clipping, an optimizer with state, averages, another schedule.
CONFIG = """
_base_ = ["{root}/configs/digits/vim-tiny_digits.py"]
model = dict(network=dict(_delete_=True, num_classes=4, **{network}))
data = dict(data_root="{folder}/images", num_classes=4, transform=dict(_delete_=True, input_size=32))
num_classes = 4
train_cfg = dict(max_epochs=2)
train_dataloader = dict(batch_size=4, dataset=data)
val_dataloader = dict(batch_size=3, dataset=data)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 2))
test_evaluator = val_evaluator
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.1, eps=0.1, weight_decay=0.05),
    clip_grad=dict(max_norm=0.05),
    paramwise_cfg=dict(layer_decay=0.7),
)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=8)]
custom_hooks = [dict(type="EMAHook", momentum=0.3, update_buffers=True)]
default_hooks = dict(logger=dict(interval=1))
visualizer = dict(vis_backends=[dict(type="LocalVisBackend")])
"""
WORKER = """
import torch
from mmengine.config import Config
from backbones.mm import Runner
from backbones.processes import leave_process_group

def train(name, run, **settings):
    config = Config.fromfile(name + ".py")
    config.merge_from_dict({"work_dir": run, "experiment_name": run, "launcher": "pytorch", **settings})
    runner = Runner.from_cfg(config)
    runner.train()
    return runner

sharded = {"model_wrapper_cfg": {"type": "FullyShardedModel"}}
for name in ("plain", "hierarchical"):
    train(name, name + "_copies")
    runner = train(name, name + "_sharded", **sharded)
    own = sum(x.to_local().numel() for x in runner.model.parameters())
    print("share", name, own / sum(x.numel() for x in runner.model.parameters()), flush=True)
    train(name, name + "_resumed", **sharded, resume=True, load_from=name + "_sharded/epoch_1.pth")
train("plain", "as_copies", resume=True, load_from="plain_sharded/epoch_1.pth")
train("hierarchical", "from_copies", **sharded, resume=True, load_from="hierarchical_copies/epoch_1.pth")
still = {"optim_wrapper.optimizer.lr": 0.0, "train_cfg.max_epochs": 1}
train("plain", "started", **sharded, **still, load_from="plain_copies/epoch_2.pth")
accumulated = {"optim_wrapper.accumulative_counts": 2}
# A scale at which the first gradients overflow: all processes have to leave out the same steps.
half = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.dtype": "float16"}
half["optim_wrapper.loss_scale"] = {"init_scale": 2.0**20}
for name, settings in {"accumulated": accumulated, "half": half | accumulated}.items():
    if name != "half" or torch.cuda.is_available():
        train("plain", name + "_copies", **settings)
        train("plain", name + "_sharded", **sharded, **settings)
del runner
leave_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 training and 12 validation images of four classes, and a config for each model."""
    path = tmp_path_factory.mktemp("sharding")
    write_images(path / "images", {"train": 8, "val": 3}, classes=4, side=32)
    for name, network in NETWORKS.items():
        (path / f"{name}.py").write_text(CONFIG.format(root=ROOT, folder=path, network=network))
    return path


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What two processes print that train every model in both ways."""
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "worker.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment_of_two(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkpoint(folder: Path, run: str, epoch: int = 2) -> dict[str, Any]:
    return read_checkpoint(folder / run / f"epoch_{epoch}.pth")


def assert_same(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Compares what checkpoints hold, tensors within ``tolerance``."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, x in expected.items():
            assert_same(found[key], x, tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, x in enumerate(expected):
            assert_same(found[i], x, tolerance, f"{where}.{i}")
    elif isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor and found.device.type == "cpu", where
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{where}: {text}")
    else:
        assert found == expected, where


KEYS = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sharded_training_equals_copies(folder: Path, printed: str, name: str) -> None:
    found, expected = (checkpoint(folder, f"{name}_{way}") for way in ("sharded", "copies"))
    for key in KEYS:
        assert_same(found[key], expected[key], TOLERANCE, key)
    lines = [line for line in printed.splitlines() if line.startswith(f"share {name} ")]
    assert len(lines) == 2 and all(0.45 < float(line.split()[-1]) < 0.55 for line in lines)
    # The norm that is logged is the whole gradient's.
    norms = [x["message_hub"]["log_scalars"]["train/grad_norm"]["history"] for x in (found, expected)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)
    assert min(norms[0]) > 0.05  # clipped
    # Training moved the weights far, by another rate in every layer.
    first = checkpoint(folder, f"{name}_copies", 1)["state_dict"]
    assert max((x - first[key]).abs().max() for key, x in expected["state_dict"].items()) > 1000 * TOLERANCE
    assert len({group["lr"] for group in found["optimizer"]["param_groups"]}) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "accumulated",
        pytest.param("half", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="float16 needs GPUs")),
    ],
)
def test_accumulated_gradients_equal_those_of_copies(folder: Path, printed: str, name: str) -> None:
    found, expected = (checkpoint(folder, f"{name}_{way}") for way in ("sharded", "copies"))
    for key in KEYS:
        assert_same(found[key], expected[key], TOLERANCE, key)
    steps = found["optimizer"]["state"][0]["step"]
    if name == "half":
        assert 0 < steps < 4
        assert found["optimizer"]["loss_scaler"]["scale"] < 2.0**20
    else:
        assert steps == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sharded_training_resumes_exactly(folder: Path, printed: str, name: str) -> None:
    found, expected = (checkpoint(folder, f"{name}_{way}") for way in ("resumed", "sharded"))
    for key in KEYS:
        assert_same(found[key], expected[key], 0, key)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "like"), [("as_copies", "plain_copies"), ("from_copies", "hierarchical_copies")])
def test_either_way_resumes_the_other(folder: Path, printed: str, run: str, like: str) -> None:
    found, expected = checkpoint(folder, run), checkpoint(folder, like)
    for key in KEYS:
        assert_same(found[key], expected[key], TOLERANCE, key)


@pytest.mark.slow
def test_one_process_resumes_and_tests_a_sharded_run(
    folder: Path, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vim alone: batch norms take the statistics of a process's own images."""
    monkeypatch.chdir(folder)
    shutil.copytree("plain_sharded", "alone")
    Path("alone/epoch_2.pth").unlink()
    options = ["train_dataloader.batch_size=8", "experiment_name=alone"]
    call_tool("train", "plain.py", "--work-dir", "alone", "--resume", "alone/epoch_1.pth", "--cfg-options", *options)
    found, expected = checkpoint(folder, "alone"), checkpoint(folder, "plain_copies")
    for key in KEYS:
        assert_same(found[key], expected[key], TOLERANCE, key)
    call_tool("test", "hierarchical.py", "hierarchical_sharded/epoch_2.pth", "--work-dir", "tested")
    assert "top1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sharded_run_starts_from_weights(folder: Path, printed: str) -> None:
    """At a learning rate of zero they stay."""
    start, end = checkpoint(folder, "plain_copies"), checkpoint(folder, "started", 1)
    assert_same(end["state_dict"], start["state_dict"], 0)
    assert end["optimizer"]["state"][0]["step"] == 4


def test_a_model_without_such_lists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"units: got \('layers',\), Sequential has no such list of modules"):
        FullyShardedModel(nn.Sequential(nn.Linear(2, 2)), units=("layers",)).shard()


def test_scalar_parameters_are_named() -> None:
    model = nn.Module()
    model.blocks, model.scale = nn.ModuleList([nn.Linear(2, 2)]), nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="FullyShardedModel: parameter scale is a scalar"):
        FullyShardedModel(model).shard()


def test_an_older_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    with pytest.raises(UserError, match=r"FullyShardedModel: got PyTorch \d.*, expected 2.6 or newer"):
        FullyShardedModel(nn.Sequential(nn.Linear(2, 2))).shard()


def test_graphs_of_a_sharded_model_are_refused() -> None:
    model = FullyShardedModel(nn.Sequential(nn.Linear(2, 2)))
    model.sharded = True
    with pytest.raises(UserError, match="CudaGraphsHook: a graph cannot gather the weights"):
        CudaGraphsHook().before_train(SimpleNamespace(model=model))
