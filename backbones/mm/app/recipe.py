"""A config for one's own images: the data are looked at, a recipe is chosen by their number and the model's size."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch

from backbones import configs
from backbones.mm.data.datasets import ArrayFolder, ImageFolder, class_folders
from backbones.mm.errors import UserError
from backbones.mm.models.dense import fetch_weights
from backbones.models import family_names
from backbones.suggest import did_you_mean

_VALIDATION = ("val", "valid", "validation")
_MANY = 10_000  # images, with which a model from random weights takes ImageNet's augmentation


@dataclass(frozen=True)
class Data:
    """Folders of images, one for each class.

    Attributes:
        root: the folder.
        train: folder of the training images within ``root``, "" for ``root`` itself.
        val: that of the validation images.
        val_share: share of each class that is held out, where both are one folder.
        classes: their number.
        images: number of training and of validation images.
        mean, std: of each channel of arrays; None for images, which are normalised as the model's weights ask for.
    """

    root: Path
    train: str
    val: str
    val_share: float | None
    classes: int
    images: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def look_at(folder: str | Path, val_share: float) -> Data:
    """Find classes and images under ``folder``.

    It holds ``train/`` and ``val/`` (or ``valid/``, ``validation/``) with a folder for each class, or ``train/`` alone,
    or the folders of the classes; without validation images, ``val_share`` of each class are held out. Images are PNG
    and JPEG, or else arrays, see :class:`backbones.mm.ArrayFolder`, whose first hundred tell mean and deviation.

    Raises:
        UserError: there is no such folder, no image in it, or a single class.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist")
    if not 0 < val_share < 1:
        raise UserError(f"--val-share: got {val_share}, expected a share between 0 and 1")
    train = "train" if (root / "train").is_dir() else ""
    val = next((name for name in _VALIDATION if train and (root / name).is_dir()), train)
    kind: type[ImageFolder] = ImageFolder if class_folders(root / train) else ArrayFolder
    found = class_folders(root / train, kind.endings())
    if not found:
        raise UserError(f"data folder {root / train} holds no images in class folders, such as CLASS/IMAGE.jpg")

    if len(found) < 2:
        raise UserError(f"data folder {root / train} holds one class, {min(found)!r}, expected at least two")
    parts: list[dict[str, Any]] = [{"split": train}, {"split": val}]
    if train == val:
        parts = [{"split": train, "subset": name, "val_share": val_share} for name in ("train", "val")]
    mean, std = _statistics(root / train) if kind is ArrayFolder else (None, None)
    transform: dict[str, Any] = {"input_size": 32, **({} if mean is None else {"mean": mean, "std": std})}
    sizes = [len(kind(str(root), transform=transform, **part)) for part in parts]
    share = val_share if train == val else None
    return Data(root, train, val, share, len(found), (sizes[0], sizes[1]), mean, std)


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of the first hundred arrays, taken in turn from the classes."""
    files = sorted(folder.rglob("*.npy"), key=lambda path: (path.name, path.parent))[:100]
    try:
        arrays = [np.load(file, allow_pickle=False) for file in files]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data folder {folder}: cannot read its arrays: {error}") from error
    if len({array.shape[2:] for array in arrays}) != 1 or arrays[0].ndim != 3:
        shapes = sorted({array.shape for array in arrays})
        raise UserError(f"data folder {folder}: got arrays of shapes {shapes}, expected (height, width, channels)")
    pixels = np.concatenate([array.reshape(-1, array.shape[2]) for array in arrays]).astype(np.float64)
    mean, std = (tuple(float(f"{x:.4g}") for x in values) for values in (pixels.mean(0), pixels.std(0)))
    return mean, tuple(x or 1.0 for x in std)


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run, chosen by :func:`choose`."""

    name: str
    parameters: int
    weights: str | None
    image_size: int
    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: int
    drop_path_rate: float
    mixup: bool
    drop_last: bool
    gray: bool


