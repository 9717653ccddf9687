"""Names of boxes in a picture, which overlap neither each other nor the picture's frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

from backbones.mm.app.colors import Color, text_color

MOST_LABELS = 25
"""Boxes in one picture that get a name at most, the most important ones."""

_SHARE = 0.25  # of the picture, which names may cover together

_FONT_SIZE = 7.0  # in points: the least that journals print
_PADDING = 0.18  # around the text, in font sizes
_LARGE = 4.0  # a box this many times as high as its name holds it


@dataclass(frozen=True)
class BoxLabel:
    """What is written beside a box: left, top, right and bottom in pixels of the image."""

    box: tuple[float, float, float, float]
    text: str
    color: Color


class BoxLabels(Artist):
    """Writes ``labels`` beside their boxes, the most important first, in letters of 7 points.

    A name stands above its box, or inside of it if the box is large, else below or beside. One that fits nowhere is
    left out, and so are those beyond :data:`MOST_LABELS` and those that would cover more than a quarter of the picture;
    their number is written into the corner. Places are chosen when the picture is drawn, as its size in points is known
    only then.
    """

    def __init__(self, axes: Axes, labels: Sequence[BoxLabel]) -> None:
        super().__init__()
        self.labels, self.picture = labels, axes
        self.set_zorder(5)
        self.set_in_layout(False)
        axes.add_artist(self)

    def draw(self, renderer: RendererBase) -> None:
        """Called by matplotlib."""
        texts = self._placed(renderer, None)
        if len(texts) < len(self.labels):
            frame, note = self.picture.bbox, self._text(_left_out(len(self.labels)), (0.0, 0.0, 0.0))
            extent = _extent(note, renderer)
            corner = Bbox.from_bounds(frame.x1 - extent.width, frame.y0, extent.width, extent.height)
            texts = self._placed(renderer, corner)
            note.set_text(_left_out(len(self.labels) - len(texts)))
            extent = _extent(note, renderer)
            _move(note, extent, frame.x1 - extent.width, frame.y0)
            texts.append(note)
        for text in texts:
            text.draw(renderer)
        self.stale = False

    def _placed(self, renderer: RendererBase, reserved: Bbox | None) -> list[Text]:
        """The names that find a place; none lies over ``reserved``."""
        frame = self.picture.bbox
        taken = [] if reserved is None else [reserved]
        texts: list[Text] = []
        for label in self.labels[:MOST_LABELS]:
            text = self._text(label.text, label.color)
            place = self._place(text, self._on_screen(label.box), taken, renderer)
            if place is None:
                continue
            if sum(x.width * x.height for x in (*taken, place)) > _SHARE * frame.width * frame.height:
                break
            taken.append(place)
            texts.append(text)
        return texts

    def _text(self, words: str, color: Color) -> Text:
        text = Text(
            0, 0, words, fontsize=_FONT_SIZE, color=text_color(color), va="bottom", ha="left",
            bbox={"boxstyle": f"square,pad={_PADDING}", "facecolor": color, "edgecolor": "none"},
        )  # fmt: skip
        figure: Any = self.get_figure(root=True)
        text.set_figure(figure)
        text.set_transform(IdentityTransform())
        return text

    def _on_screen(self, box: tuple[float, float, float, float]) -> Bbox:
        left, top, right, bottom = box
        corners, frame = self.picture.transData.transform([(left, bottom), (right, top)]), self.picture.bbox
        return Bbox.from_extents(*corners.clip(frame.min, frame.max).min(0), *corners.clip(frame.min, frame.max).max(0))

    def _place(self, text: Text, box: Bbox, taken: Sequence[Bbox], renderer: RendererBase) -> Bbox | None:
        frame, extent = self.picture.bbox, _extent(text, renderer)
        for x, y in _candidates(box, extent.width, extent.height):
            x = min(max(x, frame.x0), frame.x1 - extent.width)
            place = Bbox.from_bounds(x, y, extent.width, extent.height)
            if place.y0 < frame.y0 or place.y1 > frame.y1 or extent.width > frame.width:
                continue
            if not any(_overlap(place, other) for other in taken):
                _move(text, extent, x, y)
                return place
        return None


def _left_out(count: int) -> str:
    return f"{count} name{'s' if count > 1 else ''} left out"


def _candidates(box: Bbox, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Lower left corners of a text, best first."""
    yield box.x0, box.y1  # above
    if box.height > _LARGE * height and box.width > width:
        yield box.x0, box.y1 - height
        yield box.x0, box.y0
    yield box.x0, box.y0 - height  # below
    for y in (box.y1 - height, box.y0):
        yield box.x1, y
        yield box.x0 - width, y
    yield box.x1 - width, box.y1
    yield box.x1 - width, box.y0 - height


def _extent(text: Text, renderer: RendererBase) -> Bbox:
    """The text's rectangle with its padding, in pixels of the picture."""
    patch: Any = text.get_bbox_patch()
    text.update_bbox_position_size(renderer)
    return patch.get_window_extent(renderer)


def _move(text: Text, extent: Bbox, x: float, y: float) -> None:
    """Put the rectangle of a text that stands at (0, 0) to ``x, y``."""
    text.set_position((x - extent.x0, y - extent.y0))


def _overlap(a: Bbox, b: Bbox) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
