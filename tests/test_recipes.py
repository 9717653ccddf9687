"""The numbers of configs/: recipes against the zoo, dense models against mmdet's and mmseg's own configs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import MODELS

import backbones.mm  # noqa: F401  (registers the classifier)
from backbones import zoo
from backbones.models import family_names

ROOT = Path(__file__).parents[1] / "configs"
IMAGENET = sorted(path.stem for path in ROOT.glob("imagenet/*.py"))
DENSE = sorted(f"{path.parent.name}/{path.stem}" for task in ("coco", "ade20k") for path in ROOT.glob(f"{task}/*.py"))

# What a config cannot or does not say, and why.
NOT_IN_A_CONFIG = {"mixed_precision"}  # --amp of tools/train.py
# The average is of no use where the published weights are the plain ones.
NOT_AVERAGED = {"vim", "lbmamba"}, {"vanilla_vmamba_tiny"}
# In timm's notation.
AUGMENTATIONS = {
    "3-Augment": "3a",
    "RandAugment, 2 of the increasing policies, level 9 of 10, std 0.5": "rand-m9-mstd0.5-inc1",
}
# Of the settings that a family's facts leave out.
UNSTATED = {
    "betas": [0.9, 0.999],
    "random_erasing": 0.25,
    "color_jitter": 0.4,
    "clip_grad": None,
    "cooldown_epochs": 0,
    "ema_decay": None,
    "repeated_augmentation": None,
    "distillation": None,
    "self_distillation_weight": None,
}


def facts_of(name: str, file: str = "") -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A model's family, what the zoo states about its training, and about its input.

    The name of a config tells the stage, "-stage1" the first, where there are several; without it the last is meant.
    """
    for family in family_names(guests=True):
        facts = zoo.load_family(family)
        model = facts["models"].get(facts.get("aliases", {}).get(name, name))
        if model is not None:
            recipe = {**facts["recipe"], **model.get("reported", {}).get("training", {})}
            number = file.partition("-stage")[2]
            stage = dict(facts["stages"][int(number) - 1 if number else -1]) if "stages" in facts else {}
            size = stage.pop("input_size", model.get("size", facts["input"]["size"]))
            return family, recipe | stage, {**facts["input"], "size": size}
    raise AssertionError(name)


def expected_recipe(name: str, file: str) -> dict[str, Any]:
    family, recipe, _ = facts_of(name, file)
    expected = UNSTATED | {key: value for key, value in recipe.items() if key not in {"source", *NOT_IN_A_CONFIG}}
    expected["auto_augment"] = AUGMENTATIONS.get(expected["auto_augment"], expected["auto_augment"])
    if family in NOT_AVERAGED[0] or name in NOT_AVERAGED[1]:
        expected["ema_decay"] = None
    if expected["epochs"] == 30:  # fine-tuned at a constant rate
        for key in ("warmup_epochs", "cooldown_epochs"):
            expected[key] = 0
        expected["warmup_learning_rate"] = expected["minimum_learning_rate"] = expected["learning_rate"]
    return expected


def recipe_of(config: Config) -> dict[str, Any]:
    """The settings of a config under the zoo's names."""
    wrapper, mixup, model = config.optim_wrapper, config.model.data_preprocessor.mixup, config.model
    optimizer, transform = wrapper.optimizer, config.train_dataloader.dataset.transform
    hooks = {hook.type: hook for hook in config.custom_hooks}
    assert hooks.keys() <= {"EMAHook", "SelfDistillationHook"}
    averaging = hooks.get("EMAHook") or hooks.get("SelfDistillationHook")
    assert "EMAHook" not in hooks or averaging.update_buffers  # running statistics are averaged, too
    found = {
        "optimizer": optimizer.type,
        "betas": list(optimizer.betas),
        "learning_rate": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": wrapper.clip_grad and wrapper.clip_grad.max_norm,
        "batch_size": config.auto_scale_lr.base_batch_size,
        "drop_path_rate": model.network.get("drop_path_rate", 0.0),
        "label_smoothing": mixup.label_smoothing,
        "mixup": mixup.mixup_alpha,
        "cutmix": mixup.cutmix_alpha,
        "random_erasing": transform.re_prob,
        "color_jitter": transform.get("color_jitter", 0.4),
        "auto_augment": transform.auto_augment,
        "repeated_augmentation": None,
        "ema_decay": averaging and 1 - averaging.momentum,
        "distillation": None,
        "self_distillation_weight": None,
    }
    sampler = config.train_dataloader.sampler
    if sampler.type == "RepeatedAugmentationSampler":
        found["repeated_augmentation"] = sampler.get("num_repeats", 3)
    if model.type == "HardDistillation":
        share = {0.5: "half"}[model.alpha]
        found["distillation"] = f"hard, from {model.teacher.name}, {share} of the loss"
    if model.type == "SelfDistillation":
        found["self_distillation_weight"] = model.weight
        start = hooks["SelfDistillationHook"].start_epoch
        found["self_distillation"] = (
            f"from epoch {start}, cross-entropy with the averaged model's output, weighted as noted for each model"
        )
    return found | schedule_of(config)


