"""Training in several processes (gloo, on the CPU) against one process with the same total batch.

Where there are two GPUs, the processes take one each and talk through NCCL, with TF32 off. Sums of gradients are
rounded in another order, so weights agree within ``TOLERANCE`` and not exactly. Nothing here is random but the shuffle,
which depends on the seed alone: augmentation and stochastic depth draw other numbers in each process. No network here
has batch norms, whose statistics are each process's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.image_folders import write_images
from tests.scripts import ROOT, environment_of_two

pytest.importorskip("mmengine")

# Absolute, after a few steps of SGD on weights of order 0.1 to 1; gradients that are not averaged give 0.4.
TOLERANCE = 2e-6
CLASSIFIER = """
_base_ = ["{root}/configs/digits/vim-tiny_digits.py"]
custom_imports = dict(imports=["backbones.mm", "{extra}"])
model = dict(network=dict(_delete_=True, name="{network}", img_size=16, patch_size=8, num_classes=4, **{arguments}))
data = dict(data_root="{folder}/images", num_classes=4, transform=dict(_delete_=True, input_size=16))
train_cfg = dict(max_epochs=2)
train_dataloader = dict(batch_size=8, dataset=data)
val_dataloader = dict(batch_size=3, dataset=data)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 2))
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.1, momentum=0.9), clip_grad=None)
param_scheduler = None
visualizer = dict(vis_backends=[dict(type="LocalVisBackend")])
"""
# One stage of losses that are divided by counts over all processes, without random samples of proposals.
DETECTOR = """
_base_ = ["{root}/configs/digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py"]
custom_imports = dict(imports=["backbones.mm"])
widths = [8, 16, 32, 64]
model = dict(
    _delete_=True,
    type="FCOS",
    data_preprocessor=dict(type="DetDataPreprocessor", mean=[127.0] * 3, std=[64.0] * 3, pad_size_divisor=32),
    backbone=dict(type="VMamba", arch="vmamba_tiny_s1l8", model_args=dict(depths=(1, 1, 1, 1), dims=widths)),
    neck=dict(type="FPN", in_channels=widths, out_channels=16, num_outs=4, norm_cfg=dict(type="GN", num_groups=4)),
    bbox_head=dict(
        type="FCOSHead", num_classes=10, in_channels=16, feat_channels=16, stacked_convs=1, strides=[4, 8, 16, 32],
        regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 1e8)), norm_cfg=dict(type="GN", num_groups=4),
    ),
    test_cfg=dict(nms_pre=50, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5),
)
annotations = "{folder}/scenes/annotations/instances_"
train_dataloader = dict(dataset=dict(data_root="{folder}/scenes"))
val_dataloader = dict(batch_size=1, dataset=dict(data_root="{folder}/scenes"))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=annotations + "val.json", metric="bbox")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.01, momentum=0.9), clip_grad=None)
param_scheduler = None
visualizer = dict(vis_backends=[dict(type="LocalVisBackend")])
"""
# Stands for a lost machine: one process dies in the second epoch.
DIE = """
import os, signal
from mmengine.hooks import Hook
from mmengine.runner import Runner

register = Runner.register_default_hooks

class Die(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 5 and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGKILL)

def register_with_it(self, hooks=None):
    register(self, hooks)
    self.register_hook(Die())

Runner.register_default_hooks = register_with_it
"""
# Tells which of gloo's threads live when Python ends.
THREADS = """
import atexit
from pathlib import Path

def tell():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print("gloo's threads at the end:", [name for name in names if "gloo" in name], flush=True)

atexit.register(tell)
"""
# Stands for srun: starts two tasks on this machine, which find its name as Slurm tells it.
SRUN = """
import os, socket, subprocess, sys

