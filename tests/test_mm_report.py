"""The picture of a run whose validations did not all have a value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine")

from backbones.mm.engine import report
from backbones.mm.engine.hooks import VALIDATED
from backbones.mm.engine.report import ReportHook, draw_report
from backbones.mm.errors import UserError


def test_a_validation_without_detections_leaves_the_rest_of_the_picture(tmp_path: Path) -> None:
    curves = {"train/loss": np.ones(6), VALIDATED: np.array([2, 4, 6]), "val/coco/bbox_mAP": np.array([0.1, 0.2])}
    draw_report(tmp_path / "a.png", "run", curves, None)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_no_picture_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError("no pixels")

    ReportHook()._draw(tmp_path / "a.png", fail)
    assert "a.png cannot be drawn: ZeroDivisionError: no pixels" in capsys.readouterr().out


def test_curves_over_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, *_, **__: figures.append(figure))
    curves = {"train/loss": np.ones(6), "train/lr": np.ones(6), VALIDATED: np.array([3, 6]), "val/top1": np.ones(2)}
    for epoch, last in ((None, 6), (3, 2)):
        draw_report(tmp_path / "a.png", "run", curves, None, epoch=epoch)
        loss, score, rate = figures[-1].axes
        assert {axes.lines[0].get_xdata()[-1] for axes in (loss, score, rate)} == {last}
        assert rate.get_xlabel() == ("epoch" if epoch else "iteration")


@pytest.mark.parametrize("options", [{"picture": "a.jpg"}, {"predictions": "b"}, {"by": "hours"}])
def test_options_that_cannot_be_meant(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(options.values()))):
        ReportHook(**options)