def schedule_of(config: Config) -> dict[str, Any]:
    epochs, lr = config.train_cfg.max_epochs, config.optim_wrapper.optimizer.lr
    if not config.param_scheduler:
        rates = {"warmup_learning_rate": lr, "minimum_learning_rate": lr}
        return {"epochs": epochs, "warmup_epochs": 0, "cooldown_epochs": 0, **rates}
    warmup, cosine = config.param_scheduler
    assert (warmup.type, cosine.type) == ("LinearLR", "CosineAnnealingLR")
    assert warmup.by_epoch and cosine.by_epoch
    assert (warmup.get("begin", 0), cosine.begin) == (0, warmup.end)
    return {
        "epochs": cosine.end,
        "warmup_epochs": warmup.end,
        "cooldown_epochs": epochs - cosine.end,
        "warmup_learning_rate": warmup.start_factor * lr,
        "minimum_learning_rate": cosine.eta_min,
    }


@pytest.mark.parametrize("name", IMAGENET)
def test_a_recipe_is_the_one_that_the_zoo_states(name: str) -> None:
    config = Config.fromfile(ROOT / "imagenet" / f"{name}.py")
    expected, found = expected_recipe(config.model.network.name, name), recipe_of(config)
    numbers = {key: pytest.approx(x, rel=1e-9) if isinstance(x, float) else x for key, x in expected.items()}
    assert found == numbers
    arch, batch, data = name.split("_")
    assert arch == config.model.network.name.replace("_", "-") and data.partition("-stage")[0] == "in1k"
    devices, images = map(int, batch.split("xb"))
    assert (images, devices * images) == (config.train_dataloader.batch_size, found["batch_size"])


