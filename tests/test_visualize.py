"""Hidden attention against the operator, receptive fields against known ones, and tools/visualize.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from PIL import Image
from torch import Tensor, nn

from backbones.analysis.hidden_attention import RecordedScan, hidden_attention, recorded_scans
from backbones.analysis.tokens import LeftTokens, left_tokens
from backbones.base import reduce_tokens
from backbones.commands import visualize
from backbones.commands.orders import count_grids
from backbones.commands.subject import Subject, load_image
from backbones.ops import selective_scan
from backbones.patterns import PATTERNS, get_pattern

ROOT = Path(__file__).parents[1]

# Small models of every family, and what their scans do differently.
MODELS = {
    "vim_tiny": {"img_size": (48, 80), "depth": 2},  # class token
    "lbvim_tiny": {"img_size": (48, 80), "depth": 2},  # windows, one order
    "vmamba_tiny_s1l8": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "vanilla_vmamba_tiny": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},  # 16 states
    "msvmamba_nano": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},  # several visits, half the resolution
    "efficientvmamba_tiny": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},  # padded slots
    "groupmamba_tiny": {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)},  # an input for each order
    "spatialmamba_tiny": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},  # states
    "localvim_tiny": {"img_size": (48, 80), "depth": 2},  # directions of its own in each block
    "localvmamba_tiny": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},  # padded windows
    "plainmamba_l1": {"img_size": (48, 80), "depth": 2},  # parameters in raster order
}


def scans_of(name: str) -> list[RecordedScan]:
    model = timm.create_model(name, **MODELS[name]).eval()
    with recorded_scans(model) as scans, torch.no_grad():
        model.forward_intermediates(torch.randn(2, 3, *MODELS[name].get("img_size", (32, 56))))
    return scans


@pytest.mark.parametrize("name", MODELS)
def test_hidden_attention_is_the_scan(name: str) -> None:
    """The matrix times u is what the operator computes without D, in double precision."""
    scans = scans_of(name)
    assert scans
    for scan in scans:
        tensors = (scan.u, scan.delta, scan.A, scan.B, scan.C)
        expected = selective_scan(
            *(x.double() for x in tensors), orders=scan.orders, delta_bias=scan.delta_bias.double(),
            delta_softplus=scan.delta_softplus, local_window=scan.local_window,
        )  # fmt: skip
        weights = hidden_attention(scan, range(scan.u.shape[1]), image=1)
        u = scan.u[1].double()
        found = torch.einsum("kijc,jkc->ic" if u.dim() == 3 else "kijc,jc->ic", weights, u)
        torch.testing.assert_close(found, expected[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "name, grids, class_token",
    [
        ("vim_tiny", [(3, 5)] * 2, True),
        ("lbvim_tiny", [(3, 5)] * 2, False),
        ("vmamba_tiny_s1l8", [(8, 14), (4, 7), (2, 4), (1, 2)], False),
        ("msvmamba_nano", [(8, 14), (4, 7), (4, 7), (2, 4), (2, 4), (1, 2), (1, 2), (1, 1)], False),
    ],
)
def test_grids_of_scans(name: str, grids: list[tuple[int, int]], class_token: bool) -> None:
    scans = scans_of(name)
    assert [scan.grid for scan in scans] == grids
    assert all(scan.class_token == class_token for scan in scans)
    first = scans[0]
    height, width = first.grid
    tokens = [first.token(i, j) for i in range(height) for j in range(width)]
    assert first.to_map(torch.arange(first.u.shape[1])).flatten().tolist() == tokens
    with pytest.raises(ValueError, match=rf"\({height}, 0\).*{height} x {width}"):
        first.token(height, 0)


def test_recording_ends() -> None:
    model = timm.create_model("vmamba_tiny_s1l8", **MODELS["vmamba_tiny_s1l8"]).eval()
    with recorded_scans(model) as scans:
        pass
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert scans == []
    assert not any(module._forward_pre_hooks for module in model.modules())


class Convolutions(nn.Module):
    """Known receptive fields: 3 x 3, then 7 x 7 pixels of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.second(first)


