"""Pictures of scan orders, and how pictures are written and compared."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL.PngImagePlugin import PngImageFile

from backbones import zoo
from backbones.commands.orders import count_grids, draw_orders

_CELLS = (6, 7)  # not square, and one side odd
_HALVED = {"multi_scale": (3, 4)}  # what MSVMamba's strided convolution leaves
_BLOCK, _DIFFERENT = 16, 16  # pixels of a block's side, and levels between means of two pictures
_CATALOGUE = ("snake", "diagonal", "spiral", "hilbert", "local_windows_2")


def orders_picture(family: str) -> bytes:
    """PNG of a family's patterns, side by side."""
    names = [scan["pattern"] for scan in zoo.load_family(family)["scan"]]
    widths = [count_grids(name, *_grid(name)) * _grid(name)[1] / _CELLS[1] for name in names]
    figure = Figure(figsize=(2.3 * sum(widths), 2.5), dpi=110, layout="tight")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, width_ratios=widths)[0], names, strict=True):
        _draw(name, axes)
    return to_png(figure)


def catalogue_picture() -> bytes:
    """PNG of the patterns that no family uses, one row for each."""
    figure = Figure(figsize=(9.2, 2.5 * len(_CATALOGUE)), dpi=90, layout="tight")
    for axes, name in zip(figure.subplots(len(_CATALOGUE), 1), _CATALOGUE, strict=True):
        _draw(name, axes)
    return to_png(figure)


def _grid(name: str) -> tuple[int, int]:
    return _HALVED.get(name, _CELLS)


def _draw(name: str, axes: Axes) -> None:
    draw_orders(name, *_grid(name), axes)
    axes.set_title(name, fontsize=9)


def to_png(figure: Figure, texts: Mapping[str, str] | None = None) -> bytes:
    """The figure as a PNG that also holds ``texts`` as text fields, and nothing about the machine."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None, **(texts or {})})
    return buffer.getvalue()


def same_picture(path: Path, png: bytes) -> bool:
    """Whether the file shows this picture, and has its text fields.

    Another build of matplotlib or of its font renderer may shift edges by a fraction of a pixel; what moves, comes or
    goes changes the mean of some block of pixels by more than that does.
    """
    if not path.is_file():
        return False
    with PngImageFile(path) as old, PngImageFile(io.BytesIO(png)) as new:
        if old.size != new.size or old.text != new.text:
            return False
        means = [np.asarray(image.convert("RGB").reduce(_BLOCK), dtype=np.int16) for image in (old, new)]
    return bool(np.abs(means[0] - means[1]).max() < _DIFFERENT)
