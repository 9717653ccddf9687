"""Places for the labels of curves: beside a point of the curve, off all curves, markers and other labels.

Lengths are in inches from the figure's lower left corner. Extents of text come from the outlines of the font, not from
a drawing, so that every machine finds the same places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

_GAPS = (0.1, 0.14, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)  # between a label and its point
_LEADER = 0.15  # a label that is farther away is tied to its point by a line
_STEP = 0.03  # between the samples of a curve
_OPTIONS, _DESCENTS = 60, 8  # places that are tried for a label, and starts of the search


@dataclass(frozen=True, eq=False)
class Label:
    """One place for a label."""

    centre: np.ndarray
    half: np.ndarray  # half of its width and height
    point: np.ndarray  # of the curve
    gap: float

    @cached_property
    def tie(self) -> np.ndarray:
        """Points along the shortest line from the curve's point to the label, (21, 2)."""
        return _between(self.point, np.clip(self.point, self.centre - self.half, self.centre + self.half), 20)

    @property
    def leader(self) -> np.ndarray | None:
        """The same, if it is to be drawn: where the label is far from its point."""
        return self.tie if self.gap >= _LEADER else None

    def covers(self, points: np.ndarray, margin: float) -> int:
        """How many of the points it covers, or comes closer to than ``margin``."""
        return np.count_nonzero((np.abs(points - self.centre) < self.half + margin).all(1))


def place_labels(
    texts: Sequence[str], curves: Sequence[np.ndarray], markers: np.ndarray, area: np.ndarray, font: FontProperties
) -> list[Label]:
    """A place for every text.

    Args:
        texts: one for each curve.
        curves: the points of each curve, (n, 2).
        markers: all points that labels keep off, (m, 2).
        area: lower left and upper right corner of where labels may be, (2, 2).
        font: of the labels.
    """
    strokes = [_samples(curve) for curve in curves]
    options = []
    for i, (text, curve) in enumerate(zip(texts, curves, strict=True)):
        others = np.concatenate(strokes[:i] + strokes[i + 1 :] + [markers[:0]])
        places = _places(curve, _extent(text, font) / 2)
        priced = [(_cost(label, strokes[i], others, markers, area), label) for label in places]
        options.append(sorted(priced, key=lambda option: option[0])[:_OPTIONS])
    return _choose(options)


def _extent(text: str, font: FontProperties) -> np.ndarray:
    width = TextPath((0, 0), text, prop=font).get_extents().width
    return np.array([width, font.get_size_in_points()]) / 72


def _between(a: np.ndarray, b: np.ndarray, steps: int) -> np.ndarray:
    return a + (b - a) * np.linspace(0, 1, steps + 1)[:, None]


def _samples(curve: np.ndarray) -> np.ndarray:
    """Points along a curve, close to each other."""
    parts = [curve[:1]]
    for a, b in itertools.pairwise(curve):
        parts.append(_between(a, b, max(int(math.dist(a, b) / _STEP), 1)))
    return np.concatenate(parts)


def _places(curve: np.ndarray, half: np.ndarray) -> list[Label]:
    found = []
    for point in curve:
        for gap in _GAPS:
            for angle in np.arange(16) * math.pi / 8:
                direction = np.array([math.cos(angle), math.sin(angle)]).round(6)
                edge = half * np.clip(direction * 1.42, -1, 1)
                found.append(Label(point + gap * direction + edge, half, point, gap))
    return found


def _cost(label: Label, own: np.ndarray, others: np.ndarray, markers: np.ndarray, area: np.ndarray) -> float:
    """How much a label and its leader cover, and how far the label is from its curve."""
    outside = (label.centre - label.half < area[0]).any() or (label.centre + label.half > area[1]).any()
    cost = 8 * label.gap + 1000 * outside
    cost += 15 * label.covers(markers, 0.07) + 2 * label.covers(own, 0.02) + label.covers(others, 0.08)
    strange = markers[(markers != label.point).any(1)]
    cost += 4 * label.covers(others, 0.0) + 3 * label.covers(strange, 0.12)
    return cost + 10 * _near(label.tie[4:], others, 0.03) + 10 * _near(label.tie[4:], strange, 0.07)


def _near(line: np.ndarray, points: np.ndarray, distance: float) -> int:
    """How many of the points are closer to the line than this."""
    around = np.all((points > line.min(0) - distance) & (points < line.max(0) + distance), axis=1)
    return np.count_nonzero((np.hypot(*(points[around, None] - line).transpose(2, 0, 1)) < distance).any(1))


def _choose(options: Sequence[Sequence[tuple[float, Label]]]) -> list[Label]:
    """Of each curve's options, with their costs, the ones that go together: the best of several descents."""
    count = len(options)
    prices = [np.array([cost for cost, _ in labels]) for labels in options]
    clashes = [[_clashes(options[i], options[j]) if i != j else None for j in range(count)] for i in range(count)]
    random = Random(0)
    best: tuple[float, list[int]] = (math.inf, [])
    for _ in range(_DESCENTS):
        chosen = [random.randrange(len(labels)) for labels in options]
        total, before = math.inf, math.inf
        while total < before or before == math.inf:
            before, total = total, 0.0
            for i in range(count):
                costs = prices[i] + sum(x[:, chosen[j]] for j, x in enumerate(clashes[i]) if x is not None)
                chosen[i] = int(np.argmin(costs.round(6)))
                total += round(float(costs[chosen[i]]), 6)
        best = min(best, (total, chosen))
    return [labels[k][1] for labels, k in zip(options, best[1], strict=True)]


def _clashes(some: Sequence[tuple[float, Label]], others: Sequence[tuple[float, Label]]) -> np.ndarray:
    """Cost of each label of ``some`` beside each of ``others``, (n, m).

    Labels that overlap, leaders through labels and crossing leaders cost.
    """
    (a, half_a, leaders_a), (b, half_b, leaders_b) = _arrays(some), _arrays(others)
    sides = np.minimum(half_a + half_b + 0.04 - np.abs(a[:, None] - b), 2 * np.minimum(half_a, half_b))
    shared = np.where((sides > 0).all(-1), 20 + 300 * sides.prod(-1), 0)
    through_b = (np.abs(leaders_a[:, None] - b[:, None]) < half_b + 0.03).all(-1).sum(-1)
    through_a = (np.abs(leaders_b[:, None] - a[:, None]) < half_a + 0.03).all(-1).sum(-1)
    return shared + 3.0 * (through_b + through_a.T) + 15.0 * _cross(leaders_a[:, None, ::20], leaders_b[None, :, ::20])


def _cross(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether segments cross, broadcast over all but their last two axes: two ends with two coordinates."""

    def side(segment: np.ndarray, point: np.ndarray) -> np.ndarray:
        along, to = segment[..., 1, :] - segment[..., 0, :], point - segment[..., 0, :]
        return along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]

    apart = [side(x, y[..., 0, :]) * side(x, y[..., 1, :]) for x, y in ((some, others), (others, some))]
    return (apart[0] < 0) & (apart[1] < 0)


def _arrays(options: Sequence[tuple[float, Label]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (n, 2), half a size (2,), and leaders (n, 21, 2), NaN where there is none."""
    none = np.full((21, 2), np.nan)
    leaders = [none if label.leader is None else label.leader for _, label in options]
    return np.array([label.centre for _, label in options]), options[0][1].half, np.array(leaders)
