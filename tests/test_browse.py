"""tools/browse.py: the pipeline's images with their annotations, for all three tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

pytest.importorskip("mmengine")

from tests.scripts import call_tool, load_tool

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "classification": ROOT / "configs/digits/vim-tiny_digits.py",
    "detection": ROOT / "configs/digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py",
    "segmentation": ROOT / "configs/digits/upernet_efficientvmamba-tiny_digits.py",
}


@pytest.fixture
def module() -> ModuleType:
    return load_tool("browse")


@pytest.fixture
def tool(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs tools/browse.py in this process, as its command line would."""

    def call(*arguments: object) -> None:
        call_tool("browse", *arguments)

    monkeypatch.chdir(tmp_path)
    return call


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        red = np.full((96, 96, 3), (40 * i + 160, 60, 20), dtype=np.uint8)
        Image.fromarray(red).save(folder / f"{i:06d}.jpg")


def write_data(task: str, root: Path) -> None:
    """Three images: in detection with two objects, one and none; in segmentation half photograph, half a digit."""
    if task == "classification":
        for label in range(10):
            write_images(root / "train" / str(label), 1)
    elif task == "detection":
        boxes = [(0, 3, [10, 20, 30, 40]), (0, 7, [50, 5, 20, 20]), (1, 1, [30, 30, 40, 50])]
        annotations = [
            {
                "id": i, "image_id": image, "category_id": label, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            for i, (image, label, (x, y, w, h)) in enumerate(boxes)
        ]  # fmt: skip
        files = [{"id": i, "file_name": f"{i:06d}.jpg", "height": 96, "width": 96} for i in range(3)]
        categories = [{"id": i, "name": str(i)} for i in range(10)]
        write_images(root / "train", 3)
        (root / "annotations").mkdir()
        (root / "annotations/instances_train.json").write_text(
            json.dumps({"images": files, "annotations": annotations, "categories": categories})
        )
    else:
        write_images(root / "images/training", 3)
        (root / "annotations/training").mkdir(parents=True)
        labels = np.ones((96, 96), dtype=np.uint8)  # 0 is ignored, 1 the photograph
        labels[48:] = 5
        for i in range(3):
            Image.fromarray(labels).save(root / f"annotations/training/{i:06d}.png")


def options(task: str, root: Path) -> list[str]:
    return ["--cfg-options", f"train_dataloader.dataset.data_root={root}"]


@pytest.mark.parametrize("task", CONFIGS)
def test_grid_of_samples(
    task: str, tool: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if task != "classification":
        pytest.importorskip("mmdet" if task == "detection" else "mmseg")
    write_data(task, tmp_path / "data")
    tool(CONFIGS[task], "--count", 3, "--out", "grid.png", *options(task, tmp_path / "data"))
    assert capsys.readouterr().out == "grid.png\n"
    with Image.open("grid.png") as picture:
        colors = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colors) > 20


def test_colors_of_photographs_and_their_shape(
    module: ModuleType, tool: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data("classification", tmp_path / "data")
    figures = []
    draw = module.draw_samples
    monkeypatch.setattr(module, "draw_samples", lambda *args: figures.append(draw(*args)) or figures[-1])
    for task in ("classification", "segmentation"):
        if task == "segmentation":
            pytest.importorskip("mmseg")
            write_data(task, tmp_path / "seg")
        root = tmp_path / ("data" if task == "classification" else "seg")
        tool(CONFIGS[task], "--count", 1, "--out", "a.pdf", *options(task, root))
        ax = next(ax for ax in figures[-1].axes if ax.images)
        red, green, blue = np.asarray(ax.images[0].get_array()).mean((0, 1))
        assert red > 0.6 and green == pytest.approx(60 / 255, abs=0.02) and blue == pytest.approx(20 / 255, abs=0.02)
        assert ax.get_aspect() == 1
    overlay = np.asarray(ax.images[1].get_array())[..., 3]
    assert (overlay[:48] == 0).all() and (overlay[48:] > 0).all()  # the photograph is clear, the digit is not


def test_boxes_and_titles(
    module: ModuleType, tool: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mmdet")
    write_data("detection", tmp_path / "data")
    figures = []
    draw = module.draw_samples

    def keep(*args: object) -> object:
        figures.append(draw(*args))
        return figures[0]

    monkeypatch.setattr(module, "draw_samples", keep)
    tool(CONFIGS["detection"], *options("detection", tmp_path / "data"))
    boxes = {}
    for ax in figures[0].axes:
        if ax.get_title():
            red, _, blue = np.asarray(ax.images[0].get_array()).mean((0, 1))
            assert red > 2 * blue
            boxes[ax.get_title()] = sorted(
                [*x.get_xy(), x.get_width(), x.get_height()] for x in ax.patches if isinstance(x, Rectangle)
            )
    assert boxes == {  # half a pixel: matplotlib counts from the centre of the first
        "000000.jpg  (96 x 96)": [[9.5, 19.5, 30, 40], [49.5, 4.5, 20, 20]],
        "000001.jpg  (96 x 96)": [[29.5, 29.5, 40, 50]],
        "000002.jpg  (96 x 96)": [],
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.py"], ["absent.py does not exist"]),
        ([CONFIGS["classification"], "--count", "0"], ["--count", "0"]),
        ([CONFIGS["classification"], "--out", "grid.jpg"], ["--out", "grid.jpg"]),
        ([CONFIGS["classification"], "--cfg-options", "train_dataloader.dataset.data_root=no"], ["no does not exist"]),
        ([CONFIGS["classification"], "DATA", "--loader", "test"], ["val"]),
    ],
)
def test_mistakes_get_one_clear_line(
    arguments: list[object],
    words: list[str],
    tool: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data("classification", tmp_path / "data")
    data = f"test_dataloader.dataset.data_root={tmp_path / 'data'}"
    if "DATA" in arguments:
        arguments = [x for x in arguments if x != "DATA"] + ["--cfg-options", data]
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        tool(*arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("browse.py: error: ") and len(printed.err.splitlines()) == 1, printed.err
    assert all(word in printed.err for word in words), printed.err
    assert set(tmp_path.rglob("*")) == before
