"""--cfg-options: keys that can be meant and keys that cannot; and classes, which a config states in one place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

from backbones.mm import UserError
from backbones.mm.app.cli import load_config
from backbones.mm.app.options import check_options
from backbones.mm.data.annotations import check_annotations
from backbones.mm.models.classifier import create_network
from backbones.models import FAMILIES

ROOT = Path(__file__).parents[1] / "configs"
VIM = ROOT / "digits/vim-tiny_digits.py"
RCNN = ROOT / "digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py"
UPERNET = ROOT / "digits/upernet_efficientvmamba-tiny_digits.py"
CASCADE = ROOT / "coco/cascade-mask-rcnn_lbvim-tiny_simple-fpn_100e_coco-lsj.py"


def load(path: Path, **options: Any) -> Config:
    """A config as the tools load it; two underscores stand for a dot."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    arguments = {"launcher": "none", "verbose": False, "work_dir": None}
    return load_config(argparse.Namespace(config=path, cfg_options=given, **arguments))


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        (VIM, "optim_wraper.optimizer.lr", "the config has no 'optim_wraper'; did you mean optim_wrapper"),
        (VIM, "colour", "the config has no 'colour'"),
        (VIM, "optim_wrapper.optimizer.lrr", "optim_wrapper.optimizer has no 'lrr'; did you mean lr"),
        (VIM, "train_cfg.max_epoch", "train_cfg has no 'max_epoch'; did you mean max_epochs"),
        (VIM, "model.network.nmae", "model.network has no 'nmae'; did you mean name"),
        (VIM, "train_dataloader.batchsize", "train_dataloader has no 'batchsize'; did you mean batch_size"),
        (VIM, "train_dataloader.dataset.colour", "train_dataloader.dataset has no 'colour'"),
        (VIM, "param_scheduler.2.end", "param_scheduler is a list, got '2', expected 0 to 1"),
        (VIM, "param_scheduler.end", "param_scheduler is a list, got 'end', expected 0 to 1"),
        (VIM, "train_cfg.max_epochs.x", "train_cfg.max_epochs is 6 and has no settings"),
        (RCNN, "model.backbone.frozen_stage", "model.backbone has no 'frozen_stage'; did you mean frozen_stages"),
        (RCNN, "model.roi_head.bbox_head.fc_channels", "model.roi_head.bbox_head has no 'fc_channels'"),
        (UPERNET, "model.decode_head.chanels", "model.decode_head has no 'chanels'; did you mean channels"),
    ],
)
def test_a_mistyped_option_is_refused(path: Path, key: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"--cfg-options {key}: {message}") as error:
        load(path, **{key: 1})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (VIM, "experiment_name"),
        (VIM, "find_unused_parameters"),
        (VIM, "load_ignore"),
        (VIM, "auto_scale_lr.enable"),
        (VIM, "custom_hooks"),
        (VIM, "randomness.deterministic"),
        (VIM, "model.network.drop_rate"),
        (VIM, "model.network.scan_backend"),
        (VIM, "param_scheduler.1.end"),
        (VIM, "optim_wrapper.optimizer.eps"),
        (VIM, "optim_wrapper.paramwise_cfg.layer_decay"),
        (VIM, "optim_wrapper.accumulative_counts"),
        (VIM, "default_hooks.checkpoint.max_keep_ckpts"),
        (VIM, "default_hooks.ema.type"),
        (VIM, "train_dataloader.persistent_workers"),
        (RCNN, "model.backbone.with_cp"),
        (RCNN, "model.neck.start_level"),
        (RCNN, "train_dataloader.dataset.indices"),
        (UPERNET, "model.decode_head.ignore_index"),
    ],
)
def test_what_a_type_or_a_runner_takes_may_be_new(path: Path, key: str) -> None:
    config = load(path)
    check_options(config, {key: 1})


def numbers(config: Config) -> dict[str, int]:
    """Every number of classes that a model or a data set of a config states, and the weights of losses."""
    found = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "num_classes":
                    found[path] = item
                walk(item, f"{path}.{key}".lstrip("."))
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                walk(item, f"{path}.{number}")

    walk(config._cfg_dict, "")
    return found