@pytest.mark.parametrize("name", IMAGENET)
def test_images_are_prepared_as_the_zoo_states(name: str) -> None:
    config = Config.fromfile(ROOT / "imagenet" / f"{name}.py")
    facts = facts_of(config.model.network.name, name)[2]
    defaults = {key: x.default for key, x in inspect.signature(create_transform).parameters.items()}
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        transform = {**defaults, **loader.dataset.transform}
        assert (transform["input_size"], transform["interpolation"]) == (facts["size"], facts["interpolation"])
        assert (list(transform["mean"]), list(transform["std"])) == (facts["mean"], facts["std"])
        if not transform["is_training"]:
            assert (transform["crop_pct"], transform["crop_mode"]) == (facts["crop_pct"], None)
    train = {**defaults, **config.train_dataloader.dataset.transform}
    assert (train["scale"], train["ratio"], train["hflip"], train["vflip"]) == (None, None, 0.5, 0.0)  # timm's usual
    assert (train["re_mode"], train["re_count"]) == ("pixel", 1)
    mixup = config.model.data_preprocessor.mixup
    assert (mixup.prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")
    splits = [x.dataset.split for x in (config.train_dataloader, config.val_dataloader, config.test_dataloader)]
    assert splits == ["train", "val", "val"]
    assert config.train_dataloader.drop_last and config.train_dataloader.sampler.get("shuffle", True)


# Stochastic depth of detectors and segmentors, by model; of VSSD-Micro's segmentor the authors state none.
DROP_PATH = {
    **dict.fromkeys(("efficientvmamba_tiny", "efficientvmamba_small", "efficientvmamba_base"), 0.1),
    "groupmamba_tiny": 0.05,
    **dict.fromkeys(("lbvim_tiny", "lbvim_small", "lbvim_300", "lbvim_528"), 0.1),
    **dict.fromkeys(("localvim_tiny", "localvim_small", "localvmamba_tiny"), 0.1),
    "localvmamba_small": 0.2,
    **{"msvmamba_nano": 0.2, "msvmamba_micro": 0.2, "msvmamba_tiny": 0.2},
    **{"plainmamba_l1": 0.1, "plainmamba_l2": 0.2, "plainmamba_l3": 0.3},
    **{"spatialmamba_tiny": 0.2, "spatialmamba_small": 0.3, "spatialmamba_base": 0.5},
    **dict.fromkeys(("vanilla_vmamba_tiny", "vanilla_vmamba_small", "vanilla_vmamba_base"), 0.2),
    **dict.fromkeys(("vim_tiny", "vim_small"), 0.1),
    **{"vmamba_tiny_s1l8": 0.2, "vmamba_tiny_s2l5": 0.2, "vmamba_small_s2l15": 0.3, "vmamba_base_s2l15": 0.6},
    **{"vssd_micro": 0.1, "vssd_tiny": 0.2, "vssd_small": 0.4},
    "efficientvim_m4": None,
}
# Weights that detectors and segmentors start from, where not from those of the backbone's name.
STARTS = {"efficientvim_m4": "published:efficientvim_m4.e450_in1k"}
DROP_PATH_OF_SEGMENTORS = {
    "msvmamba_micro": 0.3,
    **dict.fromkeys(("vanilla_vmamba_tiny", "vanilla_vmamba_small", "vanilla_vmamba_base"), 0.3),
    "vssd_micro": None,
}
# Learning rate, weight decay, images on a device and in all, clipping of gradients, layer decay.
COCO, VITDET, ADE20K = (1e-4, 0.05, 2, 16, None, None), (1e-4, 0.05, 2, 16, 35, None), (6e-5, 0.01, 2, 16, None, None)
OPTIMIZATION = {
    "cascade-mask-rcnn_vim-tiny": (1e-4, 0.1, 8, 64, None, 0.837),
    "cascade-mask-rcnn_lbvim-tiny": (1e-4, 0.05, 4, 32, 35, None),
    "mask-rcnn_localvim-tiny": VITDET,
    "mask-rcnn_localvim-small": (1e-4, 0.05, 1, 8, 35, None),
    **{f"retinanet_plainmamba-l{i}": (1e-4, 0.05, 2, 16, 35, None) for i in (1, 2, 3)},
    **dict.fromkeys(("mask-rcnn_efficientvim-m4", "retinanet_efficientvim-m4"), (2e-4, 0.05, 16, 16, None, None)),
    **dict.fromkeys(("rtmdet_efficientvmamba-small", "rtmdet_msvmamba-nano"), (4e-3, 0.05, 32, 256, None, None)),
    "semantic-fpn_efficientvim-m4": (2e-4, 1e-4, 4, 32, None, None),
    "upernet_vim-tiny": (2e-4, 0.1, 8, 32, None, None),
    "upernet_vim-small": (1e-4, 0.05, 8, 32, None, None),
}
# Length in epochs or iterations, interval of validation, warm-up in iterations and its first factor, then steps.
SCHEDULES = {
    "1x": (12, 1, 1000, 1e-3, [8, 11]),
    "3x": (36, 1, 1000, 1e-3, [27, 33]),
    "100e": (184375, 5000, 250, 1e-3, [163889, 177546]),
    "160k": (160000, 16000, 1500, 1e-6, None),
    "60k": (60000, 6000, 1500, 1e-6, None),
    "300e": (300, 10, 1000, 1e-5, None),
    "40k": (40000, 4000, 0, None, None),
}


EVERY = sorted(str(x.relative_to(ROOT).with_suffix("")) for x in ROOT.glob("*/*.py") if x.parent.name != "_base_")


@pytest.mark.parametrize("name", [x for x in EVERY if x not in DENSE])
def test_the_batch_size_that_a_learning_rate_is_for(name: str) -> None:
    """`train --auto-scale-lr` relies on it; those of detectors and segmentors are held below."""
    config = Config.fromfile(ROOT / f"{name}.py")
    stated = re.search(r"_(\d+)xb(\d+)", name)
    images = int(stated[1]) * int(stated[2]) if stated else config.train_dataloader.batch_size
    assert config.auto_scale_lr == {"base_batch_size": images}  # and not enabled


@pytest.mark.parametrize("name", DENSE)
def test_dense_recipes(name: str) -> None:
    config = Config.fromfile(ROOT / f"{name}.py")
    task, file = name.split("/")
    method, arch, *rest = file.split("_")
    backbone = config.model.backbone
    assert backbone.arch.replace("_", "-") == arch
    rates = DROP_PATH | (DROP_PATH_OF_SEGMENTORS if task == "ade20k" else {})
    assert backbone.get("drop_path_rate") == rates[backbone.arch]
    assert backbone.init_cfg == {"type": "Pretrained", "checkpoint": STARTS.get(backbone.arch, "published")}

    optimizer, wrapper = config.optim_wrapper.optimizer, config.optim_wrapper
    assert (optimizer.type, optimizer.betas) == ("AdamW", (0.9, 0.999))
    found = (
        optimizer.lr,
        optimizer.weight_decay,
        config.train_dataloader.batch_size,
        config.auto_scale_lr.base_batch_size,
        (wrapper.get("clip_grad") or {}).get("max_norm"),
        wrapper.get("paramwise_cfg", {}).get("layer_decay"),
    )
    assert found == OPTIMIZATION.get(f"{method}_{arch}", ADE20K if task == "ade20k" else COCO)

    key = next(part for word in rest for part in word.split("-") if part in SCHEDULES)
    length, interval, warmup_end, factor, steps = SCHEDULES[key]
    if arch.startswith(("plainmamba", "efficientvim-")) and task == "coco":
        warmup_end = 500
    by_epoch = key in ("1x", "3x", "300e")
    assert config.train_cfg.type == f"{'Epoch' if by_epoch else 'Iter'}BasedTrainLoop"
    assert config.train_cfg["max_epochs" if by_epoch else "max_iters"] == length
    assert config.train_cfg.val_interval == interval
    checkpoint = config.default_hooks.checkpoint
    assert (checkpoint.get("by_epoch", True), checkpoint.interval) == (by_epoch, interval)
    warmup = {"type": "LinearLR", "start_factor": factor, "by_epoch": False, "begin": 0, "end": warmup_end}
    if key == "40k":
        after = {"type": "PolyLR", "power": 0.9, "eta_min": 1e-6, "by_epoch": False, "begin": 0, "end": length}
    elif key == "300e":
        after = {"type": "CosineAnnealingLR", "eta_min": 2e-4, "begin": 150, "end": 300, "T_max": 150, "by_epoch": True}
        after["convert_to_iter_based"] = True
    elif steps is None:
        after = {"type": "PolyLR", "power": 1.0, "eta_min": 0.0, "by_epoch": False, "begin": warmup_end, "end": length}
    else:
        after = {"type": "MultiStepLR", "begin": 0, "end": length, "milestones": steps, "gamma": 0.1}
        after["by_epoch"] = by_epoch
    assert config.param_scheduler == ([warmup, after] if warmup_end else [after])

    facts = facts_of(backbone.arch)[2]
    preprocessor = config.model.data_preprocessor
    assert preprocessor.bgr_to_rgb  # OpenMMLab reads images as BGR
    for statistic in ("mean", "std"):
        assert list(preprocessor[statistic]) == pytest.approx([255 * x for x in facts[statistic]], rel=1e-9)


# Recipes of our own, with which the accuracies in docs/ were measured: rate, decay, betas, clipping; length, batch;
# warm-up's first factor and end; minimum.
DIGITS = {
    "vim-tiny_digits": (1e-3, 0.05, (0.9, 0.98), 1.0, 6, 16, 0.01, 1, 1e-5),
    "vim-narrow_digits": (1e-3, 0.05, (0.9, 0.98), 1.0, 6, 16, 0.01, 1, 1e-5),
    "mask-rcnn_vmamba-tiny-s1l8_fpn_digits": (1e-3, 0.05, None, 5.0, 4, 8, 0.01, 60, 1e-5),
    "upernet_efficientvmamba-tiny_digits": (2e-3, 0.05, None, 5.0, 550, 16, 0.01, 20, 4e-5),
}


def test_every_digits_recipe_is_listed() -> None:
    assert DIGITS.keys() == {path.stem for path in ROOT.glob("digits/*.py")}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_recipes(name: str) -> None:
    config = Config.fromfile(ROOT / "digits" / f"{name}.py")
    optimizer, (warmup, cosine), loop = config.optim_wrapper.optimizer, config.param_scheduler, config.train_cfg
    assert (optimizer.type, warmup.type, cosine.type) == ("AdamW", "LinearLR", "CosineAnnealingLR")
    length = loop.get("max_epochs") or loop.max_iters
    found = (
        optimizer.lr,
        optimizer.weight_decay,
        optimizer.get("betas"),
        config.optim_wrapper.clip_grad.max_norm,
        length,
        config.train_dataloader.batch_size,
        warmup.start_factor,
        warmup.end,
        cosine.eta_min,
    )
    assert found == DIGITS[name]
    assert cosine.end == length and cosine.begin == (warmup.end if warmup.by_epoch == cosine.by_epoch else 0)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, word and empty container of a config, with its place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None or not value:
        yield path, tuple(value) if isinstance(value, list) else value
    else:
        for key, item in items:
            yield from leaves(item, f"{path}.{key}" if path else str(key))


def theirs(package: str, file: str) -> dict[str, Any]:
    """A config that mmdet or mmseg ships."""
    return Config.fromfile(Path(find_spec(package).origin).parent / ".mim" / "configs" / f"{file}.py")._cfg_dict


# Ours, theirs (of which the model or the data are compared), and all values of ours that differ. The backbone and what
# depends on its width come from the leaf.
SECOND_SOURCES = {
    "models/mask-rcnn_fpn": ("mmdet", "_base_/models/mask-rcnn_r50_fpn", {}),
    "models/retinanet_fpn": ("mmdet", "_base_/models/retinanet_r50_fpn", {}),
    "models/cascade-mask-rcnn_simple-fpn": (
        "mmdet",
        "_base_/models/cascade-mask-rcnn_r50_fpn",
        # ViTDet's heads.
        {
            "data_preprocessor.pad_size_divisor": 1024,
            "neck.type": "SimpleFeaturePyramid",
            "rpn_head.num_convs": 2,
            "rpn_head.loss_bbox.type": "L1Loss",
            "train_cfg.rpn.allowed_border": -1,
            **{f"roi_head.stage_loss_weights.{i}": 1.0 for i in (1, 2)},
            **{f"roi_head.bbox_head.{i}.type": "Shared4Conv1FCBBoxHead" for i in range(3)},
            **{f"roi_head.bbox_head.{i}.conv_out_channels": 256 for i in range(3)},
            **{f"roi_head.bbox_head.{i}.norm_cfg.type": "LayerNorm2d" for i in range(3)},
            **{f"roi_head.bbox_head.{i}.norm_cfg.eps": 1e-6 for i in range(3)},
            "roi_head.mask_head.norm_cfg.type": "LayerNorm2d",
            "roi_head.mask_head.norm_cfg.eps": 1e-6,
        },
    ),
    "models/upernet": (
        "mmseg",
        "_base_/models/upernet_swin",
        {
            "data_preprocessor.size.0": 512,
            "data_preprocessor.size.1": 512,
            "decode_head.num_classes": 150,
            "auxiliary_head.num_classes": 150,
        },
    ),
    "models/rtmdet": (
        "mmdet",
        "rtmdet/rtmdet_tiny_8xb32-300e_coco",
        # Our backbones see images as RGB.
        {
            "data_preprocessor.bgr_to_rgb": True,
            **{f"data_preprocessor.mean.{i}": x for i, x in ((0, 123.675), (2, 103.53))},
            **{f"data_preprocessor.std.{i}": x for i, x in ((0, 58.395), (2, 57.375))},
        },
    ),
    "models/semantic-fpn": (
        "mmseg",
        "_base_/models/fpn_r50",
        {"data_preprocessor.size.0": 512, "data_preprocessor.size.1": 512, "decode_head.num_classes": 150},
    ),
    "datasets/coco": ("mmdet", "_base_/datasets/coco_instance", {}),
    "datasets/coco_ms-crop": ("mmdet", "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco", {}),
    "datasets/coco_mosaic": ("mmdet", "rtmdet/rtmdet_tiny_8xb32-300e_coco", {}),
    "datasets/ade20k": ("mmseg", "_base_/datasets/ade20k", {"train_dataloader.batch_size": 2}),
}
# How data are loaded says nothing about the recipe.
LOADING = {"num_workers", "worker_init_fn", "data_hint", "sizes"}


@pytest.mark.parametrize("name", SECOND_SOURCES)
def test_bases_agree_with_those_that_openmmlab_ships(name: str) -> None:
    package, file, differing = SECOND_SOURCES[name]
    ours, known = Config.fromfile(ROOT / "_base_" / f"{name}.py")._cfg_dict, theirs(package, file)
    if name.startswith("models/"):
        ours, known = ({k: v for k, v in x.model.items() if k != "backbone"} for x in (ours, known))
    expected = dict(leaves(known))
    found = {path: value for path, value in leaves(ours) if not LOADING & set(path.split("."))}
    assert {path: value for path, value in found.items() if expected.get(path) != value} == differing


def test_large_scale_jitter_agrees_with_mmdet() -> None:
    """In ViTDet's order: flipped before it is resized; and every crop has the same size."""
    ours = Config.fromfile(ROOT / "_base_/datasets/coco_lsj.py")
    known = {step["type"]: step for step in theirs("mmdet", "common/lsj-100e_coco-instance")["train_pipeline"]}
    order = ("RandomFlip", "RandomResize", "RandomCrop", "FilterAnnotations", "PackDetInputs")
    assert [step.type for step in ours.train_pipeline] == ["LoadImageFromFile", "LoadAnnotations", *order]
    differing = {
        "LoadImageFromFile": {},
        "RandomCrop": {"crop_type": "absolute"},
        "FilterAnnotations": {"keep_empty": False},
    }
    for step in ours.train_pipeline:
        expected = {key: value for key, value in known[step.type].items() if value is not None}
        assert step == {**expected, **differing.get(step.type, {})}
    assert ours.train_dataloader.dataset.pipeline == ours.train_pipeline
    for loader in (ours.val_dataloader, ours.test_dataloader):
        assert loader.dataset.pipeline == ours.test_pipeline
    assert ours.test_pipeline[1] == {"type": "Resize", "scale": (1024, 1024), "keep_ratio": True}


def test_a_stage_starts_from_the_one_before(tmp_path: Path) -> None:
    """Adventurer's second stage takes weights for smaller images, and its 3-Augment is one that timm knows."""
    first, second = (Config.fromfile(ROOT / f"imagenet/adventurer-base_8xb128_in1k-stage{i}.py") for i in (1, 2))
    for config in (first, second):
        config.model.network.update(name="adventurer_tiny", depth=1)
    before = MODELS.build(first.model)
    torch.save({"state_dict": before.state_dict()}, tmp_path / "epoch_300.pth")
    assert second.model.init_cfg.checkpoint.endswith("/epoch_300.pth")
    second.model.init_cfg.checkpoint = str(tmp_path / "epoch_300.pth")
    after = MODELS.build(second.model)
    after.init_weights()
    assert torch.equal(after.network.head.weight, before.network.head.weight)
    assert after.network.pos_embed.shape[1] == 14 * 14 + 1
    assert torch.equal(after.network.pos_embed[:, -1], before.network.pos_embed[:, -1])  # the class token's
    image = Image.new("RGB", (150, 130), (200, 30, 90))
    assert create_transform(**first.train_dataloader.dataset.transform)(image).shape == (3, 128, 128)