with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
path = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), os.environ["PATH"]])
job = dict(PATH=path, MASTER_PORT=str(port), SLURM_NTASKS="2", SLURM_NODELIST="node[1-1]")
tasks = [
    subprocess.Popen(
        [sys.executable, *sys.argv[1:]], env={**os.environ, **job, "SLURM_PROCID": number, "SLURM_LOCALID": number}
    )
    for number in ("0", "1")
]
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostname node[1-1]" ] && echo localhost
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 training and 12 validation images of four classes, and the configs of the tests."""
    path = tmp_path_factory.mktemp("distributed")
    write_images(path / "images", {"train": 8, "val": 3}, classes=4)
    vit = dict(root=ROOT, folder=path, network="test_vit", arguments={})
    vim = dict(vit, network="vim_tiny", arguments={"depth": 2, "embed_dim": 32})
    (path / "vit.py").write_text(CLASSIFIER.format(extra="backbones", **vit))
    (path / "vim.py").write_text(CLASSIFIER.format(extra="backbones", **vim))
    (path / "dying.py").write_text(CLASSIFIER.format(extra="die", **vit))
    (path / "die.py").write_text(DIE)
    (path / "telling.py").write_text(CLASSIFIER.format(extra="threads", **vit))
    (path / "threads.py").write_text(THREADS)
    return path


def start(
    folder: Path, launcher: Sequence[object], *arguments: object, tool: str = "train.py", gpu: int | None = None
) -> subprocess.Popen[str]:
    """The tool in ``folder``; ``launcher`` is what stands before it. Of two GPUs, it sees ``gpu`` alone, or both."""
    environment = environment_of_two(folder)
    if gpu is not None:
        environment.setdefault("CUDA_VISIBLE_DEVICES", str(gpu))
    command = [*launcher, ROOT / "tools" / tool, *arguments]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def stop(process: subprocess.Popen[str]) -> None:
    """Ends the process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[str], succeeds: bool = True) -> str:
    """What the process prints, once it has ended; where it fails, also the errors."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        stop(process)
    assert (process.returncode == 0) is succeeds, out + err
    return out if succeeds else out + err


def train(folder: Path, processes: int, config: str, work_dir: str, *arguments: str, batch: int = 8) -> str:
    """One process, or several under torchrun, that share a total batch of ``batch``; gives what is printed."""
    options = [f"train_dataloader.batch_size={batch // processes}", f"experiment_name={work_dir}"]
    launcher: list[object] = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        arguments = (*arguments, "--launcher", "pytorch")
    return finish(start(folder, launcher, config, "--work-dir", work_dir, *arguments, "--cfg-options", *options))


def weights(folder: Path, work_dir: str, epoch: int = 2) -> dict[str, Tensor]:
    return torch.load(folder / work_dir / f"epoch_{epoch}.pth", weights_only=True)["state_dict"]


def accuracies(printed: str) -> list[str]:
    return re.findall(r"top1 \S+", printed)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def alone(folder: Path) -> str:
    """What one process prints; its run is in ``alone``."""
    return train(folder, 1, "vit.py", "alone")


def test_two_processes_equal_one(folder: Path, alone: str) -> None:
    printed = train(folder, 2, "vit.py", "two")
    assert_same(weights(folder, "two"), weights(folder, "alone"), TOLERANCE)
    assert accuracies(printed) == accuracies(alone)
    assert len(accuracies(alone)) >= 2
    assert printed.count("epoch 2/2") == 1  # one process speaks for all
    # Training had an effect that is far above the tolerance.
    changes = [(x - weights(folder, "alone", 1)[name]).abs().max() for name, x in weights(folder, "alone").items()]
    assert max(changes) > 1000 * TOLERANCE


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the threads of a process")
def test_gloo_has_ended_before_python(folder: Path) -> None:
    """A thread that frees a tensor later aborts its process, and with it a run that is done."""
    assert train(folder, 2, "telling.py", "telling").count("gloo's threads at the end: []") == 2


@pytest.mark.slow
def test_two_processes_test_like_one(folder: Path, alone: str) -> None:
    arguments = ["vit.py", folder / "alone" / "epoch_2.pth", "--work-dir", "tested"]
    one = finish(start(folder, [], *arguments, tool="test.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = finish(start(folder, launcher, *arguments, "--launcher", "pytorch", tool="test.py"))
    assert accuracies(two) == accuracies(one) == accuracies(alone)[-1:]


@pytest.mark.slow
def test_models_of_this_library_agree_too(folder: Path) -> None:
    train(folder, 1, "vim.py", "vim_alone")
    train(folder, 2, "vim.py", "vim_two")
    assert_same(weights(folder, "vim_two"), weights(folder, "vim_alone"), TOLERANCE)


@pytest.mark.slow
def test_detection_agrees_too(folder: Path) -> None:
    pytest.importorskip("mmdet")
    make = [ROOT / "tools" / "make_digits.py", "--task", "detection", "--out", folder / "scenes"]
    counts = ["--train", "8", "--val", "4", "--size", "64"]
    subprocess.run([sys.executable, *map(str, make), *counts], check=True, timeout=300, capture_output=True)
    (folder / "fcos.py").write_text(DETECTOR.format(root=ROOT, folder=folder))
    alone = train(folder, 1, "fcos.py", "fcos_alone", batch=4)
    two = train(folder, 2, "fcos.py", "fcos_two", batch=4)
    assert_same(weights(folder, "fcos_two"), weights(folder, "fcos_alone"), TOLERANCE)
    metrics = r"epoch 2/2  loss \S+  (.*?)  \S+ s"
    assert re.findall(metrics, two) == re.findall(metrics, alone) != []
    whole = weights(folder, "fcos_alone")
    (folder / "fcos_alone" / "epoch_2.pth").unlink()
    assert "resumed after epoch 1/2" in train(folder, 2, "fcos.py", "fcos_alone", "--resume", "auto", batch=4)
    assert_same(weights(folder, "fcos_alone"), whole, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_resumes(folder: Path, alone: str, first: int, then: int) -> None:
    work_dir = f"{first}_then_{then}"
    train(folder, first, "vit.py", work_dir)
    (folder / work_dir / "epoch_2.pth").unlink()
    printed = train(folder, then, "vit.py", work_dir, "--resume", "auto")
    assert "resumed after epoch 1/2" in printed
    assert_same(weights(folder, work_dir), weights(folder, "alone"), TOLERANCE)
    assert accuracies(printed)[-1] == accuracies(alone)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_resumes_to_the_same_loss(folder: Path, processes: int) -> None:
    whole, cut = f"whole_{processes}", f"cut_{processes}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    arguments = ["--launcher", "pytorch"] if processes == 2 else []
    options = ["--cfg-options", f"train_dataloader.batch_size={8 // processes}"]
    printed = finish(start(folder, launcher, "dying.py", "--work-dir", cut, *arguments, *options), succeeds=False)
    if processes == 2:  # the other one does not wait for it, and torchrun names it
        assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", printed), printed
    assert sorted(path.name for path in (folder / cut).glob("epoch_*")) == ["epoch_1.pth"]
    resumed = train(folder, processes, "vit.py", cut, "--resume", "auto")
    uninterrupted = train(folder, processes, "vit.py", whole)
    # The same number of processes rounds alike: equality is exact.
    assert_same(weights(folder, cut), weights(folder, whole), 0)
    last = r"epoch 2/2  (loss \S+  .*?)  \S+ s"
    assert re.findall(last, resumed) == re.findall(last, uninterrupted) != []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="Slurm's tasks need a GPU each")
def test_tasks_of_slurm_equal_one_process(folder: Path, alone: str) -> None:
    (folder / "srun.py").write_text(SRUN)
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    options = ["--cfg-options", "train_dataloader.batch_size=4", "experiment_name=slurm"]
    arguments = ["vit.py", "--work-dir", "slurm", "--launcher", "slurm", *options]
    printed = finish(start(folder, [folder / "srun.py"], *arguments))
    assert_same(weights(folder, "slurm"), weights(folder, "alone"), TOLERANCE)
    assert accuracies(printed) == accuracies(alone)


@pytest.mark.slow
def test_two_nodes_of_one_process_each(folder: Path, alone: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    nodes = []
    for node in range(2):
        launcher = [
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=nodes",
        ]  # fmt: skip
        options = ["--cfg-options", "train_dataloader.batch_size=4", "experiment_name=nodes"]
        arguments = ["vit.py", "--work-dir", "nodes", "--launcher", "pytorch", *options]
        nodes.append(start(folder, launcher, *arguments, gpu=node))
        time.sleep(1)
    try:
        printed = [finish(process) for process in nodes]
    finally:
        for process in nodes:
            stop(process)
    # The node that came first gets the first process, which prints.
    assert sorted(map(accuracies, printed)) == [[], accuracies(alone)]
    assert_same(weights(folder, "nodes"), weights(folder, "alone"), TOLERANCE)
