"""Image folders, read with timm's readers and transforms, for mmengine's data loaders."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from backbones.images import UNREADABLE, read_image
from backbones.mm.errors import UserError


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """``data_root/split/<class>/<image>``, PNG and JPEG; labels are the positions of the sorted class names.

    Args:
        data_root: the folder that holds the splits.
        split: the split's folder name, or ``""`` when ``data_root`` holds the classes itself.
        transform: settings of ``timm.data.create_transform`` (``input_size``, ``is_training``, ...).
        num_classes: how many class folders there must be, if given.
        skip_unreadable: log damaged images and leave them out of their batch, instead of stopping.
        image_mode: Pillow mode to which images are converted.
        per_class: take the first images of each class alone, so many, to train with few labels.
        subset: "train" or "val" of a folder that is not divided itself: of each class, in the order of names, images at
            even distances are held out for "val". None takes all.
        val_share: share that is held out.
        views: for test-time augmentation, ``dict(scale=, flip=)`` of each view of an image: how much larger it is shown
            than by ``transform``, and None, "horizontal" or "vertical".

    It follows mmengine's protocol, so that ``ClassBalancedDataset``, ``RepeatDataset`` and ``ConcatDataset`` wrap it.
    Items are ``dict(inputs=(channels, height, width) float tensor, targets=int)``, None for a skipped image; with
    ``views``, both are lists of one for each.

    Raises:
        UserError: a folder that is missing or has other classes than expected; an unreadable image.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        transform: dict[str, Any],
        num_classes: int | None = None,
        skip_unreadable: bool = False,
        image_mode: str = "RGB",
        per_class: int | None = None,
        subset: str | None = None,
        val_share: float = 0.2,
        views: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        if subset not in (None, "train", "val"):
            raise UserError(f"subset: got {subset!r}, expected 'train' or 'val', or None for all images")
        if not 0 < val_share < 1:
            raise UserError(f"val_share: got {val_share}, expected a share between 0 and 1")
        if per_class is not None and per_class < 1:
            raise UserError(f"per_class: got {per_class}, expected at least 1 image of each class, or None for all")
        folder = Path(data_root, split)
        if not folder.is_dir():
            raise UserError(f"image folder {folder} does not exist")
        if not class_folders(folder, self.endings()):
            raise UserError(f"image folder {folder} holds no {self.what} in class folders")
        # Only timm's reader is used: its ImageDataset replaces an unreadable image by its neighbour.
        self.reader = ReaderImageFolder(str(folder), input_key=";".join(sorted(self.endings())))
        classes = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.__getitem__)
        if num_classes is not None and len(classes) != num_classes:
            raise UserError(f"image folder {folder} has {len(classes)} classes, expected num_classes={num_classes}")
        self.transform = self.make_transform(transform)
        self.views = None if views is None else [self._view(transform, **view) for view in views]
        self.skip_unreadable = skip_unreadable
        self.image_mode, self.per_class = image_mode, per_class
        self.subset, self.val_share = subset, val_share
        super().__init__(metainfo={"classes": tuple(classes)})

    what: ClassVar[str] = "images"

    @classmethod
    def endings(cls) -> set[str]:
        """Of the names of the files that it reads."""
        return set(get_img_extensions())

    @classmethod
    def make_transform(cls, settings: dict[str, Any]) -> Callable[[Any], Tensor]:
        """From what `read` gives to a tensor."""
        transform: Any = create_transform(**settings)
        for step in getattr(transform, "transforms", ()):
            for op in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
                if op.aug_fn is auto_augment.posterize:
                    op.aug_fn = _posterize
        return transform

    def read(self, path: str) -> Any:
        """The image of a file."""
        return read_image(path, self.image_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Path and label of every image, or of the first of each class."""
        seen: Counter[int] = Counter()
        taken: Counter[int] = Counter()
        found = []
        for path, label in self.reader.samples:
            seen[label] += 1
            if self.subset is not None and self._is_held_out(seen[label]) != (self.subset == "val"):
                continue
            taken[label] += 1
            if self.per_class is None or taken[label] <= self.per_class:
                found.append({"img_path": str(path), "gt_label": int(label)})
        if not found:
            share = self.val_share
            raise UserError(
                f"image folder {self.reader.root} has no image for subset={self.subset!r} with val_share={share}"
            )
        return found

    def _is_held_out(self, place: int) -> bool:
        """Whether the image at this place of its class, counted from 1, is one for validation."""
        before, here = (math.floor(round(n * self.val_share, 6)) for n in (place - 1, place))
        return here > before

    def get_cat_ids(self, idx: int) -> list[int]:
        """The label of image ``idx``, in a list."""
        return [self.get_data_info(idx)["gt_label"]]

    def __getitem__(self, idx: int) -> dict[str, Any] | None:
        info = self.get_data_info(idx)
        path, target = info["img_path"], info["gt_label"]
        try:
            image = self.read(path)
        except UNREADABLE as error:
            message = f"cannot read image {path}: {error}"
            if not self.skip_unreadable:
                raise UserError(f"{message}; skip_unreadable=True leaves such images out") from error
            print_log(f"{message}; left out", logger="current", level=logging.WARNING)
            return None
        if self.views is None:
            return {"inputs": self.transform(image), "targets": target}
        inputs = [transform(image).flip(axes) for transform, axes in self.views]
        return {"inputs": inputs, "targets": [target] * len(inputs)}

    @classmethod
    def _view(
        cls, transform: dict[str, Any], scale: float = 1.0, flip: str | None = None
    ) -> tuple[Callable[[Any], Tensor], tuple[int, ...]]:
        """The transform of one view, and the axes along which it is mirrored."""
        crop = transform.get("crop_pct") or DEFAULT_CROP_PCT
        if transform.get("is_training") or not scale >= crop - 1e-6:
            raise UserError(f"views: got scale={scale}, expected at least the transform's crop_pct, of a test")
        axes = {None: (), "horizontal": (-1,), "vertical": (-2,)}
        if flip not in axes:
            raise UserError(f"views: got flip={flip!r}, expected None, 'horizontal' or 'vertical'")
        return cls.make_transform({**transform, "crop_pct": min(crop / scale, 1.0)}), axes[flip]


@DATASETS.register_module()
class ArrayFolder(ImageFolder):
    """``data_root/split/<class>/<array>.npy``, for images that are no RGB: arrays (height, width, channels), as of
    multispectral sensors.

    Args:
        transform: ``input_size``; ``mean`` and ``std`` of each channel, in the units of the arrays; ``is_training`` for
            random crops of a share of the area within ``scale``, and of proportions within ``ratio``, flipped with the
            probabilities ``hflip`` and ``vflip``. Otherwise the middle is taken, ``crop_pct`` of the short side.

    All others are as of :class:`ImageFolder`; ``image_mode`` says nothing. The network needs as many ``in_chans``.
    """

    what = "arrays (.npy)"

    @classmethod
    def endings(cls) -> set[str]:
        return {".npy"}

    @classmethod
    def make_transform(cls, settings: dict[str, Any]) -> Callable[[Any], Tensor]:
        try:
            return _array_transform(**settings)
        except TypeError as error:
            raise UserError(f"transform: {error}") from None

    def read(self, path: str) -> Tensor:
        """(channels, height, width) in float32."""
        try:
            array = np.load(path, allow_pickle=False)
        except EOFError as error:
            raise ValueError(str(error)) from error
        channels = len(self.transform_mean)
        if array.ndim != 3 or array.shape[2] != channels:
            raise ValueError(f"an array of shape {array.shape}, expected (height, width, {channels})")
        return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)

    @property
    def transform_mean(self) -> Sequence[float]:
        """Of each channel."""
        normalise: Any = cast(v2.Compose, self.transform).transforms[-1]
        return normalise.mean


def _posterize(image: Image.Image, bits: int, **fill: Any) -> Image.Image:
    """timm's, also for no bits at all, which the strongest level of RandAugment keeps and Pillow refuses since 13."""
    return auto_augment.posterize(image, bits, **fill) if bits >= 1 else image.point(lambda _: 0)


def _array_transform(
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    is_training: bool = False,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    crop_pct: float = 0.875,
) -> v2.Compose:
    if len(mean) != len(std):
        raise UserError(f"transform: got {len(mean)} means and {len(std)} deviations, expected one of each channel")
    size = [input_size, input_size]
    steps: list[nn.Module] = [v2.Resize(math.floor(input_size / crop_pct), antialias=True), v2.CenterCrop(size)]
    if is_training:
        crop = v2.RandomResizedCrop(size, tuple(scale), tuple(ratio), antialias=True)
        steps = [crop, v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)]
    return v2.Compose([*steps, v2.Normalize(list(mean), list(std))])


