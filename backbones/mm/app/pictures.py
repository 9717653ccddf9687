"""Pictures of what a detector or segmentor found, or what was painted in masked cells, beside the ground truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from backbones.images import read_image, write_picture
from backbones.mm.app.box_labels import BoxLabel, BoxLabels
from backbones.mm.app.colors import ClassColors
from backbones.mm.errors import UserError

SCORE = 0.3
_PAIRS_PER_ROW = 3
_PANEL, _TITLE = 2.3, 0.25  # width of a photograph and height of its title, in inches
_OPACITY = 0.6


def draw_predictions(path: Path, samples: Sequence[Any], colors: ClassColors, score: float = SCORE) -> None:
    """Draw each image twice, with its ground truth and with what the model predicts.

    Args:
        path: the picture, see :func:`backbones.images.write_picture`.
        samples: mmdet's ``DetDataSample`` or mmseg's ``SegDataSample``, with ``img_path``, in the image's size.
        score: boxes and masks of lower scores are left out.
    """
    photographs = [np.asarray(read_image(sample.img_path)) for sample in samples]
    sizes = [(x.shape[0], x.shape[1]) for x in photographs for _ in range(2)]
    figure, axes = photograph_grid(sizes, 2 * min(len(samples), _PAIRS_PER_ROW))
    shown: set[int] = set()
    for sample, photograph, (truth, prediction) in zip(samples, photographs, _pairs(axes), strict=True):
        for ax, title in ((truth, "ground truth"), (prediction, "prediction")):
            ax.imshow(photograph)
            ax.set_title(title, fontsize=8)
        if "gt_sem_seg" in sample:
            shown |= draw_labels(truth, sample.gt_sem_seg, colors) | draw_labels(
                prediction, sample.pred_sem_seg, colors
            )
        else:
            found = sample.pred_instances
            draw_instances(truth, sample.gt_instances, colors)
            draw_instances(prediction, found[found.scores >= score], colors)
    colors.add_legend(figure, sorted(shown))
    save(figure, path)


def photograph_grid(sizes: Sequence[tuple[int, int]], columns: int) -> tuple[Figure, list[Axes]]:
    """A figure, and axes 2.3 inches wide for photographs of height and width ``sizes``, which keep their shape."""
    rows = [sizes[start : start + columns] for start in range(0, len(sizes), columns)]
    heights = [_TITLE + _PANEL * max(height / width for height, width in row) for row in rows]
    figure = Figure(figsize=(_PANEL * columns, sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights}).flatten().tolist()
    for ax in axes:
        ax.set_axis_off()
    return figure, axes[: len(sizes)]


def _pairs(axes: Sequence[Axes]) -> Iterator[tuple[Axes, Axes]]:
    return zip(axes[::2], axes[1::2], strict=True)


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a PNG, PDF or SVG, see :func:`backbones.images.write_picture`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_picture(figure, path, dpi)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def draw_reconstructions(path: Path, title: str, images: np.ndarray, masks: np.ndarray, rebuilt: np.ndarray) -> None:
    """Draw each image three times: with its masked cells in grey, with what was painted there, and whole.

    Args:
        images: (n, height, width, channels), from 0 to 1.
        masks: (n, rows, columns) bool, True for a masked cell.
        rebuilt: as ``images``; shown in the masked cells alone.
    """
    count, height, width, _ = images.shape
    cells = height // masks.shape[1], width // masks.shape[2]
    hidden = masks.repeat(cells[0], axis=1).repeat(cells[1], axis=2)[..., None]
    shown = [np.where(hidden, 0.5, images), np.where(hidden, rebuilt, images), images]
    figure = Figure(figsize=(1.3 * count + 0.4, 3 * 1.35 * height / width + 0.5), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    for row, name, pictures in zip(axes, ("masked", "rebuilt", "original"), shown, strict=True):
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture.clip(0, 1), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=10)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_instances(axes: Axes, instances: Any, colors: ClassColors) -> None:
    """Draw boxes, masks and names of objects over an image, those of high scores, or small ones, over others."""
    boxes = _array(getattr(instances.bboxes, "tensor", instances.bboxes)) - 0.5  # imshow centres the first pixel at 0
    masks = _array(instances.masks).astype(bool) if "masks" in instances else None
    labels = _array(instances.labels).tolist()
    scores = _array(instances.scores) if "scores" in instances else None
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(areas if scores is None else -scores, kind="stable").tolist()  # the most important first
    if masks is not None and len(masks):
        overlay = np.zeros((*masks.shape[1:], 4))
        for i in reversed(order):
            overlay[masks[i]] = (*colors.colors[labels[i]], _OPACITY)
        axes.imshow(overlay)
    for i in reversed(order):
        left, top, right, bottom = boxes[i]
        axes.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=colors.colors[labels[i]], linewidth=1.1
            )
        )
    texts = [str(colors.names[label]) for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    BoxLabels(axes, [BoxLabel(tuple(boxes[i].tolist()), texts[i], colors.colors[labels[i]]) for i in order])


def draw_labels(axes: Axes, labels: Any, colors: ClassColors) -> set[int]:
    """Draw a label map over an image; the background and what is no class, such as 255, stay clear.

    Returns:
        The labels that are drawn.
    """
    array = _array(labels.data).squeeze()
    overlay = np.zeros((*array.shape, 4))
    drawn = set()
    for label in np.unique(array).tolist():
        if label < len(colors.names) and label not in colors.background:
            overlay[array == label] = (*colors.colors[int(label)], _OPACITY)
            drawn.add(int(label))
    axes.imshow(overlay)
    return drawn


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "to_ndarray"):  # mmdet's masks
        return values.to_ndarray()
    return values.detach().cpu().numpy()
