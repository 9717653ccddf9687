"""Weight files: safe reading, conversion both ways, and errors that name keys and files."""

import argparse
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones.weights import CheckpointError, KeyRule, files
from backbones.weights import rules as key_rules
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


@pytest.mark.parametrize("name", MODELS)
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