_KINDS = {"ImageFolder": ImageFolder, "ArrayFolder": ArrayFolder}


def class_folders(folder: Path, endings: Collection[str] | None = None) -> set[str]:
    """Names of the classes that :class:`ImageFolder` finds: the folders that hold images, however deep.

    Args:
        endings: of the names of other files than images.
    """
    endings = ImageFolder.endings() if endings is None else endings
    return {
        Path(root).name if Path(root) != folder else ""
        for root, _, files in os.walk(folder, followlinks=True)
        if any(os.path.splitext(file)[1].lower() in endings for file in files)
    }


def check_class_folders(config: Any) -> None:
    """Compare by name the class folders of all image folders that a config reads and that exist.

    Labels are positions of sorted names: ``val/zero`` beside ``train/0`` would count as another class.

    Raises:
        UserError: a folder lacks classes that another has.
    """
    loaders = (config.get(f"{part}_dataloader") for part in ("train", "val", "test"))
    found = (pair for loader in loaders for pair in _image_folders(loader))
    folders = {folder: kind.endings() for folder, kind in found if folder.is_dir()}
    if not folders:
        return
    first, *others = folders
    expected = class_folders(first, folders[first]) if others else set()
    for folder in others:
        classes = class_folders(folder, folders[folder])
        compare_classes(sorted(classes), f"image folder {folder}", sorted(expected), str(first))


