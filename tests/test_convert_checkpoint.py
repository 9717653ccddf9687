"""tools/convert_checkpoint.py: files of unknown origin, recognised, converted, loaded through timm, or refused."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backbones import conversion
from backbones.models import family_names
from backbones.weights import CheckpointError, files, rules
from tests.scripts import load_tool

ROOT = Path(__file__).parents[1]
# One of every family; files of the larger ones take long to write.
LARGER = ["vanilla_vmamba_tiny", "vmamba_tiny_s1l8", "msvmambav3_tiny", "groupmamba_tiny", "spatialmamba_tiny"]
SMALL = ["vim_tiny", "lbvim_tiny", "msvmamba_nano", "efficientvmamba_tiny", "plainmamba_l1"]
LARGE = [*LARGER, "localvim_tiny_midcls", "localvmamba_tiny", "vssd_micro", "adventurer_tiny"]
SMALLEST = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
NAMES = sorted(name for module in family_names() for name in timm.list_models(module=module))
Tool = Callable[..., str]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load_tool("convert")


@pytest.fixture
def tool(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Tool:
    """Runs the tool in ``tmp_path``; gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        assert module.main([str(x) for x in arguments], "convert.py") == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return call


def loaded_as_printed(printed: str) -> nn.Module:
    """What the Python expression in the tool's last line makes."""
    return eval(re.search(r"^load it with (.+)$", printed, re.M)[1], {"timm": timm})


def official(model: nn.Module) -> dict[str, Tensor]:
    return rules.to_official(model.state_dict(), model.key_rules)


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """A model with a state dict of a few megabytes."""
    return timm.create_model("efficientvmamba_tiny")


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_recognised_in_both_layouts(name: str) -> None:
    model = timm.create_model(name, device="meta", num_classes=7)
    for weights in (official(model), model.state_dict()):
        twins = [x for x in conversion.model_names() if conversion._expected(x) == conversion._expected(name)]
        if len(twins) > 1:  # the same weights along other paths, such as LocalVim's searched and unsearched ones
            with pytest.raises(CheckpointError, match=f"fits {' and '.join(twins)} alike; say which"):
                conversion.convert(weights)
        found = conversion.convert(weights, name if len(twins) > 1 else None)
        assert found.model == model.pretrained_cfg["architecture"]
        assert found.arguments == {"num_classes": 7}
        assert found.weights.keys() == model.state_dict().keys()
        assert found.dropped == ()


def test_every_family_is_here() -> None:
    assert {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in (*SMALL, *LARGE)} == {*family_names()}


@pytest.mark.parametrize("name", SMALLEST)
def test_official_file_loads_through_timm_after_conversion(name: str, tool: Tool, tmp_path: Path) -> None:
    model = timm.create_model(name)
    state = {"model": official(model), "epoch": 299, "args": argparse.Namespace(lr=1e-3), "optimizer": {}}
    torch.save(state, "official.pth")
    printed = tool("official.pth", "out.safetensors", "--check")
    assert f"official.pth: {name}, weights under 'model'" in printed
    assert "left out of the training state: args, epoch, optimizer" in printed
    assert "dropped 0 of" in printed
    assert "checked: " in printed
    assert same(loaded_as_printed(printed), model.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "official.pth", "out.safetensors", "out.safetensors.sha256",
    ]  # fmt: skip


