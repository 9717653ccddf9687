"""Position embeddings of rectangular grids: every way from one model to another keeps rows and columns apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones import conversion
from backbones.weights import CheckpointError, files, rules
from tests.scripts import load_tool

NAMES = [
    *("vim_tiny", "vim_tiny_stride8", "lbvim_tiny", "lbvim_528", "localvim_tiny", "localvim_tiny_midcls"),
    *("plainmamba_l1", "adventurer_tiny"),
]
PLACES = {"first": lambda patches: 0, "middle": lambda patches: patches // 2, "last": lambda patches: patches}
SMALL = {"depth": 1, "embed_dim": 96, "num_classes": 3, "patch_size": 4}


def size_of(grid: tuple[int, int], name: str) -> tuple[int, int]:
    stride = 8 if "stride8" in name else 4
    return ((grid[0] - 1) * stride + 4, (grid[1] - 1) * stride + 4)


def create(name: str, grid: tuple[int, int], **kwargs: object) -> nn.Module:
    """A model with this grid, whose position embedding is a plane that falls from left to right only."""
    extra = {"stride": 8} if "stride8" in name else {}
    model = timm.create_model(name, **{**SMALL, **extra, "img_size": size_of(grid, name), **kwargs})
    if not kwargs.get("pretrained") and not kwargs.get("checkpoint_path"):
        with torch.no_grad():
            model.pos_embed.copy_(plane(model, grid))
    return model


def plane(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    columns = (torch.arange(grid[1]) + 0.5) / grid[1]
    tokens = columns.expand(grid).reshape(-1)
    if model.num_prefix_tokens:
        place = PLACES[model.class_token_position](len(tokens))
        tokens = torch.cat([tokens[:place], torch.tensor([9.0]), tokens[place:]])
    return tokens[None, :, None].expand(1, -1, 96)


def assert_columns(model: nn.Module) -> None:
    """The plane of the source still falls from left to right, and not along the rows."""
    tokens = model.pos_embed.detach()[0, :, 0]
    if model.num_prefix_tokens:
        place = PLACES[model.class_token_position](len(tokens) - 1)
        assert tokens[place] == 9.0
        tokens = torch.cat([tokens[:place], tokens[place + 1 :]])
    values = tokens.view(model.grid_size)
    torch.testing.assert_close(values, values[:1].expand_as(values))
    assert (values[0].diff() > 0).all()


def saved_plainly(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def saved_in_a_training_state(model: nn.Module, folder: Path) -> Path:
    """Of a wrapped model, as mmengine and torch.compile have it."""
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})})
    torch.save({"state_dict": wrapped.state_dict(), "epoch": 3}, folder / "weights.pth")
    return folder / "weights.pth"


def converted(model: nn.Module, folder: Path) -> Path:
    name = model.pretrained_cfg["architecture"]
    torch.save(model.state_dict(), folder / "source.pth")
    target = folder / "weights.safetensors"
    tool = load_tool("convert")
    small = conversion.Converted(
        name, {}, files.read(folder / "source.pth"), ()
    )  # the registered model is larger than this one
    tool.write(target, small, folder / "source.pth")
    return target


SAVE = [saved_plainly, saved_in_a_training_state, converted]


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 16), (8, 32)), ((4, 16), (8, 8)), ((8, 8), (4, 16)), ((2, 6), (3, 4)), ((4, 16), (4, 16)), ((3, 5), (7, 4))],
)
def test_files_of_ours_tell_their_grid(
    source: tuple[int, int], target: tuple[int, int], name: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    file = save(create(name, source), tmp_path)
    for way in ({"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}, {"checkpoint_path": file}):
        loaded = create(name, target, **way)
        assert loaded.grid_size == target
        assert_columns(loaded)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_in_memory_tell_it_too(name: str) -> None:
    weights = create(name, (4, 16)).state_dict()
    loaded = create(name, (8, 8), pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
    assert_columns(loaded)


@pytest.mark.parametrize("name", NAMES)
def test_plain_loading_refuses_another_grid(name: str) -> None:
    model, other = create(name, (4, 16)), create(name, (8, 8))
    before = {key: x.clone() for key, x in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="of another grid: pos_embed 4 x 16, expected 8 x 8"):
        other.load_state_dict(model.state_dict())
    assert all(torch.equal(x, before[key]) for key, x in other.state_dict().items())
    with pytest.raises(CheckpointError, match="of another grid"):
        nn.ModuleDict({"backbone": other}).load_state_dict(nn.ModuleDict({"backbone": model}).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        create(name, (8, 32)).load_state_dict(model.state_dict())
    create(name, (4, 16)).load_state_dict(model.state_dict())


def test_the_grid_is_no_key() -> None:
    """Official files load strictly, and ours load elsewhere."""
    model = create("vim_tiny", (4, 16))
    assert set(model.state_dict()) == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert model.state_dict()._metadata[""]["grid_size"] == (4, 16)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ((4, 16), (8, 32), "64 patches are 4 x 16 or 8 x 8"),
        ((4, 16), (4, 16), "64 patches are 4 x 16 or 8 x 8"),
        ((8, 8), (4, 16), "64 patches are 4 x 16 or 8 x 8"),
        ((2, 6), (8, 8), "12 patches are no square"),
        ((2, 6), (4, 12), "12 patches are 2 x 6"),
    ],
)
def test_a_grid_that_nobody_tells_is_refused(
    source: tuple[int, int], target: tuple[int, int], words: str, tmp_path: Path
) -> None:
    save_file(create("vim_tiny", source).state_dict(), tmp_path / "plain.safetensors")
    overlay = {"file": str(tmp_path / "plain.safetensors")}
    for way in ({"pretrained": True, "pretrained_cfg_overlay": overlay}, {"checkpoint_path": overlay["file"]}):
        with pytest.raises(CheckpointError, match=rf"pos_embed: {words}, and the file does not tell"):
            create("vim_tiny", target, **way)
    # Unless the configuration states it.
    overlay["input_size"] = (3, *size_of(source, "vim_tiny"))
    loaded = create("vim_tiny", target, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_columns(loaded)


@pytest.mark.parametrize(("source", "target"), [((8, 8), (8, 8)), ((8, 8), (6, 6)), ((8, 8), (5, 3)), ((2, 6), (2, 6))])
def test_squares_and_the_own_grid_are_assumed(source: tuple[int, int], target: tuple[int, int], tmp_path: Path) -> None:
    save_file(create("vim_tiny", source).state_dict(), tmp_path / "plain.safetensors")
    overlay = {"file": str(tmp_path / "plain.safetensors")}
    assert_columns(create("vim_tiny", target, pretrained=True, pretrained_cfg_overlay=overlay))


def test_official_files_have_the_registered_size(tmp_path: Path) -> None:
    """14 x 14 patches, although 7 x 28 have the proportions of the model."""
    model = timm.create_model("vim_tiny", depth=1, num_classes=3)
    with torch.no_grad():
        model.pos_embed.copy_(plane(model, (14, 14))[..., :1].expand(1, -1, 192))
    torch.save(rules.to_official(model.state_dict(), model.key_rules), tmp_path / "official.pth")
    for size in ((128, 512), (112, 448)):
        path = str(tmp_path / "official.pth")
        for way in ({"pretrained": True, "pretrained_cfg_overlay": {"file": path}}, {"checkpoint_path": path}):
            assert_columns(timm.create_model("vim_tiny", depth=1, num_classes=3, img_size=size, **way))


@pytest.mark.parametrize("grid", ["4 x 16", (4,), (4, 0), (4, 16, 1), (4.0, 16.0), [4, 16]])
def test_a_damaged_entry_is_named(grid: object, tmp_path: Path) -> None:
    weights = create("vim_tiny", (4, 16)).state_dict()
    weights._metadata[""]["grid_size"] = grid
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed: its grid_size is .*, expected rows and columns"):
        files.read(tmp_path / "weights.pth")


def test_an_entry_that_contradicts_the_patches_is_named(tmp_path: Path) -> None:
    weights = create("vim_tiny", (4, 16)).state_dict()
    weights._metadata[""]["grid_size"] = (3, 16)
    torch.save(weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    with pytest.raises(CheckpointError, match="pos_embed: 64 patches, expected 3 x 16 as the file says"):
        create("vim_tiny", (4, 16), pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("name", ["vim_tiny", "lbvim_tiny"])
def test_the_converter_recognises_and_keeps_the_grid(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, img_size=(64, 256), num_classes=3)
    torch.save(model.state_dict(), tmp_path / "known.pth")
    found = conversion.convert(files.read(tmp_path / "known.pth"), name)
    assert found.arguments == {"num_classes": 3, "img_size": (64, 256)}
    assert found.weights.grids == {"pos_embed": (4, 16)}
    target = tmp_path / "out.safetensors"
    load_tool("convert").write(target, found, tmp_path / "known.pth")
    with safe_open(target, "pt") as file:
        assert file.metadata()["grid_size"] == "4 x 16"
    assert files.read(target).grids == {"pos_embed": (4, 16)}


def test_the_converter_asks_for_a_grid_that_it_cannot_know() -> None:
    model = timm.create_model("vim_tiny", img_size=(32, 96), num_classes=3)
    weights = dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"12 patches are no square, and the file does not tell .* --img-size"):
        conversion.convert(weights, "vim_tiny")
    found = conversion.convert(weights, "vim_tiny", img_size=(32, 96))
    assert found.arguments == {"num_classes": 3, "img_size": (32, 96)}
    assert found.weights.grids == {"pos_embed": (2, 6)}
    with pytest.raises(CheckpointError, match="pos_embed"):
        conversion.convert(weights, "vim_tiny", img_size=(64, 96))
    with pytest.raises(CheckpointError, match="the file tells"):
        conversion.convert(files.select(model.state_dict(), ""), "vim_tiny", img_size=(96, 32))
    # A guess is not written down as if the file had told it.
    square = dict(timm.create_model("vim_tiny", img_size=128, num_classes=3).state_dict())
    found = conversion.convert(square, "vim_tiny")
    assert found.arguments["img_size"] == 128
    assert found.weights.grids == {}
    hierarchical = dict(timm.create_model("efficientvmamba_tiny").state_dict())
    with pytest.raises(CheckpointError, match=r"img_size: got .*, but efficientvmamba_tiny has no position embedding"):
        conversion.convert(hierarchical, img_size=(64, 64))


@pytest.mark.parametrize("name", ["vim_tiny", "lbvim_tiny"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_dense_backbones_read_it(name: str, prefix: str, tmp_path: Path) -> None:
    mm = pytest.importorskip("backbones.mm.models.dense")
    kind = mm.Vim if name == "vim_tiny" else mm.LBVim

    def dense(grid: tuple[int, int]) -> nn.Module:
        args = {**SMALL, "depth": 2, "img_size": size_of(grid, name)}
        return kind(name, out_indices=(1,), model_args=args)

    source, target = dense((4, 16)), dense((8, 8))
    with torch.no_grad():
        source.model.pos_embed.copy_(plane(source.model, (4, 16)))
    module = nn.ModuleDict({"backbone": source}) if prefix else source
    torch.save({"state_dict": module.state_dict()}, tmp_path / "dense.pth")
    target.load_pretrained(str(tmp_path / "dense.pth"))
    assert_columns(target.model)
    classifier = create(name, (2, 6), depth=2)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    target.load_pretrained(str(tmp_path / "classifier.pth"))
    assert_columns(target.model)


def test_checkpoints_of_a_run_tell_it(tmp_path: Path) -> None:
    """mmengine collects state dicts on its own; a whole model does not take another grid."""
    checkpoint = pytest.importorskip("mmengine.runner.checkpoint")
    mm = pytest.importorskip("backbones.mm.engine.checkpoints")

    class Whole(nn.Module):
        def __init__(self, grid: tuple[int, int]) -> None:
            super().__init__()
            self.network = create("vim_tiny", grid)

    state = checkpoint.weights_to_cpu(checkpoint.get_state_dict(Whole((4, 16))))
    torch.save({"state_dict": state}, tmp_path / "epoch_1.pth")
    content = mm.read_checkpoint(tmp_path / "epoch_1.pth")
    weights = mm.select_state_dict(content, "epoch_1.pth")
    assert weights.grids == {"network.pos_embed": (4, 16)}
    with pytest.raises(CheckpointError, match=r"of another grid: network\.pos_embed 4 x 16, expected 8 x 8"):
        mm.load_weights(Whole((8, 8)), weights, "epoch_1.pth")
    assert mm.load_weights(Whole((4, 16)), weights, "epoch_1.pth") == []


def test_names_without_metadata_load(tmp_path: Path) -> None:
    model = create("vim_tiny", (4, 16))
    create("vim_tiny", (4, 16)).load_state_dict(dict(model.state_dict()))
    create("vim_tiny", (4, 16)).load_state_dict(OrderedDict(model.state_dict()))
