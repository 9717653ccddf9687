"""The README's picture: reported accuracy against the counted cost of every model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from backbones import zoo
from backbones.base import PlainBackbone

from .facts import families, models, skeleton
from .labels import place_labels
from .pictures import to_png

# Dark enough for text on white. Colour is never all that tells families apart: each has its name beside it, and plain
# models have another marker.
_COLORS = (
    "#0072B2",
    "#882255",
    "#117733",
    "#CC6677",
    "#332288",
    "#D55E00",
    "#2A9D8F",
    "#AA4499",
    "#7A7A00",
    "#8B5A2B",
    "#555555",
    "#4477AA",
)
_SIZE = np.array([8.0, 5.4])  # inches
_DPI = 200  # a page shows it 800 pixels wide; dense screens show every pixel
_BOX = (0.075, 0.095, 0.91, 0.875)  # the axes in the figure: left, bottom, width, height
_GIGA = (0.2, 110.0)
_TOP1 = (72.0, 86.2)
_FONT = FontProperties(family="DejaVu Sans", weight="bold", size=10)

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One family: for each model its name, operations of an image in 10^9, and reported top-1 on ImageNet-1K in %."""

    title: str
    plain: bool
    points: tuple[tuple[str, float, float], ...]

    def front(self) -> list[Point]:
        """By cost, the models that no other of the family beats at their cost (up to 5 % more) or less."""
        points = [(giga, top1) for _, giga, top1 in self.points]
        return sorted((x, y) for x, y in points if not any(y < other and cost <= 1.05 * x for cost, other in points))

    def rest(self) -> list[Point]:
        """The other models."""
        front = self.front()
        return [(giga, top1) for _, giga, top1 in self.points if (giga, top1) not in front]


def curves() -> list[Curve]:
    """Every family with reported accuracies, in the order of the tables."""
    measured = zoo.load_measured()["models"]
    found = []
    for family in families():
        points = tuple(
            (name, measured[name]["compute"]["flops"] / 1e9, facts["reported"]["imagenet"]["top1"])
            for name, facts in models(family)
            if "imagenet" in facts.get("reported", {})
        )
        if points:
            plain = isinstance(skeleton(points[0][0]), PlainBackbone)
            found.append(Curve(zoo.load_family(family)["title"], plain, points))
    return found


def accuracy_picture() -> bytes:
    """PNG of all families; its text field "Data" holds the points as JSON."""
    drawn = curves()
    return to_png(accuracy_figure(drawn), {"Data": json.dumps({curve.title: curve.points for curve in drawn})})


def accuracy_figure(drawn: Sequence[Curve]) -> Figure:
    """The curves, each with its name beside it.

    Raises:
        ValueError: a model is outside of the axes.
    """
    figure = Figure(figsize=tuple(_SIZE), dpi=_DPI)
    axes = figure.add_axes(_BOX)
    _prepare(axes)
    labels = place_labels(
        [curve.title for curve in drawn],
        [np.array([_inches(point) for point in curve.front()]) for curve in drawn],
        np.array([_inches((giga, top1)) for curve in drawn for _, giga, top1 in curve.points]),
        np.array([_inches((_GIGA[0], _TOP1[0])) + 0.05, _inches((_GIGA[1], _TOP1[1]))]),
        _FONT,
    )
    for i, (curve, label) in enumerate(zip(drawn, labels, strict=True)):
        color = _COLORS[i % len(_COLORS)]
        marker = "s" if curve.plain else "o"
        axes.plot(*zip(*curve.front(), strict=True), color=color, marker=marker, markersize=5, linewidth=1.5, zorder=3)
        for point in curve.rest():
            axes.plot(*point, color=color, marker=marker, markersize=4, markerfacecolor="white", zorder=2)
        if label.leader is not None:
            axes.plot(*label.leader.T, color=color, linewidth=0.8, zorder=2, transform=figure.dpi_scale_trans)
        x, y = label.centre
        axes.text(
            x, y, curve.title, color=color, fontproperties=_FONT, ha="center", va="center", zorder=4,
            transform=figure.dpi_scale_trans,
        )  # fmt: skip
    _explain(axes)
    return figure


def _prepare(axes: Axes) -> None:
    axes.set(xscale="log", xlim=_GIGA, ylim=_TOP1)
    axes.set_xlabel("operations for one image, $10^9$ multiply-adds (counted by this library, log scale)", fontsize=10)
    axes.set_ylabel("ImageNet-1K top-1, % (as reported by the authors)", fontsize=10)
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9.5, length=3)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _explain(axes: Axes) -> None:
    kinds = (
        ("o", "0.3", "hierarchical model"),
        ("s", "0.3", "plain model"),
        ("o", "white", "not the best of its family at its cost"),
    )
    for marker, face, label in kinds:
        axes.plot([], [], color="0.3", marker=marker, markersize=5, markerfacecolor=face, linestyle="none", label=label)
    axes.legend(loc="lower right", frameon=False, fontsize=9, handletextpad=0.2, labelcolor="0.2")


def _inches(point: Point) -> np.ndarray:
    """Where a point of the axes is, in inches from the figure's lower left corner."""
    giga, top1 = point
    across = math.log(giga / _GIGA[0]) / math.log(_GIGA[1] / _GIGA[0])
    up = (top1 - _TOP1[0]) / (_TOP1[1] - _TOP1[0])
    if not (0 <= across <= 1 and 0 <= up <= 1):
        raise ValueError(f"{giga:g} x 10^9 operations and {top1} % are outside of the picture's axes; widen them")
    return (np.array(_BOX[:2]) + np.array([across, up]) * _BOX[2:]) * _SIZE
