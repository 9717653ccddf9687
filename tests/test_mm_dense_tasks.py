"""Detection and segmentation through tools/train.py and tools/test.py, on small digits; and their bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

from backbones.mm.app.console import brief, print_average_precisions
from backbones.mm.data.annotations import check_annotations
from backbones.mm.errors import UserError
from tests.scripts import call_tool, load_tool

# mmengine names a run after its config and the second; runs of one process within a second share a name.
pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")

ROOT = Path(__file__).parents[1]
SMALL = {
    "detection": """
_base_ = ["{configs}/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py"]
widths = [8, 16, 24, 32]
model = dict(
    backbone=dict(model_args=dict(dims=widths, depths=(1, 1, 1, 1))),
    neck=dict(in_channels=widths),
)
train_cfg = dict(max_epochs=2, val_interval=1)
data = "{data}"
val_evaluator = dict(ann_file=data + "/annotations/instances_val.json")
""",
    "segmentation": """
_base_ = ["{configs}/upernet_efficientvmamba-tiny_digits.py"]
widths = [16, 16, 24, 32]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(model_args=dict(dims=widths, depths=(1, 1, 1, 1))),
    decode_head=dict(in_channels=widths, channels=16),
    auxiliary_head=dict(in_channels=widths[2], channels=16),
)
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
data = "{data}"
""",
}
BOTH = """
test_evaluator = val_evaluator if "val_evaluator" in globals() else dict()
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data))
val_dataloader = dict(batch_size=2, dataset=dict(data_root=data))
test_dataloader = val_dataloader
"""
METRIC = {"detection": r"box AP .*mask AP50 ", "segmentation": r"mIoU [\d.]+"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets ``detection`` and ``segmentation`` and configs ``detection.py`` and ``segmentation.py``."""
    path = tmp_path_factory.mktemp("dense")
    make_digits = load_tool("digits")
    for task, text in SMALL.items():
        make_digits.write_digits(path / task, task, {"size": 64, "train": 8, "val": 4, "seed": 0})
        values = {"configs": ROOT / "configs" / "digits", "data": path / task}
        (path / f"{task}.py").write_text(text.format(**values) + BOTH)
    # One image for training has nothing in it.
    file = path / "detection" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    file.write_text(json.dumps(content))
    Image.fromarray(np.ones((64, 64), np.uint8)).save(path / "segmentation/annotations/training/000003.png")
    return path


@pytest.fixture
def tool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``tools/NAME.py`` in this process, as its command line would."""

    def call(name: str, *arguments: object) -> None:
        call_tool(name, *arguments)

    monkeypatch.chdir(folder)
    return call


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_trained_tested_and_drawn(
    tool: Callable[..., None], folder: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    work_dir = folder / f"{task}-run"
    tool("train", f"{task}.py", "--work-dir", work_dir)
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert len(lines) <= 8  # a heading, two validations, where the results are; nothing of third parties
    assert re.search(METRIC[task], lines[1])
    assert (work_dir / "training.png").is_file()

    tool("test", f"{task}.py", work_dir, "--work-dir", work_dir)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(METRIC[task], last)
    assert "(4 images, " in last
    with Image.open(work_dir / "predictions.png") as picture:
        assert np.asarray(picture).std() > 1


@pytest.mark.slow
def test_trained_without_the_compiled_operators_of_mmcv(folder: Path) -> None:
    script = f"""
