"""Pictures of scan orders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from backbones import zoo
from backbones.commands.orders import draw_orders
from backbones.patterns import get_pattern

_CELLS = (6, 7)  # not square, and one side odd
_HALVED = {"multi_scale": (3, 4)}  # what MSVMamba's strided convolution leaves
_CATALOGUE = ("snake", "diagonal", "spiral", "hilbert", "local_windows_2")


def orders_picture(family: str) -> bytes:
    """PNG of a family's patterns, side by side."""
    names = [scan["pattern"] for scan in zoo.load_family(family)["scan"]]
    widths = [get_pattern(name).num_orders * _grid(name)[1] / _CELLS[1] for name in names]
    figure = Figure(figsize=(2.3 * sum(widths), 2.5), dpi=110, layout="tight")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, width_ratios=widths)[0], names, strict=True):
        _draw(name, axes)
    return _png(figure)


def catalogue_picture() -> bytes:
    """PNG of the patterns that no family uses, one row for each."""
    figure = Figure(figsize=(9.2, 2.5 * len(_CATALOGUE)), dpi=90, layout="tight")
    for axes, name in zip(figure.subplots(len(_CATALOGUE), 1), _CATALOGUE, strict=True):
        _draw(name, axes)
    return _png(figure)


def _grid(name: str) -> tuple[int, int]:
    return _HALVED.get(name, _CELLS)


def _draw(name: str, axes: Axes) -> None:
    draw_orders(name, *_grid(name), axes)
    axes.set_title(name, fontsize=9)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def same_picture(path: Path, png: bytes) -> bool:
    """Whether the file shows this picture; the anti-aliasing of another machine may differ."""
    if not path.is_file():
        return False
    with Image.open(path) as old, Image.open(io.BytesIO(png)) as new:
        pixels = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (old, new)]
    return pixels[0].shape == pixels[1].shape and bool(np.abs(pixels[0] - pixels[1]).mean() < 1)
