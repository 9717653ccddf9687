"""tools/analyze_logs.py: curves of whole, resumed and killed runs, and a table of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine")

from backbones.mm.errors import UserError
from tests.scripts import call_tool, load_tool

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load_tool("analyze")


@pytest.fixture
def tool(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs tools/analyze_logs.py in this process, as its command line would."""

    def call(*arguments: object) -> None:
        call_tool("analyze", *arguments)

    monkeypatch.chdir(tmp_path)
    return call


def train(iteration: int, loss: float, epoch: int | None = None) -> dict[str, Any]:
    record = {"lr": 0.1, "loss": loss, "data_time": 0.0, "time": 0.1, "iter": iteration, "step": iteration}
    return record if epoch is None else {**record, "epoch": epoch}


def write(folder: Path, *records: dict[str, Any], end: str = "\n") -> None:
    (folder / "vis_data").mkdir(parents=True)
    (folder / "vis_data/scalars.json").write_text("\n".join(map(json.dumps, records)) + end)


def test_epochs_become_iterations(module: ModuleType, tmp_path: Path) -> None:
    first = [train(10, 2.0, 1), train(20, 1.5, 1), {"top1": 50.0, "time": 1.0, "step": 1}]
    write(tmp_path / "20260101_000000", *first, train(30, 1.0, 2), train(40, 0.5, 2), {"top1": 60.0, "step": 2})
    run = module.read_run(tmp_path)
    assert run["loss"] == [(10, 2.0), (20, 1.5), (30, 1.0), (40, 0.5)]
    assert run["top1"] == [(20, 50.0), (40, 60.0)]
    assert run.keys() == {"lr", "loss", "top1"}


def test_iteration_of_validation(module: ModuleType, tmp_path: Path) -> None:
    """Runs that count iterations name them; those with our hooks in every case."""
    write(tmp_path / "a/20260101_000000", train(10, 2.0), train(20, 1.5), {"mIoU": 50.0, "step": 15})
    write(tmp_path / "b/20260101_000000", train(10, 2.0, 1), {"mIoU": 50.0, "validated/iter": 11, "step": 1})
    assert module.read_run(tmp_path / "a")["mIoU"] == [(15, 50.0)]
    assert module.read_run(tmp_path / "b")["mIoU"] == [(11, 50.0)]


def test_over_epochs(module: ModuleType, tmp_path: Path) -> None:
    records = [train(5, 2.0, 1), train(10, 1.5, 1), {"top1": 50.0, "validated/iter": 12, "step": 1}]
    write(tmp_path / "a/20260101_000000", *records, train(17, 1.0, 2), train(29, 0.5, 3))
    run = module.read_run(tmp_path / "a", "epoch")
    assert run["loss"] == [(5 / 12, 2.0), (10 / 12, 1.5), (17 / 12, 1.0), (29 / 12, 0.5)]
    assert run["top1"] == [(1, 50.0)]
    write(tmp_path / "b/20260101_000000", *records)  # one epoch, whose validation tells its length
    assert module.read_run(tmp_path / "b", "epoch")["loss"] == [(5 / 12, 2.0), (10 / 12, 1.5)]
    write(tmp_path / "c/20260101_000000", *records[:2])
    with pytest.raises(UserError, match="one epoch only, and no validation"):
        module.read_run(tmp_path / "c", "epoch")
    write(tmp_path / "d/20260101_000000", train(10, 2.0), {"mIoU": 1.0, "validated/iter": 10, "step": 10})
    with pytest.raises(UserError, match="counts iterations, and not epochs"):
        module.read_run(tmp_path / "d", "epoch")


def test_later_log_counts_where_a_run_was_resumed(module: ModuleType, tmp_path: Path) -> None:
    killed = [train(10, 2.0, 1), {"top1": 50.0, "step": 1}, train(20, 1.9, 2), train(30, 1.8, 3)]
    write(tmp_path / "20260101_000000", *killed, end='\n{"lr": 0.1, "lo')
    write(tmp_path / "20260102_000000", train(20, 1.0, 2), {"top1": 60.0, "step": 2})
    run = module.read_run(tmp_path)
    assert run["loss"] == [(10, 2.0), (20, 1.0)]
    assert run["top1"] == [(10, 50.0), (20, 60.0)]


def test_default_keys(module: ModuleType) -> None:
    curve = [(1, 1.0)]
    detector = dict.fromkeys(
        ["lr", "grad_norm", "loss", "loss_cls", "acc", "coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP"], curve
    )
    segmentor = dict.fromkeys(["loss", "decode.loss_ce", "decode.acc_seg", "aAcc", "mIoU", "mAcc"], curve)
    assert module.default_keys([detector]) == ["loss", "coco/bbox_mAP", "coco/segm_mAP"]
    assert module.default_keys([segmentor]) == ["loss", "aAcc", "mIoU", "mAcc"]


def test_table_and_picture(tool: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [{"top1": x, "step": i + 1} for i, x in enumerate([70.0, 90.0, 80.0])]
    for name, shift in (("one", 0.0), ("two", 0.25)):
        losses = [train(10 * i, x + shift, i) for i, x in zip((1, 2, 3), (2.0, 0.5, 1.0), strict=True)]
        write(tmp_path / name / "20260101_000000", *losses, *(scores if name == "one" else []))
    tool("one", "two", "--out", "both.png")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["run", "iterations", "last", "best", "at"],
        ["loss", "one", "30", "1", "0.5", "20"],
        ["loss", "two", "30", "1.25", "0.75", "20"],
        ["top1", "one", "30", "80", "90", "20"],
        ["top1", "two", "-", "-", "-", "-"],
        ["both.png"],
    ]
    with Image.open("both.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_picture_over_epochs(tool: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one/20260101_000000", train(4, 2.0, 1), train(14, 1.0, 2))
    tool("one", "--by", "epoch", "--out", "one.svg")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["run", "epochs", "last", "best", "at"],
        ["loss", "one", "1.4", "1", "1", "1.4"],
        ["one.svg"],
    ]
    assert ">epoch</text>" in (tmp_path / "one.svg").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent"], ["absent has no"]),
        (["good", "empty"], ["empty has no"]),
        (["broken"], ["scalars.json, line 1 is no JSON"]),
        (["foreign"], ["scalars.json, line 1 is no record"]),
        (["good", "--keys", "loss", "los"], ["'los'", "loss"]),
        (["good", "--out", "no/such/folder.png"], ["--out"]),
    ],
)
def test_mistakes_get_one_clear_line(
    arguments: list[str],
    words: list[str],
    tool: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "good/20260101_000000", train(1, 1.0))
    write(tmp_path / "broken/20260101_000000", end="not JSON\nat all\n")
    write(tmp_path / "foreign/20260101_000000", {"loss": 1.0})
    (tmp_path / "empty").mkdir()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        tool(*arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("analyze.py: error: ") and len(printed.err.splitlines()) == 1, printed.err
    assert all(word in printed.err for word in words), printed.err
    assert set(tmp_path.rglob("*")) == before
