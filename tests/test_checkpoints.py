"""Weight files: safe reading, conversion both ways, and errors that name keys and files."""

import argparse
import logging
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones import conversion
from backbones.models import family_names
from backbones.weights import CheckpointError, KeyRule, files, loading
from backbones.weights import rules as key_rules
from tests.small_models import SMALLEST, is_plain
from tests.test_parity import slow_if_large
from tools import recordings
from tools.parity import MODELS


def create(name: str, path: Path, **kwargs: object) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return recordings.load("vim_tiny_224").weights()


def save(folder: Path, content: object, name: str = "weights.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", slow_if_large(MODELS))
def test_key_rules_work_both_ways(name: str) -> None:
    official = recordings.load(name).weights()
    rules = timm.create_model(MODELS[name], device="meta").key_rules
    ours = key_rules.to_ours(official, rules)
    back = key_rules.to_official(ours, rules)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)
    assert key_rules.to_ours(ours, rules).keys() == ours.keys()


def test_our_own_files_load_too(tmp_path: Path) -> None:
    model = timm.create_model("vim_tiny")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    loaded = create("vim_tiny", tmp_path / "ours.safetensors")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), loaded.parameters(), strict=True))


def test_plain_weights_win_over_averaged_ones(official: dict[str, Tensor], tmp_path: Path) -> None:
    averaged = {key: torch.zeros_like(x) for key, x in official.items()}
    path = save(tmp_path, {"model_ema": averaged, "model": official, "args": argparse.Namespace(lr=1)})
    assert torch.equal(create("vim_tiny", path).cls_token, official["cls_token"])