import runpy, sys
from backbones.mm import mmcv_ext
sys.meta_path.insert(0, mmcv_ext.Finder())  # before the finder of files
runpy.run_path({str(ROOT / "tools" / "train.py")!r}, run_name="__main__")
"""
    work_dir = folder / "detection-torchvision"
    command = [sys.executable, "-c", script, "detection.py", "--work-dir", str(work_dir)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert re.search(METRIC["detection"], done.stdout)
    (log,) = work_dir.glob("*/*.log")
    assert "nms, roi_align and sigmoid_focal_loss come from torchvision" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_mixed_precision_on_a_cpu(tool: Callable[..., None], task: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"detection": ["train_cfg.max_epochs=1"], "segmentation": ["train_cfg.max_iters=2"]}[task]
    tool("train", f"{task}.py", "--work-dir", f"{task}-amp", "--amp", "--cfg-options", *short)
    assert re.search(METRIC[task], capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_resumed_run_ends_as_the_whole_one(
    tool: Callable[..., None], folder: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = folder / f"{task}-whole", folder / f"{task}-cut"
    tool("train", f"{task}.py", "--work-dir", whole)
    name, last = {"detection": ("epoch_1.pth", "epoch_2.pth"), "segmentation": ("iter_2.pth", "iter_4.pth")}[task]
    cut.mkdir()
    shutil.copy(whole / name, cut / name)
    tool("train", f"{task}.py", "--work-dir", cut, "--resume", "auto")
    assert "resumed after" in capsys.readouterr().out
    a, b = (torch.load(run / last, weights_only=True)["state_dict"] for run in (whole, cut))
    # The CPU's threads may add in another order; a forgotten random state moves weights by 1e-3.
    assert all(torch.allclose(a[x], b[x], rtol=0, atol=1e-5) for x in a)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def first_annotation(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: content["annotations"][0].update(values))


def first_image(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: content["images"][0].update(values))


def repaint(folder: Path, **options: Any) -> None:
    file = folder / "annotations" / "training" / "000002.png"
    Image.new("L", **{"size": (64, 64), "color": 1, **options}).save(file)


SPOILED = [
    ("detection", first_image(file_name="x.jpg"), ["1 of 8 images", "train/x.jpg", "check data_root"]),
    ("detection", first_image(width=65), ["000000.jpg is 64 x 64, not 65 x 64", "belongs to other images"]),
    ("detection", first_annotation(category_id=11), ["category ids out of range: 11 in annotation 1", "1 to 10"]),
    ("detection", first_annotation(image_id=99), ["images that are not listed: 99 in annotation 1"]),
    ("detection", first_annotation(bbox=[70, 0, 5, 5]), ["boxes outside of their images: [70, 0, 5, 5]"]),
    (
        "detection",
        lambda folder: edit(folder, lambda content: content["categories"][4].update(name="four")),
        ["have no categories 4", "set metainfo"],
    ),
    (
        "detection",
        lambda folder: (folder / "annotations" / "instances_train.json").unlink(),
        ["instances_train.json do not exist", "check data_root and ann_file"],
    ),
    (
        "detection",
        lambda folder: (folder / "annotations" / "instances_train.json").write_text("[]"),
        ["instances_train.json are not in COCO's format"],
    ),
    (
        "detection",
        lambda folder: (folder / "train" / "000001.jpg").write_bytes(b"no image"),
        ["cannot read image", "000001.jpg", "replace the file"],
    ),
    (
        "segmentation",
        lambda folder: (folder / "annotations" / "training" / "000002.png").unlink(),
        ["1 of 8 label maps of the images", "000002.png"],
    ),
    ("segmentation", lambda folder: repaint(folder, size=(64, 63)), ["000002.png is 64 x 63, its image 64 x 64"]),
    (
        "segmentation",
        lambda folder: repaint(folder, color=12),
        ["000002.png holds label 11", "expected 0 to 10", "check classes"],
    ),
    ("segmentation", lambda folder: shutil.rmtree(folder / "images" / "training"), ["no images *.jpg in"]),
]


@pytest.mark.parametrize("task, spoil, words", SPOILED)
def test_annotations_that_do_not_match(
    tool: Callable[..., None],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    spoil: Callable[[Path], None],
    words: list[str],
) -> None:
    data = shutil.copytree(folder / task, tmp_path / "data")
    spoil(data)
    option = f"train_dataloader.dataset.data_root={data}"
    error = error_of(tool, capsys, "train", f"{task}.py", "--work-dir", tmp_path / "run", "--cfg-options", option)
    assert all(word in error for word in words), error


def error_of(tool: Callable[..., None], capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        tool(*arguments)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    "task, options, words",
    [
        ("detection", ["model.backbone.arch=vmamba_tiny_s1l9"], ["'vmamba_tiny_s1l9'", "vmamba_tiny_s1l8"]),
        ("detection", ["train_dataloader.dataset.data_root=nowhere"], ["nowhere does not exist", "--task detection"]),
        (
            "detection",
            ["model.roi_head.mask_head.num_classes=9"],
            ["mask_head.num_classes is 9", "num_classes of the config is 10"],
        ),
        (
            "segmentation",
            ["model.decode_head.num_classes=12"],
            ["decode_head.num_classes is 12", "num_classes of the config is 11"],
        ),
        ("segmentation", ["model.backbone.arch=efficientvmamba"], ["did you mean efficientvmamba"]),
    ],
)
def test_mistakes_in_a_config(
    tool: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    options: list[str],
    words: list[str],
) -> None:
    arguments = ["train", f"{task}.py", "--work-dir", tmp_path / "run", "--cfg-options", *options]
    error = error_of(tool, capsys, *arguments)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("task, other", [("detection", "segmentation"), ("segmentation", "detection")])
def test_checkpoint_of_another_task(
    tool: Callable[..., None], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, other: str
) -> None:
    file = tmp_path / "weights.pth"
    state_dict = {"backbone.model.stem.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    torch.save({"meta": {"experiment_name": f"{other}_20260101_000000"}, "state_dict": state_dict}, file)
    error = error_of(tool, capsys, "test", f"{task}.py", file, "--work-dir", tmp_path / "run")
    for word in (f"{file} (written by {other})", "missing: ", "unknown: backbone.model.stem.weight"):
        assert word in error


@pytest.mark.parametrize(
    "task, arch, args, words",
    [
        ("detection", "vmamba_tiny_s1l8", {"dims": (8, 16, 24, 48), "depths": (1, 1, 1, 1)}, "stages.3"),
        ("segmentation", "test_vit", {}, "unknown: "),
    ],
)
def test_backbone_weights_of_another_model(
    tool: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    arch: str,
    args: dict[str, Any],
    words: str,
) -> None:
    file = tmp_path / "backbone.pth"
    torch.save(timm.create_model(arch, **args).state_dict(), file)
    options = ["model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={file}"]
    error = error_of(tool, capsys, "train", f"{task}.py", "--work-dir", tmp_path / "run", "--cfg-options", *options)
    assert "the weights do not fit" in error
    assert words in error
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize("package, task", [("mmdet", "detection"), ("mmseg", "segmentation")])
def test_missing_package_is_named_with_its_installation(
    tool: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    task: str,
) -> None:
    monkeypatch.setitem(sys.modules, f"{package}.models", None)
    error = error_of(tool, capsys, "train", f"{task}.py", "--work-dir", tmp_path / "run")
    assert f"needs {package}" in error
    assert "pip install 'ssm-backbones[mm]'" in error


def test_wrapped_data_sets_are_checked(folder: Path, tmp_path: Path) -> None:
    config = Config.fromfile(folder / "detection.py")
    data = shutil.copytree(folder / "detection", tmp_path / "data")
    config.train_dataloader.dataset.data_root = str(data)
    config.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=config.train_dataloader.dataset)
    check_annotations(config, ["train_dataloader", "val_dataloader"])
    (data / "train" / "000005.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 8 images .*000005\.jpg"):
        check_annotations(config, ["train_dataloader"])
    check_annotations(config, ["val_dataloader"])


def test_average_precisions_in_a_line_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"coco/bbox_mAP": 0.5, "coco/bbox_mAP_50": 0.75, "coco/bbox_mAP_s": -1.0, "coco/segm_mAP_50": 0.7}
    assert brief(metrics) == "box AP 0.500  box AP50 0.750  mask AP50 0.700"
    assert brief({"accuracy/top1": 93.123, "mIoU": 51.0}) == "top1 93.12  mIoU 51"
    print_average_precisions(metrics)
    heading, box, mask = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == ["AP", "AP50", "AP75", "small", "medium", "large"]
    assert box == ["box", "0.500", "0.750", "-", "-", "-", "-"]
    assert mask == ["mask", "-", "0.700", "-", "-", "-", "-"]
    print_average_precisions({"mIoU": 51.0})
    assert capsys.readouterr().out == ""