PLACES = {
    VIM: {"model.network", *(f"{part}_dataloader.dataset" for part in ("train", "val", "test"))},
    RCNN: {"model.roi_head.bbox_head", "model.roi_head.mask_head"},
    UPERNET: {"model.decode_head", "model.auxiliary_head"},
    CASCADE: {*(f"model.roi_head.bbox_head.{i}" for i in range(3)), "model.roi_head.mask_head"},
}


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.stem.split("_")[0])
def test_one_place_states_the_number_of_classes(path: Path, tmp_path: Path) -> None:
    stated = Config.fromfile(path).num_classes
    assert numbers(load(path)) == dict.fromkeys(["", *PLACES[path]], stated)
    expected = dict.fromkeys(["", *PLACES[path]], 4)
    assert numbers(load(path, num_classes=4)) == expected
    (tmp_path / "leaf.py").write_text(f"_base_ = '{path}'\nnum_classes = 4\n")
    assert numbers(load(tmp_path / "leaf.py")) == expected


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.stem.split("_")[0])
def test_a_place_of_its_own_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    place = sorted(x for x in PLACES[path] if not x[-1].isdecimal())[0]
    message = rf"{place}\.num_classes is 4, num_classes of the config is \d+; change num_classes alone"
    with pytest.raises(UserError, match=message):
        load(path, **{f"{place}.num_classes": 4})
    nested = "dict(num_classes=4)"
    for name in reversed(place.split(".")[1:]):
        nested = f"dict({name}={nested})"
    (tmp_path / "leaf.py").write_text(f"_base_ = '{path}'\n{place.split('.')[0]} = {nested}\n")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "leaf.py")


def test_a_config_whose_places_all_state_the_same_is_left_alone(tmp_path: Path) -> None:
    heads = "roi_head=dict(bbox_head=dict(num_classes=4), mask_head=dict(num_classes=4))"
    (tmp_path / "leaf.py").write_text(f"_base_ = '{RCNN}'\nmodel = dict({heads})\n")
    assert numbers(load(tmp_path / "leaf.py")) == dict.fromkeys(["", *PLACES[RCNN]], 4)


@pytest.mark.parametrize("value", [-1, 0, 2.5, "ten"])
def test_a_number_of_classes_is_a_positive_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"num_classes: got .*, expected a whole number of at least 1"):
        load(VIM, num_classes=value)


@pytest.mark.parametrize("path", [RCNN, UPERNET])
def test_names_of_classes_are_stated_once(path: Path, tmp_path: Path) -> None:
    config = load(path, metainfo__classes=("cat", "dog"))
    assert numbers(config) == dict.fromkeys(["", *PLACES[path]], 2)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.metainfo.classes == ("cat", "dog")
    (tmp_path / "leaf.py").write_text(f"_base_ = '{path}'\nmetainfo = dict(classes=('cat', 'dog'))\n")
    assert numbers(load(tmp_path / "leaf.py")) == dict.fromkeys(["", *PLACES[path]], 2)


def test_a_loss_that_weighs_other_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.mm.data.annotations._check_label_maps", lambda dataset: None)
    config = load(UPERNET, metainfo__classes=("cat", "dog"))
    with pytest.raises(UserError, match=r"decode_head has a loss with class_weight for 11 classes, .* 2 classes"):
        check_annotations(config, ["train_dataloader"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_number_of_classes_is_refused(family: Any) -> None:
    name = timm.list_models(module=family.__module__.rpartition(".")[2])[0]
    for create in (timm.create_model, create_network):
        with pytest.raises(ValueError, match="num_classes: got -1, expected at least 1, or 0 for no classifier"):
            create(name, num_classes=-1)


def test_arguments_of_a_new_type_are_its_own() -> None:
    config = load(VIM, model__loss__type="WeightedCrossEntropy", model__loss__class_weights="balanced")
    assert config.model.loss == {"type": "WeightedCrossEntropy", "smoothing": 0.1, "class_weights": "balanced"}
    with pytest.raises(UserError, match=r"model\.loss has no 'class_weight'; did you mean class_weights"):
        load(VIM, model__loss__type="WeightedCrossEntropy", model__loss__class_weight="balanced")


def test_names_of_classes_reach_data_sets_that_state_none(tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    classes = ("cat", "dog")
    config.write_text(f'_base_ = "{CASCADE}"\nnum_classes = 2\nmetainfo = dict(classes={classes})\n')
    loaded = load(config)
    for part in ("train", "val", "test"):
        dataset = loaded[f"{part}_dataloader"].dataset
        while "dataset" in dataset:
            dataset = dataset.dataset
        assert dataset.metainfo.classes == classes
    assert {head.num_classes for head in loaded.model.roi_head.bbox_head} == {2}