def choose(
    model: str,
    data: Data,
    weights: str | None = "published",
    image_size: int | None = None,
    epochs: int | None = None,
    gray: bool = False,
) -> Recipe:
    """A recipe for ``model`` on ``data``.

    Args:
        model: registered name of a model of this library.
        weights: see :func:`backbones.weights.sources.locate`; None are random ones.
        image_size: side of the images in pixels; None is that of the published weights.
        epochs: None follows the number of images.
        gray: feed one channel instead of three.

    Raises:
        UserError: ``model`` is unknown, there are no such weights, or a number is too small.
    """
    ours = [name for family in family_names() for name in timm.list_models(module=family)]
    if model not in ours:
        raise UserError(f"--model: unknown model {model!r}{did_you_mean(model, ours)}")
    for option, number in (("--image-size", image_size), ("--epochs", epochs)):
        if number is not None and number < 1:
            raise UserError(f"{option}: got {number}, expected at least 1")
    if gray and data.mean is not None:
        raise UserError(f"--gray: {data.root} holds arrays, whose channels are all fed")
    if weights is not None:
        try:
            fetch_weights(weights, model)
        except UserError as error:
            raise UserError(f"{error}; or train with --weights FILE or --from-scratch") from error
    with torch.device("meta"):
        parameters = sum(x.numel() for x in timm.create_model(model, num_classes=data.classes).parameters())
    cfg = cast(Any, timm.get_pretrained_cfg(model))
    train = data.images[0]
    batch = min(64 if parameters < 50e6 else 32, max(train // 8, 1))
    if weights is not None:
        epochs = epochs or _within(100_000 // train, 10, 50)
        lr = 1e-4 * math.sqrt(batch / 64)
    else:
        epochs = epochs or _within(3_000_000 // train, 100, 300)
        lr = 1e-3 * math.sqrt(batch / 1024)
    return Recipe(
        name=model,
        parameters=parameters,
        weights=weights,
        image_size=image_size or cfg.input_size[-1],
        epochs=epochs,
        batch_size=batch,
        lr=float(f"{lr:.1e}"),
        warmup_epochs=min(_within(epochs // 10, 1, 20), epochs - 1),
        drop_path_rate=0.0 if parameters < 15e6 else 0.1 if parameters < 40e6 else 0.2,
        mixup=weights is None and train >= _MANY,
        drop_last=train >= 2 * batch,
        gray=gray,
    )


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(value, most))


def describe(recipe: Recipe, data: Data) -> str:
    """Two lines that say what was found and chosen."""
    how = "from random weights" if recipe.weights is None else f"fine-tuned from {recipe.weights} weights"
    if recipe.weights not in (None, "published"):
        how = f"fine-tuned from {recipe.weights}"
    train, val = (f"{n:,}" for n in data.images)
    held = "" if data.val_share is None else " held out of them"
    epochs = "epoch" if recipe.epochs == 1 else "epochs"
    return (
        f"{data.root}: {data.classes} classes, {train} training and {val} validation images{held}\n"
        f"{recipe.name}: {recipe.parameters / 1e6:.1f} M parameters, {how}, {recipe.epochs} {epochs} of "
        f"{recipe.image_size} x {recipe.image_size} pixels in batches of {recipe.batch_size}"
    )


def write(recipe: Recipe, data: Data, file: Path) -> str:
    """The recipe as a config that stands on its own, for ``file``."""
    cfg = cast(Any, timm.get_pretrained_cfg(recipe.name))
    network = [f'name="{recipe.name}"', "num_classes=num_classes"]
    if cfg.fixed_input_size and recipe.image_size != cfg.input_size[-1]:
        network.append(f"img_size={recipe.image_size}")
    if recipe.drop_path_rate:
        network.append(f"drop_path_rate={recipe.drop_path_rate}")
    mean, std = cfg.mean, cfg.std
    if data.mean is not None and data.std is not None:
        network.append(f"in_chans={len(data.mean)}")
        mean, std = data.mean, data.std
    elif recipe.gray:
        network.append("in_chans=1")
        mean, std = ((round(sum(x) / len(x), 3),) for x in (mean, std))
    for_images = [f'interpolation="{cfg.interpolation}"']
    for_training = [f'auto_augment="{"rand-m9-mstd0.5-inc1" if recipe.mixup else "rand-m5-mstd0.5-inc1"}"']
    for_training.append(f"re_prob={0.25 if recipe.mixup else 0.1}")
    if data.mean is not None:
        for_images, for_training = [], []
    share = {"train": "", "val": ""}
    if data.val_share is not None:
        share = {name: f'\n        subset="{name}",\n        val_share={data.val_share},' for name in share}
    init = ""
    if recipe.weights is not None:
        init = f'\n    init_cfg=dict(type="Pretrained", checkpoint="{recipe.weights}"),'
    loss, preprocessor = 'dict(type="LabelSmoothingCrossEntropy", smoothing=0.1)', ""
    if recipe.mixup:
        loss = 'dict(type="SoftTargetCrossEntropy")'
        preprocessor = (
            '\n    data_preprocessor=dict(\n        type="ImagePreprocessor",\n'
            "        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),\n    ),"
        )
    groups = (
        "" if recipe.weights is None else "\n    paramwise_cfg=dict(layer_decay=0.9),  # early layers learn more slowly"
    )
    chosen = _CONFIG.format(
        file=file,
        classes=data.classes,
        root=data.root.as_posix(),
        network=", ".join(network),
        loss=loss,
        init=init,
        preprocessor=preprocessor,
        size=recipe.image_size,
        mean=tuple(mean),
        std=tuple(std),
        kind="ImageFolder" if data.mean is None else "ArrayFolder",
        mode='\n        image_mode="L",' if recipe.gray else "",
        training="".join(f"\n            {x}," for x in (*for_training, *for_images)),
        reading="".join(f", {x}" for x in for_images),
        crop_pct=cfg.crop_pct,
        scale="(0.08, 1.0)" if recipe.mixup else "(0.35, 1.0)",
        batch=recipe.batch_size,
        workers=min(4, os.cpu_count() or 1),
        train=data.train,
        val=data.val,
        train_share=share["train"],
        val_share=share["val"],
        drop_last=recipe.drop_last,
        epochs=recipe.epochs,
        warmup=recipe.warmup_epochs,
        warm_up=_WARM_UP.format(warmup=recipe.warmup_epochs) if recipe.warmup_epochs else "",
        lr=recipe.lr,
        least=float(f"{recipe.lr / 100:.1e}"),
        groups=groups,
        topk="(1, 5)" if data.classes > 5 else "(1,)",
    )
    # Its text and not its name: the config stands on its own.
    runtime = configs.folder() / "_base_" / "default_runtime.py"
    return f"{chosen}\n{runtime.read_text(encoding='utf-8')}"


_WARM_UP = """    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end={warmup}, convert_to_iter_based=True),
"""
_CONFIG = """\
# Edit this file as you like, and train with it: ssm-backbones train {file}

num_classes = {classes}
data_root = "{root}"
normalisation = dict(mean={mean}, std={std})

model = dict(
    type="ImageClassifier",
    network=dict({network}),
    loss={loss},{preprocessor}{init}
)

train_dataloader = dict(
    batch_size={batch},
    num_workers={workers},
    dataset=dict(
        type="{kind}",
        data_root=data_root,
        split="{train}",{train_share}{mode}
        num_classes=num_classes,
        transform=dict(
            input_size={size},
            is_training=True,
            scale={scale},  # crops hold this share of the image
            hflip=0.5,  # 0.0 where left and right have a meaning{training}
            **normalisation,
        ),
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="collate_images"),
    worker_init_fn=dict(type="keep_worker_seed"),
    drop_last={drop_last},
)
val_dataloader = dict(
    batch_size={batch},
    num_workers={workers},
    dataset=dict(
        type="{kind}",
        data_root=data_root,
        split="{val}",{val_share}{mode}
        num_classes=num_classes,
        transform=dict(input_size={size}, crop_pct={crop_pct}{reading}, **normalisation),
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_images"),
    worker_init_fn=dict(type="keep_worker_seed"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ClassificationMetric", topk={topk})
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs={epochs}, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr={lr}, betas=(0.9, 0.999), weight_decay=0.05),{groups}
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
{warm_up}    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        begin={warmup},
        end={epochs},
        eta_min={least},
        convert_to_iter_based=True,
    ),
]
"""
