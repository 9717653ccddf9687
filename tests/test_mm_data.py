"""ImageFolder: labels, damaged files, classes that do not match, seeds of workers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmengine")

from mmengine.registry import DATASETS
from mmengine.runner import Runner

from backbones.mm import ImageFolder, UserError, collate_images
from backbones.mm.data.datasets import check_class_folders, compare_classes

TRANSFORM = {"input_size": 8, "crop_pct": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
FORMATS = ("png", "jpg", "jpeg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes 2, 10 and 9, whose alphabetical order is not the natural one; the grey level is the class."""
    for name in ("2", "10", "9"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (12, 8), int(name)).save(tmp_path / "val" / name / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "original-mstd0.5", "v0-mstd0.5", "augmix"]
)
def test_every_strength_of_augmentation_is_drawn(policy: str) -> None:
    """The recipes' policy draws its strength: the most that posterisation gets keeps no bits."""
    settings = {"input_size": 8, "is_training": True, "auto_augment": policy}
    (step,) = (x for x in ImageFolder.make_transform(settings).transforms if hasattr(x, "ops") or hasattr(x, "policy"))
    image = Image.effect_noise((12, 8), 50).convert("RGB")
    ops = step.ops if hasattr(step, "ops") else [op for pair in step.policy for op in pair]
    for op in ops:
        op.prob, op.magnitude_std = 1.0, 0.0
        for op.magnitude in range(11):
            assert op(image).size == image.size
    if "inc1" in policy:
        (strongest,) = (op for op in ops if op.name == "PosterizeIncreasing")
        assert strongest(image).getextrema() == ((0, 0),) * 3  # black, as before Pillow 13


def test_items_and_classes(root: Path) -> None:
    dataset = ImageFolder(str(root), "val", TRANSFORM, num_classes=3)
    assert dataset.metainfo == {"classes": ("2", "9", "10")}
    batch = collate_images([dataset[i] for i in range(len(dataset))])
    assert batch["inputs"].shape == (3, 3, 8, 8)
    grey = (batch["inputs"].mean(dim=(1, 2, 3)) * 255).round().int().tolist()
    assert [dataset.metainfo["classes"][i] for i in batch["targets"]] == [str(g) for g in grey]


def test_the_first_images_of_each_class(root: Path) -> None:
    for name in ("2", "9"):
        for copy in range(3):
            Image.new("L", (12, 8), int(name)).save(root / "val" / name / f"{copy}.png")
    dataset = ImageFolder(str(root), "val", TRANSFORM, per_class=2)
    assert [dataset[i]["targets"] for i in range(len(dataset))] == [0, 0, 1, 1, 2]  # class 10 has but one
    assert [Path(dataset.get_data_info(i)["img_path"]).name for i in range(4)] == ["0.png", "1.png"] * 2
    with pytest.raises(UserError, match="per_class: got 0"):
        ImageFolder(str(root), "val", TRANSFORM, per_class=0)


def test_wrappers_of_mmengine(root: Path) -> None:
    for name in ("2", "9"):
        for copy in range(3):
            Image.new("L", (12, 8), int(name)).save(root / "val" / name / f"{copy}.png")
    config = {"type": "ImageFolder", "data_root": str(root), "split": "val", "transform": TRANSFORM}
    assert len(DATASETS.build({"type": "RepeatDataset", "dataset": config, "times": 3})) == 27
    joined = DATASETS.build({"type": "ConcatDataset", "datasets": [config, ImageFolder(str(root), "val", TRANSFORM)]})
    assert len(joined) == 18 and joined.metainfo["classes"] == ("2", "9", "10")
    assert torch.equal(joined[17]["inputs"], joined[8]["inputs"])
    # Class 10 has 1 of 9 images: below the threshold of 4 in 9, so it is seen twice.
    balanced = DATASETS.build({"type": "ClassBalancedDataset", "dataset": config, "oversample_thr": 4 / 9})
    counts = [sum(balanced[i]["targets"] == label for i in range(len(balanced))) for label in range(3)]
    assert counts == [4, 4, 2]
    assert balanced.get_cat_ids(0) == [0]
    assert [x["targets"] for x in ImageFolder(str(root), "val", TRANSFORM).get_subset([0, 8])] == [0, 2]


def test_missing_split_and_missing_class(root: Path) -> None:
    # timm would take the parent folder, whose classes are those of all splits together.
    with pytest.raises(UserError, match="train does not exist"):
        ImageFolder(str(root), "train", TRANSFORM)
    with pytest.raises(UserError, match="has 3 classes, expected num_classes=4"):
        ImageFolder(str(root), "val", TRANSFORM, num_classes=4)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])