@pytest.mark.parametrize(("name", "first"), [("vssd_micro", "model"), ("vssd_tiny", "model_ema")])
def test_which_weights_of_vssd_were_published(name: str, first: str, tmp_path: Path) -> None:
    """The files called ema hold averaged ones, vssd_micro_best.pth does not."""
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "d_state": 4}
    state = {key: timm.create_model(name, **small).state_dict() for key in ("model", "model_ema")}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(save(tmp_path, state))}, **small
    )
    assert all(torch.equal(x, state[first][key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "network."])
def test_wrappers_are_peeled_off(prefix: str, official: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path, {"state_dict": {prefix + key: x for key, x in official.items()}})
    assert torch.equal(create("vim_tiny", path).cls_token, official["cls_token"])


def test_tables_of_rotary_embeddings_are_dropped_and_reported(
    official: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, {**official, "rope.freqs_cos": torch.zeros(196, 192)})
    with caplog.at_level(logging.INFO, "backbones"):
        create("vim_tiny", path)
    assert "rope.freqs_cos" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm_f.weight"), r"missing: norm\.weight"),
        (lambda w: w.update({"layers.0.mixer.extra": torch.zeros(1)}), r"unknown: blocks\.0\.mixer\.extra"),
        (
            lambda w: w.pop("layers.3.mixer.D_b"),
            r"missing: blocks\.3\.mixer\.ssm\.D; unknown: blocks\.3\.mixer\.D",
        ),
        (
            lambda w: w.update({"head.weight": torch.zeros(1000, 7)}),
            r"misshapen: head\.weight \(1000, 7\), expected \(1000, 192\)",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(change, message: str, official: dict[str, Tensor], tmp_path: Path) -> None:
    weights = dict(official)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        create("vim_tiny", save(tmp_path, {"model": weights}))


def test_weights_of_another_size_are_refused(official: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"do not fit Vim; misshapen: .* and \d+ more"):
        create("vim_small", save(tmp_path, {"model": official}))


class Foreign:
    """A class that no weight file needs."""


def test_foreign_classes_are_refused(official: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path, {"model": official, "config": Foreign()})
    with pytest.raises(CheckpointError, match=r"weights\.pth: refused, it needs the class .*Foreign"):
        create("vim_tiny", path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_named(suffix: str, official: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(official, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"weights\{suffix}: truncated or no weight file"):
        create("vim_tiny", path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("\n<!DOCTYPE html><html>Quota exceeded</html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_failed_downloads_are_called_that(content: str, what: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"weights\{suffix}: {what}, not weights; download it again"):
        files.load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_named_whatever_breaks(zipped: bool, tmp_path: Path) -> None:
    weights = {"a": torch.randn(5, 4), "b": torch.zeros(3)}
    path = tmp_path / "weights.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for _ in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(min(len(whole), 1200), size=4)] = rng.integers(256, size=4)
        path.write_bytes(damaged.tobytes())
        try:
            files.read(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(text.startswith(str(path)) and len(text.splitlines()) == 1 for text in messages)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "lr": 0.1}, {}])
def test_files_without_weights_are_named(content: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        create("vim_tiny", save(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*nowhere\.pth"):
        create("vim_tiny", tmp_path / "nowhere.pth")


def test_another_number_of_classes_is_said(
    official: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, official)
    model = create("vim_tiny", path, num_classes=10)
    assert model.head.weight.shape == (10, 192)
    assert torch.equal(model.cls_token, official["cls_token"])
    assert "head starts from random weights: the file has 1000 classes, the model 10" in caplog.text
    create("vim_tiny", path, features_only=True)
    assert isinstance(create("vim_tiny", path, num_classes=0).head, nn.Identity)
    with pytest.raises(CheckpointError, match=r"unknown: extra"):
        create("vim_tiny", save(tmp_path, {**official, "extra": torch.zeros(1)}), num_classes=10)


def test_features_need_no_head(official: dict[str, Tensor], tmp_path: Path) -> None:
    headless = {key: x for key, x in official.items() if not key.startswith(("head.", "norm_f."))}
    path = save(tmp_path, headless)
    features = create("vim_tiny", path, features_only=True)
    assert torch.equal(features.model.cls_token, official["cls_token"])
    with pytest.raises(CheckpointError, match=r"missing: head\.bias, head\.weight, norm\.weight$"):
        create("vim_tiny", path)
    # A part of the head that is there has to fit, and so has all else.
    with pytest.raises(CheckpointError, match=r"misshapen: norm\.weight"):
        create("vim_tiny", save(tmp_path, {**headless, "norm_f.weight": torch.zeros(7)}), features_only=True)
    del headless["cls_token"]
    with pytest.raises(CheckpointError, match=r"missing: cls_token$"):
        create("vim_tiny", save(tmp_path, headless), features_only=True)


def test_colour_weights_fit_grey_images(official: dict[str, Tensor], tmp_path: Path) -> None:
    model = create("vim_tiny", save(tmp_path, official), in_chans=1)
    expected = official["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), expected)


def test_position_embedding_keeps_the_class_token_apart(official: dict[str, Tensor], tmp_path: Path) -> None:
    flat = dict(official)
    flat["pos_embed"] = torch.ones(1, 197, 192)
    flat["pos_embed"][:, 98] = 7.0  # the class token's slot
    model = create("vim_tiny", save(tmp_path, flat), img_size=(256, 192))
    expected = torch.ones(1, 193, 192)
    expected[:, 96] = 7.0
    torch.testing.assert_close(model.pos_embed.detach(), expected)


def test_dynamic_size_agrees_with_a_model_built_for_it(official: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path, official)
    image = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        dynamic = create("vim_tiny", path, dynamic_img_size=True).eval()(image)
        fixed = create("vim_tiny", path, img_size=(96, 160)).eval()(image)
    torch.testing.assert_close(dynamic, fixed)


def test_released_weights_are_known() -> None:
    cfg = timm.create_model("vim_tiny", device="meta").pretrained_cfg
    assert (cfg["hf_hub_id"], cfg["hf_hub_filename"]) == (
        "hustvl/Vim-tiny-midclstok",
        "vim_t_midclstok_76p1acc.pth",
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"hf_hub_id": None, "url": None}, "its authors released no weights .*pretrained_cfg_overlay=dict"),
        (
            {"hf_hub_id": None, "url": "https://drive.google.com/file/d/x/view"},
            "download its weights by hand from https://drive.google.com/file/d/x/view",
        ),
    ],
)
def test_weights_that_cannot_be_fetched_say_how_to_get_them(source: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=source)


def test_a_configuration_of_yacs_is_read_as_a_dict(official: dict[str, Tensor], tmp_path: Path) -> None:
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    path = tmp_path / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": official, "config": module.CfgNode(lr=0.1)}, path)
    assert torch.equal(create("vim_tiny", path).cls_token, official["cls_token"])


def test_misshapen_groups_are_named(official: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path, {**official, "layers.2.mixer.D_b": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mixer\.D \(384,\), layers\.2\.mixer\.D_b \(7,\)"):
        create("vim_tiny", path)


def test_rules_unbind_and_report_duplicates() -> None:
    rules = (KeyRule("both.{}", ("first.{}", "second.{}")),)
    ours = key_rules.to_ours({"both.x": torch.arange(6.0).view(2, 3)}, rules)
    assert torch.equal(ours["second.x"], torch.tensor([3.0, 4.0, 5.0]))
    assert torch.equal(key_rules.to_official(ours, rules)["both.x"], torch.arange(6.0).view(2, 3))
    with pytest.raises(CheckpointError, match=r"hold these in two layouts: first\.x"):
        key_rules.to_ours({"both.x": torch.zeros(2, 3), "first.x": torch.zeros(3)}, rules)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "network.", "module.network."])
def test_a_name_that_stands_there_twice_is_refused(prefix: str, official: dict[str, Tensor], tmp_path: Path) -> None:
    name = "norm_f.weight"
    weights = {**official, prefix + name: official[name] + 1}
    for content in (weights, {"model": weights}, dict(reversed(weights.items()))):
        path = save(tmp_path, content)
        with pytest.raises(
            CheckpointError, match=r"weights\.pth: expected every weight once, got .*norm_f\.weight"
        ) as error:
            create("vim_tiny", path)
        assert f"{prefix}{name}" in str(error.value)
    with pytest.raises(CheckpointError, match="state_dict: expected every weight once"):
        timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay={"state_dict": weights})


@pytest.mark.parametrize("pair", [("backbone.a.weight", "a.weight"), ("backbone.model.a.weight", "backbone.a.weight")])
def test_a_backbone_that_stands_there_twice_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(CheckpointError, match="expected every weight once") as error:
        loading.inside_backbone(pair)
    assert all(name in str(error.value) for name in pair)


# One of every family, narrow and with one block a stage.
SHALLOW: dict[str, tuple[str, dict]] = {
    family: (name, {**SMALLEST[name], **({"depth": 1} if is_plain(name) else {"depths": (1, 1, 1, 1)})})
    for family in family_names()
    for name in [next(x for x in timm.list_models(module=family) if x in SMALLEST)]
}
LAYOUTS = ("ours", "official")


def in_turn(values: Sequence[Any]) -> list[tuple[Any, str, str]]:
    """The first family with every value in both layouts, the others with one of them each, in turn."""
    first, *others = SHALLOW
    every = [(value, layout, first) for value in values for layout in LAYOUTS]
    return every + [(values[i % len(values)], LAYOUTS[i // 2 % 2], family) for i, family in enumerate(others)]


def in_every_way(name: str, kwargs: dict, weights: dict[str, Tensor], folder: Path) -> list:
    """Ways into a model, each a function without arguments."""
    model = timm.create_model(name, **kwargs)
    path = save(folder, weights)
    ways = [
        lambda: create(name, path, **kwargs),
        lambda: timm.create_model(name, True, pretrained_cfg_overlay={"state_dict": weights}, **kwargs),
        lambda: timm.create_model(name, checkpoint_path=path, **kwargs),
        lambda: model.load_state_dict(weights),
        lambda: loading.load(model, key_rules.to_ours(weights, model.key_rules)),
    ]
    try:
        import backbones.mm.models.classifier as mm
    except ImportError:
        return ways
    init = {"type": "Pretrained", "checkpoint": str(path)}
    loss = {"type": "LabelSmoothingCrossEntropy"}
    ways.append(lambda: mm.ImageClassifier({"name": name, **kwargs}, loss, init_cfg=init).init_weights())
    return ways


@pytest.mark.parametrize(("dtype", "layout", "family"), in_turn([torch.int8, torch.bool, torch.complex64, torch.int64]))
def test_weights_of_another_kind_are_refused(dtype: torch.dtype, layout: str, family: str, tmp_path: Path) -> None:
    name, kwargs = SHALLOW[family]
    model = timm.create_model(name, **kwargs)
    ours = next(key for key, x in model.named_parameters() if x.dim() == 2)
    weights = {**model.state_dict(), ours: model.state_dict()[ours].to(dtype)}
    if layout == "official":
        weights = key_rules.to_official(weights, model.key_rules)
    kind = str(dtype).removeprefix("torch.")
    for way in in_every_way(name, kwargs, weights, tmp_path):
        with pytest.raises(CheckpointError, match=rf"of another type: {ours} {kind}, expected float32"):
            way()


@pytest.mark.parametrize(("value", "layout", "family"), in_turn([float("nan"), float("inf"), -float("inf"), 1e300]))
def test_values_that_are_not_finite_are_refused(value: float, layout: str, family: str, tmp_path: Path) -> None:
    name, kwargs = SHALLOW[family]
    model = timm.create_model(name, **kwargs)
    ours = next(key for key, x in reversed(list(model.named_parameters())) if x.dim() == 2)
    weights = model.state_dict()
    weights[ours] = weights[ours].double()  # 1e300 overflows in the model
    weights[ours][-1, -1] = value
    if layout == "official":
        weights = key_rules.to_official(weights, model.key_rules)
    for way in in_every_way(name, kwargs, weights, tmp_path):
        with pytest.raises(CheckpointError, match=rf"these are not finite: {ours}"):
            way()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", SHALLOW)
def test_floats_of_any_width_load(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, kwargs = SHALLOW[family]
    source = timm.create_model(name, **kwargs)
    weights = {key: x.to(dtype) for key, x in source.state_dict().items()}  # counters of batch norms among them
    for way in in_every_way(name, kwargs, weights, tmp_path):
        way()
    loaded = create(name, save(tmp_path, weights), **kwargs).state_dict()
    assert all(torch.equal(x, weights[key].to(x.dtype)) for key, x in loaded.items())
    assert {x.dtype for key, x in loaded.items() if "num_batches" not in key} == {torch.float32}


def test_convert_refuses_them_too() -> None:
    model = timm.create_model("efficientvmamba_tiny")
    for change, words in (
        (torch.full((384,), torch.nan), "not finite: norm.weight"),
        (torch.zeros(384, dtype=torch.int8), "norm.weight int8, expected float32"),
    ):
        with pytest.raises(CheckpointError, match=words):
            conversion.convert({**model.state_dict(), "norm.weight": change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(1)}, r"these are no names: 0 \(int\)"),
        ({("a", "b"): torch.zeros(1)}, r"these are no names: \('a', 'b'\) \(tuple\)"),
        ({"cls_token": torch.zeros(1, 1, 192).to_sparse()}, r"no values in memory: cls_token \(torch\.sparse_coo\)"),
        ({"cls_token": torch.empty(1, 1, 192, device="meta")}, r"no values in memory: cls_token \(meta\)"),
        (
            {"cls_token": torch.quantize_per_tensor(torch.zeros(1, 1, 192), 1.0, 0, torch.qint8)},
            r"no values in memory: cls_token \(quantized\)",
        ),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:TypedStorage:UserWarning", "ignore:.*quantiz.*:UserWarning", "ignore:Sparse:UserWarning"
)
def test_what_is_no_weight_is_named(change: dict, words: str, official: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path, {"model": {**official, **change}})
    with pytest.raises(
        CheckpointError, match=rf"weights\.pth: expected names and tensors under 'model', but .*{words}"
    ) as error:
        create("vim_tiny", path)
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_bias_is_named(official: dict[str, Tensor], tmp_path: Path) -> None:
    """No ending is forgiven: LBVim's layer norms for segmentation are another model."""
    for name in ("layers.0.norm.bias", "norm_f.bias", "pos_embed.bias"):
        ours = name.replace("layers", "blocks")
        for kwargs in ({}, {"features_only": True}, {"num_classes": 10}):
            with pytest.raises(CheckpointError, match=rf"unknown: {ours}"):
                create("vim_tiny", save(tmp_path, {**official, name: torch.zeros(192)}), **kwargs)
    # The converter knows rules of its own: it drops what stands around a backbone, nothing inside of it.
    model = timm.create_model("efficientvmamba_tiny")
    for name in ("norm.extra.bias", "stages.0.blocks.0.mixer.ssm.bias", "head.bias", "out_proj.bias"):
        with pytest.raises(CheckpointError, match=r"unknown: |in two layouts: head\.fc\.bias"):
            conversion.convert({**model.state_dict(), name: torch.zeros(1)}, "efficientvmamba_tiny")


def test_colours_are_adapted_between_any_numbers(tmp_path: Path) -> None:
    source = timm.create_model("efficientvmamba_tiny", in_chans=4)
    path = save(tmp_path, source.state_dict())
    overlay = {"file": str(path), "input_size": (4, 224, 224)}
    conv = source.stem.proj.weight if hasattr(source.stem, "proj") else source.stem.conv1.weight
    one = timm.create_model("efficientvmamba_tiny", True, pretrained_cfg_overlay=overlay, in_chans=1)
    found = one.stem.proj.weight if hasattr(one.stem, "proj") else one.stem.conv1.weight
    torch.testing.assert_close(found, conv.sum(1, keepdim=True))
    with pytest.raises(CheckpointError, match="misshapen"):  # three of its four colours would be a guess
        create("efficientvmamba_tiny", path)


@pytest.mark.parametrize("name", [*(name for name, _ in SHALLOW.values()), "lbvim_528"])
def test_features_of_every_family_need_no_head(name: str, tmp_path: Path) -> None:
    kwargs = {**SMALLEST[name], **({"depth": 1} if is_plain(name) else {"depths": (1, 1, 1, 1)})}
    model = timm.create_model(name, **kwargs)
    body = {key: x for key, x in model.state_dict().items() if not key.startswith(("norm.", "attn_pool.", "head."))}
    path = save(tmp_path, body)
    features = create(name, path, **kwargs, features_only=True, out_indices=(0,))
    assert all(torch.equal(x, body[key]) for key, x in features.model.state_dict().items() if key in body)
    with pytest.raises(CheckpointError, match=r"missing: .*head\."):
        create(name, path, **kwargs, num_classes=3)
    last = next(reversed(body))
    with pytest.raises(CheckpointError, match=rf"missing: {last}"):
        create(
            name,
            save(tmp_path, {k: x for k, x in body.items() if k != last}),
            **kwargs,
            features_only=True,
            out_indices=0,
        )