@pytest.mark.parametrize("stage, side, centre", [(0, 3, (10, 13)), (1, 5, (10, 14))])
def test_receptive_field_of_convolutions(stage: int, side: int, centre: tuple[int, int]) -> None:
    subject = Subject("convolutions", Convolutions(), (0.5,) * 3, (0.5,) * 3, None)
    field = visualize.receptive_field(subject, torch.randn(2, 3, 21, 27), stage)
    assert field.shape == (21, 27)
    expected = torch.zeros(21, 27, dtype=torch.bool)
    i, j = centre
    expected[i - side // 2 : i + side // 2 + 1, j - side // 2 : j + side // 2 + 1] = True
    assert torch.equal(field > 0, expected)


def test_squares_around_the_centre() -> None:
    field = torch.zeros(9, 11)
    field[4, 5], field[4, 8], field[0, 5] = 0.6, 0.3, 0.1
    assert [visualize._side(field, share) for share in (0.5, 0.9, 0.95)] == [1, 7, 9]


@pytest.mark.parametrize("size", [(7, 7), (5, 8), (1, 9), (1, 1)])
@pytest.mark.parametrize("name", PATTERNS)
def test_orders_of_every_pattern_are_drawn(name: str, size: tuple[int, int]) -> None:
    """Arrows, jumps and steps through padding add up to the steps of the orders; discs and squares mark their ends."""
    figure = Figure()
    ax = figure.subplots()
    visualize.draw_orders(name, *size, ax)
    figure.canvas.draw()
    orders = get_pattern(name).orders(*size).numpy()
    lines = sum(len(x.get_segments()) for x in ax.collections if hasattr(x, "get_segments"))
    arrows = sum(x.N for x in ax.collections if isinstance(x, Quiver))
    shown = [order for order in orders if (order >= 0).any()]
    # The multi-scale walk goes three times over the cells, in a grid each time.
    walks = 3 if name == "multi_scale" else 1
    assert count_grids(name, *size) == walks * len(orders)
    assert lines + arrows == sum(int((order >= 0).sum()) - walks for order in shown)
    marks = [x.get_offsets()[0] for x in ax.collections if isinstance(x, PathCollection)]
    assert len(marks) == 2 * walks * len(shown)
    if name == "multi_scale":
        # Each grid stands beside the one before, and starts where the sequence goes on.
        order, cells = orders[0], size[0] * size[1]
        for walk in range(walks):
            first, last = (np.array([x % size[1] + walk * (size[1] + 1), x // size[1]])
                           for x in (order[walk * cells], order[(walk + 1) * cells - 1]))  # fmt: skip
            np.testing.assert_array_equal(marks[2 * walk], first)
            np.testing.assert_array_equal(marks[2 * walk + 1], last)
    if name == "bidirectional" and min(size) > 1:  # from the end of a row to the next
        assert lines == 2 * (size[0] - 1)
    if name in ("forward", "bidirectional", "cross", "hilbert", "snake"):  # each cell once: places are cells
        for k, order in enumerate(orders):
            origin = np.array([k % 4 * (size[1] + 1), 0])
            start, end = (np.array([order[t] % size[1], order[t] // size[1]]) for t in (0, -1))
            np.testing.assert_allclose(marks[2 * k], start + origin)
            np.testing.assert_allclose(marks[2 * k + 1], end + origin)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["orders", "atrous", "--size", "5", "6"],
        ["orders", "msvmamba_nano", "--out", "picture.pdf"],
        ["field", "efficientvmamba_tiny", "--size", "64", "96", "--stage", "1"],
        ["field", "vim_tiny", "--size", "32", "--image", "IMAGE", "IMAGE"],
        ["attention", "vmamba_tiny_s1l8", "--image", "IMAGE", "--size", "64", "96", "--at", "99", "0"],
        ["attention", "lbvim_tiny", "--image", "IMAGE", "--size", "48", "--layer", "blocks.3"],
        ["features", "spatialmamba_tiny", "--image", "IMAGE", "--size", "64", "96"],
        ["features", "resnet18", "--image", "IMAGE", "--size", "64"],
        ["tokens", "vim_tiny", "--image", "IMAGE", "--size", "96"],
        ["tokens", "plainmamba_l1", "--image", "IMAGE", "--size", "96", "--merge", "2"],
    ],
)
def test_pictures(arguments: list[str], image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = image.with_name("picture.pdf" if "picture.pdf" in arguments else "picture.png")
    assert visualize.main([*(str(image) if x == "IMAGE" else x for x in arguments), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    if out.suffix == ".pdf":
        assert out.read_bytes().startswith(b"%PDF")
        return
    with Image.open(out) as picture:
        picture.load()
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_weights_of_a_file_are_those_that_are_drawn(tmp_path: Path, image: Path) -> None:
    torch.save(timm.create_model("efficientvmamba_tiny").state_dict(), tmp_path / "weights.pth")
    options = {"model": "efficientvmamba_tiny", "size": (64, 64), "pretrained": False}
    subjects = [
        visualize.load_subject(argparse.Namespace(**options, checkpoint=checkpoint))
        for checkpoint in (None, tmp_path / "weights.pth", tmp_path / "weights.pth")
    ]
    random, first, second = (subject.maps(torch.ones(1, 3, 64, 64))[-1] for subject in subjects)
    assert torch.equal(first, second) and not torch.equal(first, random)
    assert [subject.title for subject in subjects] == [
        "efficientvmamba_tiny, random weights", "efficientvmamba_tiny", "efficientvmamba_tiny"
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["digits/vim-tiny_digits.py", "vim_tiny"])
def test_a_work_directory_stands_for_its_best_checkpoint(model: str, tmp_path: Path) -> None:
    pytest.importorskip("mmengine")
    network = timm.create_model("vim_tiny", img_size=24, patch_size=8, num_classes=10)
    if model == "vim_tiny":
        network = timm.create_model("vim_tiny", img_size=(48, 80))
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "best_top1_epoch_1.pth")
    torch.save({"state_dict": {}}, tmp_path / "epoch_2.pth")
    (tmp_path / "best_checkpoint").write_text("best_top1_epoch_1.pth\n")
    name = str(ROOT / "configs" / model) if model.endswith(".py") else model
    size = None if model.endswith(".py") else (48, 80)
    options = argparse.Namespace(model=name, size=size, pretrained=False, checkpoint=str(tmp_path))
    found = visualize.load_subject(options).module.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in network.state_dict().items())
    (tmp_path / "best_checkpoint").unlink()
    options.checkpoint = str(tmp_path)
    with pytest.raises(ValueError, match="no best checkpoint"):
        visualize.load_subject(options)


@pytest.mark.parametrize(
    "size, shown, title",
    [
        (None, (0, 0, 90, 60), "image"),
        ((40, 60), (0, 0, 90, 60), "image"),
        ((40, 40), (15, 0, 75, 60), "image: central 67 % of its width"),
        ((20, 60), (0, 15, 90, 45), "image: central 50 % of its height"),
    ],
)
def test_photographs_keep_their_shape(
    size: tuple[int, int] | None, shown: tuple[int, int, int, int], title: str, tmp_path: Path
) -> None:
    smooth = np.add.outer(np.arange(60), np.arange(90)).astype(np.uint8)
    whole = Image.fromarray(smooth).convert("RGB")
    whole.save(tmp_path / "a.png")
    found = load_image(str(tmp_path / "a.png"), size)
    assert found.size == ((90, 60) if size is None else size[::-1])
    assert found.info["title"] == title
    expected = whole.crop(shown).resize(found.size, Image.Resampling.BICUBIC)
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=2)


def test_dropped_patches_fade_and_merged_ones_share_their_colour() -> None:
    picture = Image.fromarray(np.arange(6, dtype=np.uint8).repeat(4).reshape(2, 12).repeat(2, 0) * 20)  # 2 x 3 patches
    cells, owner = torch.tensor([[1, 3]]), torch.tensor([[0, 0, 0, 1, 1, 0]])
    step = LeftTokens(2, (2, 3), cells, owner)
    pruned, merged = (np.asarray(visualize._of_left_tokens(picture, step, x))[:, ::4, 0] for x in (False, True))
    colours = np.arange(6) * 20.0
    faded = (255 - (255 - colours) * 0.15).astype(np.uint8)
    assert pruned[[0, 2]].flatten().tolist() == [faded[0], 20, faded[2], 60, faded[4], faded[5]]
    assert merged[[0, 2]].flatten().tolist() == [40, 40, 40, 70, 70, 40]  # the means of 0, 20, 40, 100 and of 60, 80


@pytest.mark.parametrize("kwargs", [{"schedule": {1: 0.5, 3: 0.5}}, {"schedule": {1: 4, 3: 2}, "mode": "merge"}])
def test_left_tokens_are_those_of_the_model(kwargs: dict) -> None:
    model = timm.create_model("plainmamba_l1", img_size=64, depth=4, embed_dim=16).eval()
    with pytest.raises(ValueError, match="PlainMamba that keeps all tokens"):
        left_tokens(model, torch.randn(2, 3, 64, 64))
    reduce_tokens(model, **kwargs)
    steps = left_tokens(model, images := torch.randn(2, 3, 64, 64))
    assert [step.block for step in steps] == [1, 3]
    assert model.forward_features(images).shape[1] == steps[1].cells.shape[1]
    for step, count in zip(steps, [8, 4] if "mode" not in kwargs else [12, 10], strict=True):
        assert step.grid == (4, 4) and step.cells.shape == (2, count)
        own = step.owner.gather(1, step.cells)
        assert torch.equal(own, torch.arange(count).expand(2, -1))  # a patch that is left stands for itself


@pytest.mark.parametrize("command", ["field", "attention", "features", "tokens"])
@pytest.mark.parametrize(
    "config",
    [
        "digits/vim-tiny_digits.py",
        pytest.param("digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py", marks=pytest.mark.slow),
        pytest.param("digits/upernet_efficientvmamba-tiny_digits.py", marks=pytest.mark.slow),
    ],
)
def test_configs(config: str, command: str, image: Path) -> None:
    pytest.importorskip("mmengine")
    if not config.startswith("digits/vim"):
        if command == "tokens":
            pytest.skip("not a plain model")
        pytest.importorskip("mmdet" if "mask-rcnn" in config else "mmseg")
    out = image.with_name("picture.png")
    assert visualize.main([command, str(ROOT / "configs" / config), "--image", str(image), "--out", str(out)]) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["orders", "hilbrt"], ["unknown model 'hilbrt'", "hilbert"]),
        (["orders", "resnet18"], ["resnet18 has no scan"]),
        (["orders", "cross", "--size", "0"], ["--size", "[0]"]),
        (["orders", "cross", "--size", "100"], ["100 x 100", "64 x 64"]),
        (["orders", "cross", "--out", "no/such/folder.png"], ["--out", "folder that exists"]),
        (["orders", "cross", "--out", "picture.jpg"], ["--out", ".png"]),
        (["field", "vmamba_tny"], ["unknown model 'vmamba_tny'", "vmamba_tiny"]),
        (["field", "no_such_config.py"], ["no_such_config.py does not exist"]),
        (["field", "vim_tiny", "--size", "32", "--stage", "24"], ["--stage", "24", "0 to 23"]),
        (["field", "vim_tiny", "--checkpoint", "absent.pth"], ["absent.pth"]),
        (["field", "vim_tiny", "--checkpoint", "BAD"], ["bad.txt"]),
        (["features", "vim_tiny", "--image", "absent.png"], ["absent.png"]),
        (["features", "vim_tiny", "--image", "BAD"], ["bad.txt", "cannot be read"]),
        (["attention", "resnet18", "--image", "IMAGE", "--size", "32"], ["resnet18 has no scan"]),
        (["tokens", "vmamba_tiny_s1l8", "--image", "IMAGE"], ["VMamba holds 0 plain backbones"]),
        (["tokens", "vim_tiny", "--image", "IMAGE", "--size", "32", "--keep", "2"], ["schedule", "2", "(0, 1]"]),
        (["tokens", "vim_tiny", "--image", "IMAGE", "--size", "32", "--keep", "1"], ["--keep", "nothing is removed"]),
        (
            ["attention", "vim_tiny", "--image", "IMAGE", "--size", "32", "--layer", "block.3"],
            ["--layer", "'block.3'", "blocks.3"],
        ),
    ],
)
def test_mistakes_get_one_clear_line(
    arguments: list[str],
    words: list[str],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(image.parent)
    bad = image.with_name("bad.txt")
    bad.write_text("neither an image nor weights")
    before = set(image.parent.iterdir())
    assert visualize.main([{"IMAGE": str(image), "BAD": str(bad)}.get(x, x) for x in arguments], "visualize.py") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("visualize.py: error: ") and len(printed.err.splitlines()) == 1, printed.err
    assert all(word in printed.err for word in words), printed.err
    assert set(image.parent.iterdir()) == before