@pytest.mark.parametrize("how", ["truncated", "empty"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_unreadable_image_is_named(root: Path, suffix: str, how: str) -> None:
    path = root / "val" / "9" / f"damaged.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    damage(path, how)
    dataset = ImageFolder(str(root), "val", TRANSFORM)
    index = dataset.reader.filenames(absolute=True).index(str(path))
    with pytest.raises(UserError, match=rf"cannot read image .*damaged\.{suffix}"):
        dataset[index]


def test_zeroed_bytes_never_raise_anything_else(root: Path) -> None:
    # Where the damage does not show, the image is used; else the error must be ours.
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for suffix in FORMATS:
        path = root / "val" / "9" / f"damaged.{suffix}"
        Image.fromarray(noise).save(path)
        damage(path, "zeroed")
    dataset = ImageFolder(str(root), "val", TRANSFORM, skip_unreadable=True)
    samples = [dataset[i] for i in range(len(dataset))]
    assert len([s for s in samples if s is not None]) >= 3


def test_skipped_images_are_logged_and_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("backbones.mm.data.datasets.print_log", lambda message, logger, level: logged.append(message))
    (root / "val" / "9" / "b.png").write_bytes(b"not an image")
    dataset = ImageFolder(str(root), "val", TRANSFORM, skip_unreadable=True)
    samples = [dataset[i] for i in range(len(dataset))]
    assert sum(sample is None for sample in samples) == 1
    assert collate_images(samples)["targets"].tolist() == [0, 1, 2]
    assert len(logged) == 1
    assert str(root / "val" / "9" / "b.png") in logged[0]
    with pytest.raises(UserError, match="all 2 images of a batch are unreadable"):
        collate_images([None, None])


def test_loader_stops_or_skips(root: Path) -> None:
    (root / "val" / "9" / "b.png").write_bytes(b"not an image")

    def batches(skip: bool) -> list[Any]:
        dataset = {"type": "ImageFolder", "data_root": str(root), "split": "val", "transform": TRANSFORM}
        loader = {
            "batch_size": 2,
            "num_workers": 1,
            "dataset": {**dataset, "skip_unreadable": skip},
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "collate_images"},
        }
        return list(Runner.build_dataloader(loader, seed=0))

    with pytest.raises(UserError, match=r"b\.png"):
        batches(skip=False)
    assert [len(batch["targets"]) for batch in batches(skip=True)] == [2, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_changes_between_epochs_and_repeats_with_the_seed(root: Path, workers: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "val" / "9" / "c.png")
    transform = {"input_size": 8, "is_training": True, "color_jitter": None}
    loader = Runner.build_dataloader(
        {
            "batch_size": 4,
            "num_workers": workers,
            "dataset": {
                "type": "ImageFolder",
                "data_root": str(root),
                "split": "val",
                "transform": transform,
            },
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "collate_images"},
            "worker_init_fn": {"type": "keep_worker_seed"},
        },
        seed=0,
    )

    def epoch(seed: int | None) -> torch.Tensor:
        if seed is not None:
            random.seed(seed)
            torch.manual_seed(seed)
        return next(iter(loader))["inputs"]

    first, second, again = epoch(1), epoch(None), epoch(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def make_folders(root: Path, **splits: tuple[str, ...]) -> dict[str, Any]:
    """Folders of classes, and a config that reads them."""
    for split, names in splits.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(root / split / name / "a.png")
    return {
        f"{split}_dataloader": {"dataset": {"type": "ImageFolder", "data_root": str(root), "split": split}}
        for split in splits
    }


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (("zero", "1"), r"image folder .*val has other classes than .*train: missing '0'; unknown 'zero'"),
        (("0",), "missing '1'$"),
        (("0", "1", "2", "x"), "unknown '2', 'x'$"),
    ],
)
@pytest.mark.parametrize("part", ["val", "test"])
def test_class_folders_are_compared_by_name(tmp_path: Path, part: str, val: tuple[str, ...], message: str) -> None:
    config = make_folders(tmp_path, train=("0", "1"), **{part: val})
    with pytest.raises(UserError, match=message.replace("val", part)):
        check_class_folders(config)


def test_equal_class_folders_pass_and_wrapped_ones_are_found(tmp_path: Path) -> None:
    config = make_folders(tmp_path, train=("0", "1"), val=("1", "0"), test=("0", "2"))
    check_class_folders({name: config[name] for name in ("train_dataloader", "val_dataloader")})
    wrapped = {"dataset": {"type": "RepeatDataset", "times": 2, "dataset": config["test_dataloader"]["dataset"]}}
    with pytest.raises(UserError, match="unknown '2'"):
        check_class_folders({**config, "test_dataloader": wrapped})


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "val" / "0").mkdir(parents=True)
    with pytest.raises(UserError, match="val holds no images in class folders"):
        ImageFolder(str(tmp_path), "val", TRANSFORM)


def test_classes_in_another_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"b has other classes than a: class 1 is \['z'\], not \['y'\]"):
        compare_classes(("x", "z", "y"), "b", ("x", "y", "z"), "a")
