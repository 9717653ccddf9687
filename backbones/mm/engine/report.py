"""The report of a run: its curves and confusion matrix as a picture, and where the best checkpoint is."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.dist import get_world_size, is_main_process, master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from rich.console import Console

from backbones.images import PICTURE_SUFFIXES
from backbones.mm.app.colors import ClassColors, stated_metainfo
from backbones.mm.app.pictures import draw_predictions, save
from backbones.mm.engine.checkpoints import write_text
from backbones.mm.engine.hooks import VALIDATED
from backbones.mm.errors import UserError

_CONFUSION = "confusion_matrix.csv"
_BY = ("iteration", "epoch")
_PREDICTIONS_SHOWN = 12
_BEST = "best_checkpoint"
_TIMES = ("val/time", "val/data_time")


@HOOKS.register_module()
class ReportHook(Hook):
    """Keeps the results of a run in its work directory.

    These are ``best_checkpoint``, the name of the best checkpoint, its ``confusion_matrix.csv`` and, when
    training ends, ``training.png``. A test leaves its confusion matrix in its log folder and, of a detector or
    segmentor, ``predictions.png`` in the work directory.

    Args:
        picture: name of the picture of training; ``"training.pdf"`` and ``".svg"`` are drawn for print.
        predictions: name of the picture of a test.
        by: ``"iteration"`` or ``"epoch"``, over which the curves are drawn.

    Raises:
        UserError: a name with another end, or another ``by``.
    """

    # After CheckpointHook (90), which decides what is best, before ResumeHook (100).
    priority = 95

    def __init__(
        self, picture: str = "training.png", predictions: str = "predictions.png", by: str = "iteration"
    ) -> None:
        for key, name in (("picture", picture), ("predictions", predictions)):
            if Path(name).suffix not in PICTURE_SUFFIXES:
                raise UserError(f"{key}: got {name!r}, expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
        if by not in _BY:
            raise UserError(f"by: got {by!r}, expected 'iteration' or 'epoch'")
        self.picture, self.predictions, self.by = picture, predictions, by
        # The stream of this moment: during a run, Runner hides what others print.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.samples: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        self.best = runner.message_hub.get_info("best_ckpt")
        if self.best is not None and is_main_process():
            # A kill may have come between the checkpoint and the file that names it.
            self._point_to_best(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        best = runner.message_hub.get_info("best_ckpt")
        if best is None or best == self.best or not is_main_process():
            return
        self.best = best
        self._point_to_best(runner)
        save_confusion(runner.val_loop.evaluator, Path(runner.work_dir, _CONFUSION))

    def before_test_epoch(self, runner: Runner) -> None:
        self.samples, self.seen = [], 0
        step = -(-len(runner.test_dataloader.dataset) // get_world_size()) / _PREDICTIONS_SHOWN
        self.shown = {int(step * i) for i in range(_PREDICTIONS_SHOWN)}

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        for sample in outputs or ():
            if self.seen in self.shown and ("pred_instances" in sample or "pred_sem_seg" in sample):
                self.samples.append(sample.cpu())
            self.seen += 1

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not is_main_process():
            return
        save_confusion(runner.test_loop.evaluator, Path(runner.log_dir, _CONFUSION))
        if self.samples:
            picture = Path(runner.work_dir, self.predictions)
            self._draw(picture, lambda: draw_predictions(picture, self.samples, _colors(runner)))

    @master_only
    def after_train(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        hub = runner.message_hub
        curves = {name: history.data[0] for name, history in hub.log_scalars.items()}
        console = self.console
        if self.best is not None:
            console.print(f"best        {hub.get_info('best_score'):.4g}")
            console.print(f"checkpoint  {self.best}")
        picture, title = folder / self.picture, runner.experiment_name.rsplit("_", 2)[0]
        epoch = _iterations_per_epoch(runner) if self.by == "epoch" else None
        self._draw(
            picture,
            lambda: draw_report(
                picture, title, curves, read_confusion(folder / _CONFUSION), _key_metric(runner), epoch
            ),
        )
        console.print(f"log         {runner.log_dir}")

    def _draw(self, picture: Path, draw: Callable[[], None]) -> None:
        try:
            draw()
        except Exception as error:  # whatever it is, the results of the run are worth more than their picture
            self.console.print(f"no picture  {picture} cannot be drawn: {type(error).__name__}: {error}")
        else:
            self.console.print(f"picture     {picture}")

    def _point_to_best(self, runner: Runner) -> None:
        write_text(Path(runner.work_dir, _BEST), Path(self.best).name + "\n")


def _key_metric(runner: Runner) -> str | None:
    """The metric that tells what is best, if ``CheckpointHook`` is asked for one by name."""
    keys = (hook.key_indicators for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best)
    return next((f"val/{key[0]}" for key in keys if key[0] != "auto"), None)


def _colors(runner: Runner) -> ClassColors:
    settings = runner.cfg.get("test_dataloader")
    metainfo = stated_metainfo(settings["dataset"]) if isinstance(settings, Mapping) else None
    return ClassColors.of(runner.test_dataloader.dataset.metainfo["classes"], metainfo)


def _iterations_per_epoch(runner: Runner) -> float:
    """Of a run that counts iterations, those that see as many images as there are."""
    loader = runner.train_dataloader
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        return len(loader)
    return len(loader.dataset) / (loader.batch_sampler.batch_size * get_world_size())


def find_best(work_dir: str | Path) -> Path:
    """The best checkpoint of a run.

    Raises:
        UserError: the run has none, because no validation has ended yet.
    """
    folder = Path(work_dir)
    pointer = folder / _BEST
    if not pointer.is_file():
        raise UserError(f"{folder} has no best checkpoint; name a checkpoint file")
    return folder / pointer.read_text(encoding="utf-8").strip()


def save_confusion(evaluator: Evaluator, path: Path) -> None:
    """Write the confusion matrix of ``evaluator``, if it has one; rows are true classes."""
    for metric in evaluator.metrics:
        matrix = getattr(metric, "confusion_matrix", None)
        if matrix is not None:
            names = (metric.dataset_meta or {}).get("classes", range(len(matrix)))
            text = io.StringIO()
            csv.writer(text).writerows(
                [
                    ["true \\ predicted", *names],
                    *([n, *r] for n, r in zip(names, matrix.tolist(), strict=True)),
                ]
            )
            write_text(path, text.getvalue())


def read_confusion(path: Path) -> tuple[list[str], np.ndarray] | None:
    """Class names and matrix (num_classes, num_classes) from :func:`save_confusion`; None without a file."""
    if not path.is_file():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header[1:], np.array([[int(cell) for cell in row[1:]] for row in rows])


def draw_report(
    path: Path,
    title: str,
    curves: dict[str, np.ndarray],
    confusion: tuple[list[str], np.ndarray] | None,
    metric: str | None = None,
    epoch: float | None = None,
) -> None:
    """Draw loss, validation metric and learning rate over the iterations, beside the confusion matrix.

    Args:
        curves: histories by mmengine's names: ``train/loss``, ``train/lr``, ``val/...``, and the iterations of
            the validations.
        metric: which ``val/...`` is drawn; by default the first.
        epoch: iterations in an epoch, to draw over epochs instead.
    """
    length = epoch or 1
    figure = Figure(figsize=(12 if confusion else 7, 6.2), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(
        3, 2 if confusion else 1, height_ratios=(4, 4, 2), width_ratios=(1, 1.1)[: 2 if confusion else 1]
    )
    loss, score, rate = (figure.add_subplot(grid[row, 0]) for row in range(3))
    _draw_loss(loss, curves.get("train/loss", np.empty(0)), length)
    name = metric if metric in curves else None
    name = name or next((name for name in curves if name.startswith("val/") and name not in _TIMES), None)
    if name is not None and len(curves[name]) != len(curves[VALIDATED]):
        # mmdet states no precision where nothing was found, and not which validation that was.
        shown = f"{len(curves[name])} of {len(curves[VALIDATED])} validations have a value"
        score.text(0.5, 0.5, f"{name}: {shown}", ha="center", va="center", transform=score.transAxes)
    elif name is not None:
        _draw_score(score, name.removeprefix("val/"), curves[VALIDATED] / length, curves[name])
    rates = curves.get("train/lr", np.empty(0))
    rate.plot((np.arange(len(rates)) + 1) / length, rates, color="0.35", linewidth=1.5)
    rate.set(ylabel="learning rate", xlabel="iteration" if epoch is None else "epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, score, rate):
        axes.sharex(rate)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=axes is rate)
    figure.align_ylabels([loss, score, rate])
    if confusion:
        _draw_confusion(figure.add_subplot(grid[:, 1]), *confusion)
    save(figure, path, dpi=130)


def _draw_loss(axes: Axes, loss: np.ndarray, length: float) -> None:
    window = max(1, len(loss) // 40)
    done = np.arange(len(loss)) + 1  # iterations after each step
    axes.plot(done / length, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    if len(loss) >= window:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.plot((done[: len(smooth)] + (window - 1) / 2) / length, smooth, color="tab:blue", linewidth=1.8)
    axes.set(ylabel="training loss", ylim=(0, None))


def _draw_score(axes: Axes, name: str, x: np.ndarray, values: np.ndarray) -> None:
    best = int(values.argmax())
    axes.plot(x, values, color="tab:green", linewidth=1.8, marker="o", markersize=3.5)
    axes.plot(x[best], values[best], color="tab:green", marker="o", markersize=8, markerfacecolor="white")
    axes.annotate(
        f"{values[best]:.4g}",
        (x[best], values[best]),
        (0, -16),
        textcoords="offset points",
        ha="center",
    )
    axes.set_ylabel(f"validation {name.rsplit('/', 1)[-1]}")


def _draw_confusion(axes: Axes, names: list[str], matrix: np.ndarray) -> None:
    wrong = int(matrix.sum() - matrix.trace())
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title=f"best checkpoint: {wrong} of {matrix.sum()} images misclassified",
    )
    if len(names) > 30:
        return
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in zip(*matrix.nonzero(), strict=True):
        dark, error = shares[row, column] > 0.6, row != column
        axes.text(
            column,
            row,
            str(matrix[row, column]),
            ha="center",
            va="center",
            color="white" if dark else "tab:red" if error else "0.2",
            fontweight="bold" if error else "normal",
        )