def compare_classes(found: Sequence[str], what: str, expected: Sequence[str], of: str) -> None:
    """Compare the names of ``what``, such as a folder, with those of ``of``.

    Raises:
        UserError: names differ, or their order.
    """
    if list(found) == list(expected):
        return
    missing = [x for x in expected if x not in set(found)]
    extra = [x for x in found if x not in set(expected)]
    parts = [f"{word} {_named(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names]
    if not parts:
        i = next(i for i, pair in enumerate(zip_longest(found, expected)) if pair[0] != pair[1])
        parts = [f"class {i} is {list(found[i : i + 1])}, not {list(expected[i : i + 1])}"]
    raise UserError(f"{what} has other classes than {of}: {'; '.join(parts)}")


def _named(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _image_folders(config: Any) -> Iterator[tuple[Path, type[ImageFolder]]]:
    if isinstance(config, dict):
        kind = _KINDS.get(str(config.get("type")))
        if kind is not None:
            yield Path(config["data_root"], config["split"]), kind
        else:
            for value in config.values():
                yield from _image_folders(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _image_folders(value)


@DATA_SAMPLERS.register_module()
class RepeatedAugmentationSampler(RepeatAugSampler):
    """Each image several times in an epoch, every time augmented anew (arXiv:1902.05509).

    An epoch keeps its length: it holds ``1 / num_repeats`` of the images, others every time. The copies of an image
    go to different processes where there are several.

    Args:
        dataset: the data set.
        num_repeats: how often an image of the epoch occurs.
        seed: of the order; the Runner gives its own.
    """

    def __init__(self, dataset: Dataset, num_repeats: int = 3, seed: int = 0) -> None:
        super().__init__(dataset, get_world_size(), get_rank(), num_repeats=num_repeats)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the images of ``epoch``, whatever has been drawn before."""
        # timm seeds the order by this alone.
        super().set_epoch(np.random.SeedSequence([self.seed, epoch]).generate_state(1).item())


@FUNCTIONS.register_module()
def collate_images(samples: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
    """Stack samples into ``dict(inputs=(b, channels, height, width), targets=(b,))``, without skipped ones.

    Raises:
        UserError: every sample was skipped.
    """
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        raise UserError(f"all {len(samples)} images of a batch are unreadable")
    return default_collate(readable)


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """Leave the seed that PyTorch gives a data loading worker, new in every epoch.

    mmengine's own ``worker_init_fn`` sets the same seed in every epoch, which repeats the augmentations.
    """
