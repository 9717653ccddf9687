"""Pictures that are written: their formats, names of boxes, colours of classes and the clear background."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from backbones.images import PICTURE_SUFFIXES, write_picture

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData

from backbones.mm.app import box_labels
from backbones.mm.app.box_labels import MOST_LABELS, BoxLabel, BoxLabels
from backbones.mm.app.colors import ClassColors, distinct_colors, stated_metainfo, text_color
from backbones.mm.app.pictures import draw_instances, draw_labels


def figure_of_a_map() -> Figure:
    figure = Figure(figsize=(3, 2))
    ax = figure.subplots()
    ax.imshow(np.random.default_rng(0).random((20, 30)))
    ax.set_title("A title to search for")
    return figure


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_the_same_figure_gives_the_same_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(figure_of_a_map(), tmp_path / f"a{suffix}")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")  # where matplotlib writes dates, it takes this one
    write_picture(figure_of_a_map(), tmp_path / f"b{suffix}")
    contents = (tmp_path / f"a{suffix}").read_bytes()
    assert contents == (tmp_path / f"b{suffix}").read_bytes()
    assert contents.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
    assert b"ssm-backbones" in contents
    assert not re.search(rb"CreationDate|dc:date|\b20\d\d-\d\d-\d\d", contents)


def test_text_stays_text(tmp_path: Path) -> None:
    write_picture(figure_of_a_map(), tmp_path / "a.svg")
    assert "A title to search for</text>" in (tmp_path / "a.svg").read_text()
    write_picture(figure_of_a_map(), tmp_path / "a.pdf")
    contents = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in contents and b"/Type3" not in contents  # TrueType, inside the file


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.PNG"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}, expected a name that ends in \.png, \.pdf, \.svg"):
        write_picture(Figure(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def placed(boxes: list[tuple[float, ...]], width: float, *, text: str = "a name", inches: float = 4.0) -> list[Bbox]:
    """Where the names of ``boxes`` stand, in pixels of an image of 100 x 100; the note is the last."""
    figure = Figure(figsize=(inches, inches))
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(np.zeros((100, 100)))
    labels = BoxLabels(ax, [BoxLabel(box, text, (0.1, 0.2, 0.3)) for box in boxes])
    drawn = []
    draw = box_labels.Text.draw

    def keep(self: box_labels.Text, renderer: object) -> None:
        drawn.append((self.get_text(), box_labels._extent(self, renderer)))
        draw(self, renderer)

    box_labels.Text.draw = keep
    try:
        labels.draw(canvas.get_renderer())
    finally:
        box_labels.Text.draw = draw
    inverse = ax.transData.inverted()
    found = []
    for words, extent in drawn:
        (left, bottom), (right, top) = inverse.transform([extent.min, extent.max])
        found.append((words, Bbox.from_extents(left, top, right, bottom)))
    return found


@pytest.mark.parametrize(
    "box, side",
    [
        ((40, 50, 48, 58), "above"),
        ((40, 0, 48, 8), "below"),
        ((10, 0, 90, 99), "inside"),
        ((95, 50, 99, 54), "above"),  # shifted to the left, into the picture
    ],
)
def test_a_name_stands_beside_its_box(box: tuple[float, ...], side: str) -> None:
    ((words, name),) = placed([box], 4)
    assert words == "a name"
    assert name.x0 >= -0.51 and name.x1 <= 99.51 and name.y0 >= -0.51 and name.y1 <= 99.51
    if side == "above":
        assert name.y1 == pytest.approx(box[1], abs=0.5)
    elif side == "below":
        assert name.y0 == pytest.approx(box[3], abs=0.5)
    else:
        assert name.y0 >= box[1] - 0.51 and name.y1 <= box[3]
    assert name.height > 2  # of 4 inches: 7 points and more


def test_names_never_overlap_and_what_is_left_out_is_counted() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 90, (60, 2))
    boxes = [(*corner, *(corner + rng.uniform(3, 40, 2))) for corner in corners]
    for inches in (2.0, 4.0, 12.0):
        *names, (note, corner) = placed(boxes, 4, inches=inches)
        assert 3 <= len(names) <= MOST_LABELS
        assert note == f"{60 - len(names)} names left out"
        for (_, a), (_, b) in itertools.combinations([*names, ("", corner)], 2):
            assert not (a.x0 < b.x1 - 1e-6 and b.x0 < a.x1 - 1e-6 and a.y0 < b.y1 - 1e-6 and b.y0 < a.y1 - 1e-6)
        assert sum(x.width * x.height for _, x in names) <= 0.25 * 100**2


def test_every_name_can_be_read_on_its_color() -> None:
    def luminance(color: tuple[float, ...]) -> float:
        return float(np.dot([0.2126, 0.7152, 0.0722], [((x + 0.055) / 1.055) ** 2.4 for x in color]))

    for color in [*distinct_colors(150), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.18, 0.18, 0.18)]:
        a, b = sorted((luminance(color), luminance(to_rgb(text_color(color)))))
        assert (b + 0.05) / (a + 0.05) > 4.4


@pytest.mark.parametrize("count", [1, 10, 21, 150])
def test_colors_are_distinct(count: int) -> None:
    colors = np.array(distinct_colors(count))
    assert colors.shape == (count, 3) and colors.min() >= 0 and colors.max() <= 1
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + np.eye(count)
    assert distances.min() > (0.25 if count <= 21 else 0.04)


@pytest.mark.parametrize(
    "names, metainfo, clear",
    [
        (("background", "cat"), None, {0}),
        (("cat", "_background_", "Background"), None, {1, 2}),
        (("photograph", "0"), {"background": ("photograph",)}, {0}),
        (("background", "0"), {"background": ()}, set()),  # the data set says that it is a class as any other
        (("wall", "building"), {"classes": ("wall", "building")}, set()),
    ],
)
def test_background(names: tuple[str, ...], metainfo: dict | None, clear: set[int]) -> None:
    colors = ClassColors.of(names, metainfo)
    assert colors.background == clear
    ax = Figure().subplots()
    labels = torch.arange(len(names))[None].repeat(4, 1)
    labels[0] = 255
    drawn = draw_labels(ax, PixelData(data=labels[None]), colors)
    assert drawn == set(range(len(names))) - clear
    overlay = np.asarray(ax.images[0].get_array())
    assert (overlay[0, :, 3] == 0).all()
    for label in range(len(names)):
        assert (overlay[1:, label, 3] > 0).all() == (label not in clear)


def test_a_legend_names_what_is_drawn_and_stays_within_the_figure() -> None:
    names = [f"a class with a long name {i}" for i in range(60)]
    colors = ClassColors.of(["background", *names])
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.subplots()
    FigureCanvasAgg(figure)
    colors.add_legend(figure, range(40))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    words = [x.get_text() for x in legend.get_texts()]
    assert words == [*names[:24], "and 15 more"]
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
    assert figure.get_size_inches()[1] > 5


def test_the_palette_of_the_data_counts() -> None:
    metainfo = {"classes": ("a", "b", "c"), "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 255]]}
    assert ClassColors.of(("c", "a"), metainfo).colors == [(0, 0, 1), (1, 0, 0)]
    made = ClassColors.of(("c", "d"), metainfo).colors  # "d" has none
    assert made == distinct_colors(2)


def test_what_a_data_set_states_of_its_classes() -> None:
    pytest.importorskip("mmseg.datasets")
    ade = {"type": "RepeatDataset", "dataset": {"type": "mmseg.ADE20KDataset"}}
    stated = stated_metainfo(ade)
    assert len(stated["classes"]) == len(stated["palette"]) == 150
    assert ClassColors.of(("building",), stated).colors[0] == pytest.approx([x / 255 for x in (180, 120, 120)])
    few = stated_metainfo({"type": "mmseg.ADE20KDataset", "metainfo": {"classes": ("sky", "wall")}})
    assert few["palette"] == [[6, 230, 230], [120, 120, 120]]
    assert "palette" not in stated_metainfo({"type": "mmseg.ADE20KDataset", "metainfo": {"classes": ("sky", "own")}})
    assert stated_metainfo({"type": "mmseg.BaseSegDataset"}) == {}


@pytest.mark.parametrize(
    "config", ["digits/upernet_efficientvmamba-tiny_digits", "medical/unet_vmamba-tiny-s1l8_tissue",
               "medical/vm-unet_300e_isic-256x256", "medical/vm-unet_300e_synapse-224x224"]
)  # fmt: skip
def test_photographs_are_not_tinted(config: str) -> None:
    """The first class of these data sets is what is not looked for."""
    pytest.importorskip("mmseg.datasets")
    dataset = Config.fromfile(Path(__file__).parents[1] / f"configs/{config}.py").test_dataloader.dataset
    init_default_scope("mmseg")
    metainfo = stated_metainfo(dataset)
    assert ClassColors.of(metainfo["classes"], metainfo).background == {0}


def test_objects_of_high_scores_lie_over_others() -> None:
    ax = Figure().subplots()
    ax.imshow(np.zeros((10, 10)))
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[:, 2:8, 2:8] = True
    boxes, scores = torch.tensor([[2.0, 2, 8, 8]] * 2), torch.tensor([0.9, 0.4])
    colors = ClassColors.of(("a", "b"))
    found = InstanceData(bboxes=boxes, labels=torch.tensor([1, 0]), scores=scores, masks=masks)
    draw_instances(ax, found, colors)
    assert np.asarray(ax.images[1].get_array())[5, 5, :3] == pytest.approx(colors.colors[1])
    (names,) = (x for x in ax.get_children() if isinstance(x, BoxLabels))
    assert [x.text for x in names.labels] == ["b 0.90", "a 0.40"]
    assert names.labels[0].box == (1.5, 1.5, 7.5, 7.5)


def test_no_objects() -> None:
    ax = Figure().subplots()
    none = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 5, 5))
    draw_instances(ax, none, ClassColors.of(("a",)))
    FigureCanvasAgg(ax.figure).draw()
