"""Pictures of what a detector or segmentor found, or what was painted in masked cells, beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from backbones.images import read_image, write_picture
from backbones.mm.errors import UserError

SCORE = 0.3
_PAIRS_PER_ROW = 3


def draw_predictions(path: Path, samples: Sequence[Any], classes: Sequence[str], score: float = SCORE) -> None:
    """Draw each image twice, with its ground truth and with what the model predicts.

    Args:
        samples: mmdet's ``DetDataSample`` or mmseg's ``SegDataSample``, with ``img_path``, in the image's size.
        classes: names by label.
        score: boxes and masks of lower scores are left out.
    """
    rows = -(-len(samples) // _PAIRS_PER_ROW)
    figure = Figure(figsize=(4.6 * _PAIRS_PER_ROW, 2.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, 2 * _PAIRS_PER_ROW, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    colors = matplotlib.colormaps["tab20" if len(classes) <= 20 else "gist_ncar"].resampled(len(classes))
    shown: set[int] = set()
    for index, sample in enumerate(samples):
        row, column = divmod(index, _PAIRS_PER_ROW)
        truth, prediction = axes[row, 2 * column : 2 * column + 2]
        pixels = np.asarray(read_image(sample.img_path))
        for ax, title in ((truth, "ground truth"), (prediction, "prediction")):
            ax.imshow(pixels)
            ax.set_title(title, fontsize=9)
        if "gt_sem_seg" in sample:
            shown |= draw_labels(truth, sample.gt_sem_seg, colors) | draw_labels(
                prediction, sample.pred_sem_seg, colors
            )
        else:
            found = sample.pred_instances
            draw_instances(truth, sample.gt_instances, classes, colors)
            draw_instances(prediction, found[found.scores >= score], classes, colors)
    if shown:
        handles = [Patch(color=colors(label), label=classes[label]) for label in sorted(shown)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 12), frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a PNG, see :func:`backbones.images.write_picture`.

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


def draw_instances(axes: Axes, instances: Any, classes: Sequence[str], colors: Colormap) -> None:
    boxes = _array(getattr(instances.bboxes, "tensor", instances.bboxes))
    masks = _array(instances.masks) if "masks" in instances else [None] * len(boxes)
    scores = _array(instances.scores) if "scores" in instances else [None] * len(boxes)
    for box, mask, label, score in zip(boxes, masks, _array(instances.labels), scores, strict=True):
        color = colors(int(label))
        if mask is not None:
            axes.imshow(np.where(mask.astype(bool)[..., None], (*color[:3], 0.65), 0.0))
        left, top, right, bottom = box - 0.5  # imshow puts the centre of the first pixel at 0
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.4))
        text = classes[int(label)] if score is None else f"{classes[int(label)]} {score:.2f}"
        axes.text(
            left, top, text, fontsize=7, color="white", va="bottom", clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def draw_labels(axes: Axes, labels: Any, colors: Colormap) -> set[int]:
    """Returns the labels that occur; others than classes, such as 255, stay clear."""
    array = _array(labels.data).squeeze()
    known = array < colors.N
    overlay = colors(np.where(known, array, 0))
    overlay[..., 3] = np.where(known, 0.65, 0.0)
    axes.imshow(overlay)
    return set(np.unique(array[known]).tolist())


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "to_ndarray"):  # mmdet's masks
        return values.to_ndarray()
    return values.detach().cpu().numpy()
