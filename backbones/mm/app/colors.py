"""A colour for each class of a data set, and the classes that stay clear in a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.registry import DATASETS

Color = tuple[float, float, float]

# The ten of matplotlib, but for grey, which is lost on a photograph.
_FIRST = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "gold", "tab:olive",
          "tab:cyan")  # fmt: skip
_GOLDEN = 0.618034
_BACKGROUND = {"background", "bg"}
_LEGEND = 24  # more entries than this explain nothing
_LETTER = 0.62  # mean width of a letter, in sizes of its font


@dataclass(frozen=True)
class ClassColors:
    """How the classes of a data set are drawn.

    Attributes:
        names: of the classes, by label.
        colors: red, green and blue in 0..1, by label.
        background: labels that stay clear in a segmentation, so that the photograph is seen.
    """

    names: Sequence[str]
    colors: Sequence[Color]
    background: frozenset[int] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], metainfo: Mapping[str, Any] | None = None) -> ClassColors:
        """Colours of the classes ``names``.

        Args:
            metainfo: of the data set, see :func:`stated_metainfo`. Its ``palette``, red, green and blue in 0..255 for
                each of its ``classes``, counts if it has a colour for every name; other colours are made. Its
                ``background`` lists the names of classes that stay clear; by default, a class called "background".
        """
        metainfo = metainfo or {}
        stated = {_plain(name) for name in metainfo.get("background", _BACKGROUND)}
        background = frozenset(label for label, name in enumerate(names) if _plain(name) in stated)
        palette = _palette(metainfo)
        if all(name in palette for name in names):
            return cls(names, [_color(value / 255 for value in palette[name]) for name in names], background)
        made = iter(distinct_colors(len(names)))
        # The background takes none of the colours that are easiest to tell apart.
        shown = {label: next(made) for label in range(len(names)) if label not in background}
        return cls(names, [shown.get(label, (0.5, 0.5, 0.5)) for label in range(len(names))], background)

    def add_legend(self, figure: Figure, labels: Iterable[int]) -> None:
        """Explain the colours of ``labels`` below a figure, which grows by it; of more than 24, the first.

        The background needs no explanation.
        """
        shown = [label for label in labels if label not in self.background]
        if not shown:
            return
        handles = [Patch(color=self.colors[label], label=self.names[label]) for label in shown[:_LEGEND]]
        if len(shown) > _LEGEND:
            handles.append(Patch(alpha=0, label=f"and {len(shown) - _LEGEND} more"))
        size, (width, height) = 9.0, figure.get_size_inches()
        entry = (max(len(str(handle.get_label())) for handle in handles) * _LETTER + 3.5) * size / 72
        columns = max(1, min(len(handles), int(width / entry)))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=size,
            handlelength=1.2, handleheight=1.0, columnspacing=1.4,
        )  # fmt: skip
        rows = -(-len(handles) // columns)
        figure.set_size_inches(width, height + 0.1 + 0.2 * rows)


def distinct_colors(count: int) -> list[Color]:
    """``count`` colours, of which the first ten are the easiest to tell apart."""
    colors = [to_rgb(name) for name in _FIRST[:count]]
    for i in range(count - len(colors)):
        # Hues a golden section apart never meet; three steps of lightness tell neighbours apart.
        colors.append(colorsys.hls_to_rgb((0.8 + i * _GOLDEN) % 1, (0.25, 0.7, 0.5)[i % 3], 0.9))
    return colors


def text_color(background: Color) -> str:
    """ "black" or "white", whichever has more contrast on ``background`` by WCAG's measure, at least 4.5."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def stated_metainfo(dataset: Any) -> dict[str, Any]:
    """``metainfo`` of the settings of a data set, however deep it is wrapped, with what its type states.

    A data set that is built may have made up a palette, as mmseg's do.
    """
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    own = dataset.get("metainfo") or {}
    with DATASETS.switch_scope_and_registry(None) as registry:  # of the default scope
        of_type = getattr(registry.get(dataset["type"]), "METAINFO", None) or {}
    if "classes" in own and "palette" not in own:
        # Colours go by name, so classes may be fewer or in another order than the type's.
        palette = _palette(of_type)
        if palette and all(name in palette for name in own["classes"]):
            own = {**own, "palette": [palette[name] for name in own["classes"]]}
        of_type = {key: value for key, value in of_type.items() if key != "palette"}
    return {**of_type, **own}


def _palette(metainfo: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Red, green and blue of each class by its name; a palette of another length is of the classes that it reaches."""
    return dict(zip(metainfo.get("classes") or (), metainfo.get("palette") or (), strict=False))


def _plain(name: str) -> str:
    return name.strip("_").lower()


def _color(values: Iterable[float]) -> Color:
    red, green, blue = values
    return red, green, blue