def test_checksum_and_metadata(tool: Tool, tmp_path: Path, tiny: nn.Module) -> None:
    torch.save(official(tiny), "official.pth")
    printed = tool("official.pth", "out.safetensors")
    digest = hashlib.sha256(Path("out.safetensors").read_bytes()).hexdigest()
    assert f"sha256 {digest}" in printed
    checked = subprocess.run(
        ["sha256sum", "--check", "out.safetensors.sha256"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert checked.stdout == "out.safetensors: OK\n"
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata()["model"] == "efficientvmamba_tiny"
    # Twice gives the same bytes, and a converted file is one of ours.
    tool("out.safetensors", "again.safetensors")
    assert load(Path("again.safetensors")).keys() == tiny.state_dict().keys()


def load(path: Path) -> dict[str, Tensor]:
    return files.read(path)


def test_check_without_a_target_writes_nothing(tool: Tool, tmp_path: Path, tiny: nn.Module) -> None:
    torch.save(official(tiny), "official.pth")
    assert "checked: efficientvmamba_tiny takes all" in tool("official.pth", "--check")
    assert [path.name for path in tmp_path.iterdir()] == ["official.pth"]


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.", "network."])
def test_prefixes_of_wrappers_are_peeled_off(prefix: str, tool: Tool, tiny: nn.Module) -> None:
    torch.save({"state_dict": {prefix + key: x for key, x in official(tiny).items()}}, "wrapped.ckpt")
    assert same(loaded_as_printed(tool("wrapped.ckpt", "out.safetensors")), tiny.state_dict())


def test_averaged_weights_are_taken_where_wanted_or_published(tool: Tool, tiny: nn.Module) -> None:
    plain, averaged = official(tiny), {key: x + 1 for key, x in official(tiny).items()}
    torch.save({"model": plain, "model_ema": averaged}, "state.pth")
    printed = tool("state.pth", "plain.safetensors")
    assert "weights under 'model'\nleft out of the training state: model_ema" in printed
    assert torch.equal(load(Path("plain.safetensors"))["norm.bias"], tiny.norm.bias)
    assert "weights under 'model_ema'" in tool("state.pth", "ema.safetensors", "--ema")
    assert torch.equal(load(Path("ema.safetensors"))["norm.bias"], tiny.norm.bias + 1)
    torch.save({"model": plain}, "none.pth")
    assert "none.pth: holds no averaged weights" in tool("none.pth", "ema.safetensors", "--ema", status=2)


@pytest.mark.slow
def test_averaged_weights_are_taken_where_the_authors_evaluate_them(tool: Tool) -> None:
    weights = official(timm.create_model("msvmambav3_tiny"))
    torch.save({"model": weights, "model_ema": {key: x + 1 for key, x in weights.items()}}, "state.pth")
    assert "weights under 'model_ema'" in tool("state.pth", "out.safetensors")


@pytest.mark.parametrize("name", ["vim_tiny", "lbvim_tiny", "msvmamba_nano", *LARGER])
def test_backbone_of_an_official_detector(name: str) -> None:
    model = timm.create_model(name, device="meta")
    plain, group = name.startswith(("vim", "lbvim")), name.startswith("groupmamba")
    own = model.state_dict()
    # The norms of GroupMamba's outputs have the names of the classifier's: norm1 to norm4.
    kept = {
        key: x for key, x in own.items() if not key.startswith(("head.", "norm.")) or (group and "head.norm" in key)
    }
    backbone = rules.to_official(kept, model.key_rules)
    widths = {} if group else {i: stage["num_chs"] for i, stage in enumerate(model.feature_info[-4:])}
    separator = "_" if plain else ""
    norms = {
        f"backbone.outnorm{separator}{i}.{kind}": torch.empty(width, device="meta")
        for i, width in widths.items()
        for kind in ("weight", "bias")
    }
    others = {"neck.conv.weight": torch.empty(1), "rpn_head.rpn_cls.bias": torch.empty(1)}

    found = conversion.convert({f"backbone.{key}": x for key, x in backbone.items()} | norms | others)
    assert found.model == name
    assert found.arguments == ({"features_only": True} if plain or group else {"num_classes": 0})
    final = set() if plain or group else {"norm.weight", "norm.bias"}
    assert found.weights.keys() == kept.keys() | final
    assert sorted(found.dropped) == sorted([*others, *(key for key in norms if not final or "outnorm3" not in key)])


@pytest.mark.parametrize(
    "name", ["lbvim_tiny", "msvmamba_nano", pytest.param("groupmamba_tiny", marks=pytest.mark.slow)]
)
def test_converted_backbone_of_a_detector_loads(name: str, tool: Tool) -> None:
    model = timm.create_model(name)
    headless = {key: x for key, x in model.state_dict().items() if not key.startswith(("head.", "norm."))}
    backbone = rules.to_official(headless, model.key_rules)
    backbone |= {"outnorm3.weight": torch.full((384,), 2.0), "outnorm3.bias": torch.full((384,), 3.0)}
    if name != "msvmamba_nano":
        del backbone["outnorm3.weight"], backbone["outnorm3.bias"]
    torch.save({"state_dict": {f"backbone.{key}": x for key, x in backbone.items()}}, "det.pth")
    printed = tool("det.pth", "out.safetensors", "--check")
    loaded = loaded_as_printed(printed)
    if name == "msvmamba_nano":  # the norm of the last output is the final norm
        assert loaded.norm.weight.tolist() == [2.0] * 384
        assert loaded.norm.bias.tolist() == [3.0] * 384
        headless |= {"norm.weight": backbone["outnorm3.weight"], "norm.bias": backbone["outnorm3.bias"]}
        assert same(loaded, headless)
    else:
        assert same(loaded.model, headless)
        assert all(x.isfinite().all() for x in loaded(torch.randn(1, 3, 224, 224)))


def test_backbone_of_our_own_segmentor(tool: Tool) -> None:
    mm = pytest.importorskip("backbones.mm.models.dense")
    dense = mm.EfficientVMamba("efficientvmamba_tiny")
    weights = {f"module.backbone.{key}": x for key, x in dense.state_dict().items()}
    torch.save({"state_dict": weights | {"module.decode_head.conv_seg.bias": torch.zeros(1)}}, "seg.pth")
    printed = tool("seg.pth", "out.safetensors")
    assert "dropped 7 of" in printed  # three norms, and the head
    loaded = loaded_as_printed(printed)
    assert torch.equal(loaded.norm.weight, dense.out_norms["3"].weight)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = dense.eval()(image)[-1].permute(0, 2, 3, 1)
        torch.testing.assert_close(loaded.eval().forward_features(image), expected)


def test_pyramid_of_detectron2_around_a_backbone_without_class_token(tool: Tool) -> None:
    model = timm.create_model("vim_tiny", class_token=False, global_pool="avg", img_size=256, depth=24)
    weights = {key: x for key, x in official(model).items() if not key.startswith(("head.", "norm_f."))}
    weights = {f"backbone.net.{key}": x for key, x in weights.items()}
    pyramid = {"backbone.simfp_2.0.weight": torch.zeros(1), "proposal_generator.x": torch.zeros(1)}
    torch.save({"model": weights | pyramid}, "det.pth")
    assert "fits vim_tiny and vim_tiny_stride8 alike" in tool("det.pth", "out.safetensors", status=2)
    printed = tool("det.pth", "out.safetensors", "--model", "vim_tiny", "--check")
    assert sorted(re.findall(r"^  (\S+)$", printed, re.M)) == sorted(pyramid)
    assert "class_token=False, global_pool='avg', img_size=256" in printed
    assert torch.equal(loaded_as_printed(printed).model.pos_embed, model.pos_embed)


def test_what_differs_from_the_published_model_becomes_arguments(tool: Tool) -> None:
    model = timm.create_model("efficientvmamba_tiny", num_classes=5, in_chans=1)
    torch.save(official(model), "grey.pth")
    printed = tool("grey.pth", "out.safetensors")
    assert "num_classes=5, in_chans=1)" in printed
    assert same(loaded_as_printed(printed), model.state_dict())
    model = timm.create_model("groupmamba_tiny", distillation=False, device="meta")
    assert conversion.convert(official(model)).arguments == {"distillation": False}


def test_tables_of_rotary_embeddings_are_listed_as_dropped(tool: Tool) -> None:
    model = timm.create_model("vim_tiny")
    torch.save({**official(model), "rope.freqs_cos": torch.zeros(196, 192)}, "rope.pth")
    assert re.findall(r"^  (\S+)$", tool("rope.pth", "--check"), re.M) == ["rope.freqs_cos"]


class Foreign:
    """A class that no weight file needs."""


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, tiny: nn.Module) -> Path:
    tmp_path, weights = tmp_path_factory.mktemp("bad"), official(tiny)
    torch.save(weights, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "truncated.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html>Quota exceeded</html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    torch.save({"model": weights, "config": Foreign()}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    torch.save(nn.Conv2d(3, 4, 5).state_dict(), tmp_path / "conv.pth")
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    torch.save({**weights, "layers.0.blocks.0.extra": torch.zeros(1)}, tmp_path / "extra.pth")
    torch.save({key: x for key, x in weights.items() if "blocks.0.op.Ds" not in key}, tmp_path / "lacking.pth")
    torch.save({**weights, "classifier.norm.weight": torch.zeros(7)}, tmp_path / "misshapen.pth")
    torch.save({**weights, "classifier.norm.weight": torch.full((384,), torch.nan)}, tmp_path / "nan.pth")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.pth", "out.safetensors"], ["no weight file at absent.pth"]),
        (["empty.pth", "out.safetensors"], ["empty.pth: empty"]),
        (["truncated.pth", "out.safetensors"], ["truncated.pth: truncated or no weight file"]),
        (["page.pth", "out.safetensors"], ["page.pth: a web page, not weights; download it again"]),
        (["pointer.safetensors", "out.safetensors"], ["a pointer of Git LFS, not weights"]),
        (["text.safetensors", "out.safetensors"], ["text.safetensors: truncated or no weight file"]),
        (["code.pth", "out.safetensors"], ["code.pth: refused, it needs the class", "Foreign"]),
        (["nothing.pth", "out.safetensors"], ["nothing.pth", "these are no tensors: epoch"]),
        (["conv.pth", "out.safetensors"], ["belongs to no model", "its 2 names begin with weight, bias"]),
        (["resnet.pth", "out.safetensors"], ["belongs to no model of this library", "conv1.weight"]),
        (["extra.pth", "out.safetensors"], ["held against efficientvmamba_tiny", "unknown: stages.0.blocks.0.extra"]),
        (["lacking.pth", "out.safetensors"], ["missing: stages.0.blocks.0.mixer.ssm.D"]),
        (["misshapen.pth", "out.safetensors"], ["misshapen: norm.weight (7,), expected (384,)"]),
        (["nan.pth", "out.safetensors", "--check"], ["these are not finite: norm.weight"]),
        (["good.pth", "out.safetensors", "--model", "vmamba_tiny"], ["held against vmamba_tiny", "missing: "]),
        (["good.pth", "out.safetensors", "--model", "vmamba_tini"], ["got 'vmamba_tini'", "vmamba_tiny"]),
        (["good.pth", "out.pth"], ["out.pth: expected a name that ends in .safetensors"]),
        (["good.pth", "nowhere/out.safetensors"], ["in a folder that exists"]),
        (["good.pth"], ["OUT.safetensors is missing"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_bad_files_get_one_line_and_nothing_is_written(
    arguments: list[str], words: list[str], tool: Tool, bad_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_files)
    before = sorted(path.name for path in bad_files.iterdir())
    error = tool(*arguments, status=2)
    assert error.startswith("convert.py: error: ")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error
    assert sorted(path.name for path in bad_files.iterdir()) == before


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_failed_write_leaves_the_old_file(
    kind: type[Exception],
    module: ModuleType,
    tool: Tool,
    tmp_path: Path,
    tiny: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save(official(tiny), "good.pth")
    Path("out.safetensors").write_text("old")

    def full(weights: object, path: Path, metadata: object) -> None:
        path.write_text("half")
        raise kind("no space left on device")

    monkeypatch.setattr(module, "save_file", full)
    assert "no space left" in tool("good.pth", "out.safetensors", status=2)
    assert Path("out.safetensors").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.pth", "out.safetensors"]


def test_failed_checksum_leaves_the_old_files(
    tool: Tool, tmp_path: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(official(tiny), "good.pth")
    names = ["good.pth", "out.safetensors", "out.safetensors.sha256"]
    for name in names[1:]:
        Path(name).write_text("old")

    def full(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "no space left" in tool("good.pth", "out.safetensors", status=2)
    assert [Path(name).read_text() for name in names[1:]] == ["old", "old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read(mask: int, tool: Tool, tiny: nn.Module) -> None:
    torch.save(official(tiny), "good.pth")
    before = os.umask(mask)
    try:
        tool("good.pth", "out.safetensors")
    finally:
        os.umask(before)
    for name in ("out.safetensors", "out.safetensors.sha256"):
        assert Path(name).stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("what", ["folder", "folder of the checksum", "read-only folder"])
def test_a_target_that_cannot_be_written_is_told_at_once(
    what: str, module: ModuleType, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "read-only folder":

        def touch(self: Path, **_: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "touch", touch)
    else:
        Path("out.safetensors" if what == "folder" else "out.safetensors.sha256").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(module.files, "load", lambda path: pytest.fail("read the input first"))
    error = tool("absent.pth", "out.safetensors", status=2)
    assert len(error.splitlines()) == 1
    assert "out.safetensors" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["lbvim_tiny", "efficientvmamba_tiny", "groupmamba_tiny", "spatialmamba_tiny"])
def test_half_of_the_weights_are_too_few_to_recognise(name: str) -> None:
    weights = timm.create_model(name, device="meta").state_dict()
    names = sorted(weights)
    below = dict.fromkeys(names[: len(names) // 2])
    above = dict.fromkeys(names[: len(names) // 2 + 1])
    with pytest.raises(CheckpointError, match="belongs to no model of this library"):
        conversion.identify({key: weights[key] for key in below})
    assert conversion.identify({key: weights[key] for key in above}) == name
    # What a file holds besides makes no family of it, and no other one.
    foreign = {f"other.{i}.weight": torch.empty(1, device="meta") for i in range(2 * len(names))}
    assert conversion.identify({**weights, **foreign}) == name
    with pytest.raises(CheckpointError, match="belongs to no model of this library"):
        conversion.identify({**{key: weights[key] for key in below}, **foreign})


def test_a_rectangular_grid_goes_all_the_way(tool: Tool) -> None:
    model = timm.create_model("lbvim_tiny", img_size=(32, 96), num_classes=3)
    torch.save(dict(model.state_dict()), "unknown.pth")
    assert "12 patches are no square" in tool("unknown.pth", "out.safetensors", status=2)
    printed = tool("unknown.pth", "out.safetensors", "--img-size", 32, 96, "--check")
    assert "num_classes=3, img_size=(32, 96))" in printed
    assert same(loaded_as_printed(printed), model.state_dict())
    torch.save(model.state_dict(), "known.pth")
    assert same(loaded_as_printed(tool("known.pth", "out.safetensors", "--check")), model.state_dict())
