"""tools/inference.py: what is shown is what the model says, in all three tasks, and nothing is written by mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmengine")

from mmengine.config import Config

from backbones.mm.app import cli
from backbones.mm.app.inference import build_model, load_predictor, task_of
from tests.scripts import call_tool

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "classification": ROOT / "configs/digits/vim-tiny_digits.py",
    "detection": ROOT / "configs/digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py",
    "segmentation": ROOT / "configs/digits/upernet_efficientvmamba-tiny_digits.py",
}


def read_config(task: str) -> Config:
    if task != "classification":
        pytest.importorskip("mmdet" if task == "detection" else "mmseg")
    return cli.read_config(CONFIGS[task])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint with random weights for a task, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(task: str) -> Path:
        path = folder / f"{task}.pth"
        if not path.exists():
            torch.manual_seed(0)
            torch.save({"state_dict": build_model(read_config(task)).state_dict()}, path)
        return path

    return make


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two images of different sizes, neither square."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, shape in zip(paths, [(70, 90, 3), (101, 64, 3)], strict=True):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs tools/inference.py in this process, as its command line would."""

    def call(*arguments: object) -> None:
        call_tool("inference", *arguments)

    monkeypatch.chdir(tmp_path)
    return call


@pytest.mark.parametrize("task", CONFIGS)
def test_predictions(
    task: str,
    checkpoint: Callable[[str], Path],
    images: list[Path],
    tool: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = read_config(task)
    predictor = load_predictor(config, checkpoint(task))
    assert predictor.task == task_of(config) == task
    assert predictor.classes[-10:] == tuple("0123456789")
    tool(*images, "--config", CONFIGS[task], "--checkpoint", checkpoint(task), "--score", "0.1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for path, line in zip(images, lines, strict=True):
        assert line.startswith(f"{path}: ") and line.endswith(f"(predictions/{path.stem}.png)")
        with Image.open(Path("predictions", f"{path.stem}.png")) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
        found = predictor(path)
        with Image.open(path) as image:
            size = image.size[::-1]
        if task == "classification":
            assert found.shape == (10,) and found.sum().item() == pytest.approx(1, abs=1e-5)
            top = int(found.argmax())
            assert f": {top} {found[top]:.3f}, " in line
            assert line.count(", ") == 4
        elif task == "detection":
            kept = found.pred_instances[found.pred_instances.scores >= 0.1]
            assert kept.masks.shape[1:] == size
            assert sum(map(int, re.findall(r"(\d+) x \d", line))) == len(kept) > 0
        else:
            labels = found.pred_sem_seg.data
            assert labels.shape[1:] == size
            most = int(labels.flatten().mode().values)
            assert f": {predictor.classes[most]} {(labels == most).float().mean():.1%}" in line


@pytest.mark.parametrize("task", CONFIGS)
def test_in_half_precision(
    task: str,
    checkpoint: Callable[[str], Path],
    images: list[Path],
    tool: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool(images[0], "--config", CONFIGS[task], "--checkpoint", checkpoint(task), "--amp")
    assert capsys.readouterr().out.startswith(f"{images[0]}: ")
    predictor = load_predictor(read_config(task), checkpoint(task))
    if task == "classification":
        whole, half = predictor(images[0]), replace(predictor, amp=True)(images[0]).float()
        assert not torch.equal(whole, half)
        torch.testing.assert_close(half, whole, rtol=0, atol=3e-2)
    elif task == "detection":
        whole, half = (x(images[0]).pred_instances for x in (predictor, replace(predictor, amp=True)))
        assert half.bboxes.dtype == torch.float32 and not torch.equal(whole.scores, half.scores)


def test_formats(
    checkpoint: Callable[[str], Path], images: list[Path], tool: Callable[..., None], tmp_path: Path
) -> None:
    task = ("--config", CONFIGS["classification"], "--checkpoint", checkpoint("classification"))
    tool(images[0], *task, "--out", "one.pdf")
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    tool(*images, *task, "--out", "all", "--format", "svg")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["a.svg", "b.svg"]
    first = (tmp_path / "all" / "a.svg").read_bytes()
    tool(images[0], *task, "--out", "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first


def test_a_work_directory_stands_for_config_and_checkpoint(
    checkpoint: Callable[[str], Path],
    images: list[Path],
    tool: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    read_config("classification").dump(run / "vim-tiny_digits.py")
    (run / "epoch_1.pth").symlink_to(checkpoint("classification"))
    (run / "best_checkpoint").write_text("epoch_1.pth\n")
    tool(images[0], "--config", CONFIGS["classification"], "--checkpoint", checkpoint("classification"))
    expected = capsys.readouterr().out
    tool(images[0], "--checkpoint", run)
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit, match="2"):
        tool(images[0], "--checkpoint", run / "epoch_1.pth")
    assert "--config is missing" in capsys.readouterr().err


def test_names_of_classes_come_with_the_checkpoint(
    checkpoint: Callable[[str], Path], images: list[Path], tmp_path: Path
) -> None:
    contents = torch.load(checkpoint("classification"), weights_only=True)
    names = [f"digit {i}" for i in range(10)]
    torch.save({**contents, "meta": {"dataset_meta": {"classes": names}}}, tmp_path / "named.pth")
    config = read_config("classification")
    assert load_predictor(config, tmp_path / "named.pth").classes == tuple(names)
    torch.save({**contents, "meta": {"dataset_meta": {"classes": names[:9]}}}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="9 classes, the model 10"):
        load_predictor(config, tmp_path / "short.pth")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.png"], ["absent.png does not exist"]),
        (["a.png", "text.txt"], ["text.txt cannot be read"]),
        (["a.png", "folder/a.jpg"], ["several images are called a"]),
        (["a.png", "--config", "no_config.py"], ["no_config.py does not exist"]),
        (["a.png", "--checkpoint", "absent.pth"], ["absent.pth"]),
        (["a.png", "--checkpoint", "text.txt"], ["text.txt"]),
        (["a.png", "--checkpoint", "other.pth"], ["other.pth", "missing: network.", "unknown: body.weight"]),
        (["a.png", "--checkpoint", "folder"], ["folder has no best checkpoint"]),
        (["a.png", "--topk", "0"], ["--topk", "0"]),
        (["a.png", "b.jpg", "--out", "both.pdf"], ["--out", "both.pdf for 2 images"]),
        (["a.png", "--out", "one.pdf", "--format", "svg"], ["--format", "one.pdf"]),
        (["a.png", "--out", "no/such/one.pdf"], ["--out", "folder that exists"]),
    ],
)
def test_mistakes_get_one_clear_line(
    arguments: list[str],
    words: list[str],
    checkpoint: Callable[[str], Path],
    images: list[Path],
    tool: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("neither an image nor weights")
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {"body.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    before = set(tmp_path.rglob("*"))
    defaults = ["--config", CONFIGS["classification"], "--checkpoint", checkpoint("classification")]
    with pytest.raises(SystemExit, match="2"):
        tool(*defaults, *arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("inference.py: error: ") and len(printed.err.splitlines()) == 1, printed.err
    assert all(word in printed.err for word in words), printed.err
    assert set(tmp_path.rglob("*")) == before
