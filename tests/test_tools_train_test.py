"""tools/train.py and tools/test.py from the command line: killed, resumed, tested, and misused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.image_folders import write_images

pytest.importorskip("mmengine")

from backbones.mm.app.cli import run_tool
from tests.scripts import call_tool

# mmengine names a run after its config and the second; runs of one process within a second share a name.
pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")

ROOT = Path(__file__).parents[1]
CONFIG = """
_base_ = ["{base}"]
custom_imports = dict(imports=["backbones.mm", "{extra}"])
model = dict(
    network=dict(_delete_=True, name="test_vit", img_size=16, patch_size=8, num_classes=10,
    drop_path_rate=0.2)
)
train_cfg = dict(max_epochs=2)
train_dataloader = dict(batch_size=10, dataset=dict(data_root="{data}", transform=dict(input_size=16)))
val_dataloader = dict(dataset=dict(data_root="{data}", transform=dict(input_size=16)))
test_dataloader = dict(dataset=dict(data_root="{data}", transform=dict(input_size=16)))
"""
# Stands for a power cut while the checkpoint of the second epoch is written.
DIE = """
import os, signal
calls = 0
def fsync(descriptor):
    global calls
    calls += 1
    if calls == 4:
        os.truncate(descriptor, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs ``plain.py`` and ``dying.py``, and ten classes with 4 training images and a validation image each."""
    path = tmp_path_factory.mktemp("cli")
    write_images(path / "data", {"train": 4, "val": 1}, classes=10, noise=30, step=22)
    base = ROOT / "configs" / "digits" / "vim-tiny_digits.py"
    for name, extra in (("plain", "backbones"), ("dying", "die")):
        (path / f"{name}.py").write_text(CONFIG.format(base=base, data=path / "data", extra=extra))
    (path / "die.py").write_text(DIE)
    return path


@pytest.fixture
def tool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``tools/NAME.py`` in this process, as its command line would."""

    def call(name: str, *arguments: object) -> None:
        call_tool(name, *arguments)

    monkeypatch.chdir(folder)
    return call


@pytest.fixture
def one_thread() -> object:
    """The arithmetic of a run depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_run_resumes_to_the_same_weights(
    tool: Callable[..., None], folder: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder), *sys.path]),
    }
    command = [sys.executable, ROOT / "tools" / "train.py", "dying.py", "--work-dir", "cut"]
    killed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in (folder / "cut").glob("epoch_*")) == ["epoch_1.pth"]

    tool("train", "plain.py", "--work-dir", "cut", "--resume")
    assert "resumed after epoch 1/2" in capsys.readouterr().out
    tool("train", "plain.py", "--work-dir", "whole", "--cfg-options", "experiment_name=whole")
    printed = capsys.readouterr().out
    cut, whole = (torch.load(folder / run / "epoch_2.pth", weights_only=True) for run in ("cut", "whole"))
    # One thread on both sides: equality is exact.
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in cut["state_dict"].items())
    assert sorted(path.name for path in (folder / "cut").iterdir() if path.suffix == ".partial") == []
    assert list((folder / "whole").glob("*/vis_data/events.out.tfevents.*"))

    checkpoint, picture = (re.search(rf"^{word} +(.+)$", printed, re.M)[1] for word in ("checkpoint", "picture"))
    best = float(re.search(r"^best +([\d.]+)$", printed, re.M)[1])
    assert Path(picture).is_file()
    for target in (checkpoint, "whole"):  # a file, or the run whose best one is meant
        tool("test", "plain.py", target, "--work-dir", "tested")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert re.match(rf"top1 {best:.4g}  top5 [\d.]+  \(10 images, ", lines[0])
    tool("test", "whole")  # the run's own config, too
    printed = capsys.readouterr().out
    assert printed.startswith(f"top1 {best:.4g}  top5 ") and str(Path("whole", Path(checkpoint).name)) in printed


def test_mixed_precision_on_a_cpu(tool: Callable[..., None], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool("train", "plain.py", "--work-dir", "amp", "--amp", "--cfg-options", "train_cfg.max_epochs=1")
    assert "epoch 1/1" in capsys.readouterr().out
    assert "type='BFloat16OptimWrapper'" in (folder / "amp" / "plain.py").read_text()


def test_second_start_in_the_same_folder_is_refused(
    tool: Callable[..., None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "used").mkdir(exist_ok=True)
    (folder / "used" / "epoch_1.pth").touch()
    with pytest.raises(SystemExit, match="2"):
        tool("train", "plain.py", "--work-dir", "used")
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("train", ["plane.py"], ["plane.py does not exist", "did you mean plain.py"]),
        ("test", ["plain.py"], ["CHECKPOINT is missing"]),
        ("test", ["data"], ["folder data holds no config of a run"]),
        ("test", ["plane.py", "x.pth"], ["plane.py does not exist", "did you mean plain.py"]),
        ("train", ["plain.py", "--resume", "absent.pth"], ["no weight file at absent.pth"]),
        ("train", ["plain.py", "--amp", "float16"], ["--amp float16 needs a GPU"]),
        ("test", ["plain.py", "absent.pth"], ["no weight file at absent.pth"]),
        ("test", ["plain.py", "data"], ["data has no best checkpoint"]),
        ("test", ["plain.py", "text.pth"], ["text.pth", "refused"]),
        (
            "test",
            ["plain.py", "other.pth"],
            ["other.pth", "missing: network.blocks.0", "unknown: body.weight"],
        ),
        (
            "train",
            ["plain.py", "--cfg-options", "model.network.name=test_vitt"],
            ["unknown model 'test_vitt'", "did you mean test_vit"],
        ),
        (
            "train",
            ["plain.py", "--cfg-options", "val_dataloader.dataset.data_root=nowhere"],
            ["data folder nowhere does not exist", "python tools/make_digits.py"],
        ),
        (
            "train",
            ["plain.py", "--cfg-options", "num_classes=11"],
            ["has 10 classes, expected num_classes=11"],
        ),
        (
            "train",
            ["plain.py", "--cfg-options", "train_dataloader.dataset.num_classes=11"],
            ["train_dataloader.dataset.num_classes is 11, num_classes of the config is 10; change num_classes alone"],
        ),
        ("train", ["plain.py", "--cfg-options", "num_classes=-1"], ["num_classes: got -1, expected a whole number"]),
        (
            "train",
            ["plain.py", "--cfg-options", "optim_wrapper.optimizer.lrr=1"],
            ["optim_wrapper.optimizer has no 'lrr'; did you mean lr?"],
        ),
        (
            "test",
            ["plain.py", "x.pth", "--cfg-options", "model.network.patch=2"],
            ["network: test_vit takes no such argument", "'patch'"],
        ),
    ],
)
def test_mistakes_get_one_clear_line(
    tool: Callable[..., None],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    words: list[str],
) -> None:
    (folder / "text.pth").write_text("not a checkpoint")
    torch.save({"state_dict": {"body.weight": torch.zeros(1)}}, folder / "other.pth")
    with pytest.raises(SystemExit, match="2"):
        tool(name, *arguments, "--work-dir", "mistakes")
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: error: ")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error


def test_interruption_ends_with_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: Namespace) -> None:
        raise KeyboardInterrupt

    assert run_tool("train.py", interrupted, Namespace()) == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.slow
def test_two_processes_train_on_the_cpu(folder: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *launcher,
        ROOT / "tools" / "train.py",
        "plain.py",
        "--launcher",
        "pytorch",
        "--work-dir",
        "two",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert torch.load(folder / "two" / "epoch_2.pth", weights_only=True)["meta"]["iter"] == 2 * (40 // 20)
