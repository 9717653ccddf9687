"""Write small real data sets from what scikit-learn ships, without a download.

    ssm-backbones data digits --out data/digits
    ssm-backbones data digits --task detection --out data/digits_coco
    ssm-backbones data digits --task segmentation --out data/digits_ade

The 1,797 handwritten digits are scans of 8 x 8 pixels with 17 grey levels: the test part of "Optical Recognition of
Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998). Every fifth scan of a digit is held
out for validation, 359 in all.

classification: OUT/{train,val}/<digit>/NNNN.png, greyscale; NNNN is the scan's place in the data set.

detection: COCO's layout, OUT/{train,val}/NNNNNN.jpg and OUT/annotations/instances_{train,val}.json. Up to five digits,
scaled and turned, lie side by side on a crop of one of scikit-learn's two photographs; some crops stay empty. Boxes
are tight, and polygons give exactly the pasted pixels.

segmentation: ADE20K's layout, OUT/images/{training,validation}/NNNNNN.jpg and OUT/annotations/.../NNNNNN.png of scenes
with up to four light digits of much the same size. Label 0 is unlabelled (the rim where digit and photograph mix), 1
the photograph, 2 to 11 the digits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from contourpy import contour_generator
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from backbones.commands.write_once import write_once

RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
NATIVE_SIZE = 8
SPLITS = ("train", "val")
LARGEST = 4096  # pixels: a scene of this side is 200 MB in float32
MOST_SCENES = 999_999  # names have six digits
DEFAULT_SIZES = {"classification": 32, "detection": 96, "segmentation": 64}
ADE_SPLITS = {"train": "training", "val": "validation"}

# Crops for training come from the left of a photograph, those for validation from the right.
SPLIT_COLUMN = 448
CROPS = (96, 192)
EMPTY_SHARE = 0.05
EDGE_GAIN = 3  # sharpens the edges of enlarged scans


class Style(NamedTuple):
    """How digits look in a scene."""

    max_digits: int
    scales: tuple[float, float]  # height of a framed scan over the height of the image
    max_turn: float  # degrees; a 6 stays a 6
    gain: tuple[float, float]  # brightness of the photograph
    light: bool  # light digits only, else dark ones on light ground


DETECTION = Style(5, (0.28, 0.55), 30, (0.7, 1.2), light=False)
# A segmentor must tell digits apart pixel by pixel: digits alike in size and ink train within minutes on a CPU.
SEGMENTATION = Style(4, (0.5, 0.6), 8, (0.2, 0.5), light=True)


class Scene(NamedTuple):
    """An image (h, w, 3) with its digits: their labels (n,), masks (n, h, w), and the rim (h, w) of all."""

    image: np.ndarray
    labels: list[int]
    masks: np.ndarray
    rim: np.ndarray


def image_paths(labels: np.ndarray) -> list[Path]:
    """Where each scan belongs, relative to the output folder; every fifth of a class goes to ``val``."""
    seen = np.zeros(10, dtype=int)
    paths = []
    for index, label in enumerate(labels.tolist()):
        split = "val" if seen[label] % 5 == 2 else "train"
        seen[label] += 1
        paths.append(Path(split, str(label), f"{index:04d}.png"))
    return paths


def scenes(split: str, count: int, size: int, seed: int, style: Style) -> Iterator[Scene]:
    """``count`` scenes of ``size`` x ``size`` pixels from the digits and the photographs' parts of ``split``."""
    digits = load_digits()
    own = [i for i, path in enumerate(image_paths(digits.target)) if path.parts[0] == split]
    columns = slice(SPLIT_COLUMN) if split == "train" else slice(SPLIT_COLUMN, None)
    photographs = [photograph[:, columns] for photograph in load_sample_images().images]
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for _ in range(count):
        number = 0 if rng.random() < EMPTY_SHARE else rng.integers(1, style.max_digits + 1)
        chosen = rng.choice(own, number)
        background = _crop(photographs[rng.integers(len(photographs))], size, rng, style)
        yield _compose(background, digits.images[chosen] / 16, digits.target[chosen].tolist(), rng, style)


def outline(mask: np.ndarray) -> list[list[float]]:
    """Polygons of the connected parts of ``mask`` (h, w), as COCO lists them: x, y, x, y, ... from the pixels' corners.

    A hole is joined to its outline by a bridge of no width, so that even-odd filling leaves it out.
    """
    generator = contour_generator(z=np.pad(mask, 1).astype(float), fill_type="OuterOffset")
    polygons = []
    for points, offsets in zip(*generator.filled(0.5, np.inf), strict=True):
        outer, *holes = (points[start:end] for start, end in pairwise(offsets))
        rings = [outer, *(part for hole in holes for part in (hole, outer[:1]))]
        # Contours run through pixel centres, which stand at (0.5, 0.5) in an image, at (1, 1) after padding.
        polygons.append((np.concatenate(rings) - 0.5).ravel().tolist())
    return polygons


def write_classification(folder: Path, settings: dict[str, Any]) -> None:
    """Write the image folder of all scans."""
    digits = load_digits()
    for path, pixels in zip(image_paths(digits.target), digits.images, strict=True):
        scan = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        _save(scan.resize((settings["size"],) * 2, RESAMPLING[settings["resample"]]), folder / path)


def write_detection(folder: Path, settings: dict[str, Any]) -> None:
    """Write scenes in COCO's layout; category ids are 1 to 10."""
    size = settings["size"]
    for split in SPLITS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, scene in enumerate(scenes(split, settings[split], size, settings["seed"], DETECTION)):
            name = f"{index:06d}.jpg"
            _save(Image.fromarray(scene.image), folder / split / name)
            images.append({"id": index, "file_name": name, "width": size, "height": size})
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                left, top, right, bottom = map(int, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
                annotation: dict[str, Any] = {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "iscrowd": 0,
                }
                annotation |= {"bbox": [left, top, right - left, bottom - top], "area": int(mask.sum())}
                annotations.append(annotation | {"segmentation": outline(mask)})
        categories = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
        target = folder / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_segmentation(folder: Path, settings: dict[str, Any]) -> None:
    """Write scenes in ADE20K's layout."""
    for split, name in ADE_SPLITS.items():
        for index, scene in enumerate(scenes(split, settings[split], settings["size"], settings["seed"], SEGMENTATION)):
            labels = np.ones(scene.rim.shape, np.uint8)
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                labels[mask] = 2 + label
            labels[scene.rim] = 0
            _save(Image.fromarray(scene.image), folder / "images" / name / f"{index:06d}.jpg")
            _save(Image.fromarray(labels), folder / "annotations" / name / f"{index:06d}.png")


def expected_files(task: str, settings: dict[str, Any]) -> list[Path]:
    """Every file of a data set, relative to its folder."""
    if task == "classification":
        return image_paths(load_digits().target)
    names = [(split, f"{index:06d}") for split in SPLITS for index in range(settings[split])]
    if task == "detection":
        lists = [Path("annotations", f"instances_{split}.json") for split in SPLITS]
        return [*lists, *(Path(split, f"{name}.jpg") for split, name in names)]
    folders = (("images", "jpg"), ("annotations", "png"))
    return [Path(kind, ADE_SPLITS[split], f"{name}.{end}") for kind, end in folders for split, name in names]


WRITERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "classification": write_classification,
    "detection": write_detection,
    "segmentation": write_segmentation,
}


def write_digits(out: Path, task: str, settings: dict[str, Any]) -> bool:
    """Write the data set ``out``; nothing happens if it is already complete.

    Args:
        settings: ``size`` of the images in pixels; for classification ``resample``, "nearest" or "bicubic", else
            the numbers of scenes ``train`` and ``val`` and their ``seed``.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: ``out`` holds something else, or digits made with other settings.
    """
    files = expected_files(task, settings)
    made_with = settings | ({"images": len(files)} if task == "classification" else {"task": task})
    return write_once(out, "digits", made_with, files, lambda folder: WRITERS[task](folder, settings))


def _crop(photograph: np.ndarray, size: int, rng: np.random.Generator, style: Style) -> np.ndarray:
    side = int(rng.integers(CROPS[0], CROPS[1] + 1))
    top, left = (int(rng.integers(extent - side + 1)) for extent in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    image = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    image = image[:, ::-1] if rng.random() < 0.5 else image
    return image * rng.uniform(*style.gain)


def _compose(
    image: np.ndarray, scans: np.ndarray, labels: Sequence[int], rng: np.random.Generator, style: Style
) -> Scene:
    """Blend ``scans`` (n, 8, 8) in 0..1 side by side into ``image`` (h, w, 3); what finds no place stays out."""
    size = len(image)
    image = image.copy()
    pasted, masks, ink = [], [], np.zeros((size, size), np.float32)
    for scan, label in zip(scans, labels, strict=True):
        height = round(size * rng.uniform(*style.scales))
        framed = Image.fromarray(np.pad(scan, 1).astype(np.float32))  # scans reach their border
        enlarged = framed.resize((height, height), Image.Resampling.BICUBIC)
        turned = enlarged.rotate(rng.uniform(-style.max_turn, style.max_turn), Image.Resampling.BICUBIC, expand=True)
        opacity = np.clip((np.asarray(turned) - 0.5) * EDGE_GAIN + 0.5, 0, 1)
        rows, columns = (np.flatnonzero((opacity > 0).any(axis)) for axis in (1, 0))
        opacity = opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        for _ in range(20):
            top, left = (int(rng.integers(size - extent + 1)) for extent in opacity.shape)
            window = np.s_[top : top + opacity.shape[0], left : left + opacity.shape[1]]
            if not (ink[window] > 0).any():
                break
        else:
            continue
        # In any hue.
        dark = not style.light and image[window].mean() > 110
        color = rng.uniform(0, 70, 3) if dark else rng.uniform(185, 255, 3)
        image[window] += opacity[..., None] * (color - image[window])
        ink[window] = opacity
        mask = np.zeros((size, size), bool)
        mask[window] = opacity >= 0.5
        pasted.append(label)
        masks.append(mask)
    pixels = np.clip(np.round(image), 0, 255).astype(np.uint8)
    rim = (ink > 0.2) & (ink < 0.8)
    return Scene(pixels, pasted, np.stack(masks) if masks else np.zeros((0, size, size), bool), rim)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)  # PNG has no use for it


def _refuse(parser: argparse.ArgumentParser, reason: str) -> NoReturn:
    """End in one line, without the usage."""
    parser.exit(2, f"{parser.prog}: error: {reason}\n")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=sorted(WRITERS), default="classification", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/digits, digits_coco or digits_ade)")
    parser.add_argument(
        "--size", type=int, help="height and width in pixels (default: 32; detection: 96, segmentation: 64)"
    )
    parser.add_argument("--resample", choices=sorted(RESAMPLING), help="of single digits (default: bicubic)")
    parser.add_argument("--train", type=int, metavar="N", help="training scenes (default: 1500; segmentation: 2500)")
    parser.add_argument("--val", type=int, metavar="N", help="validation scenes (default: 200)")
    parser.add_argument("--seed", type=int, help="of the scenes (default: 0)")
    args = parser.parse_args(argv)

    single = args.task == "classification"
    defaults = (
        {"resample": "bicubic"}
        if single
        else {"train": 2500 if args.task == "segmentation" else 1500, "val": 200, "seed": 0}
    )
    for name in {"resample", "train", "val", "seed"} - defaults.keys():
        if getattr(args, name) is not None:
            _refuse(parser, f"--{name} has no meaning for --task {args.task}")
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    size = args.size if args.size is not None else DEFAULT_SIZES[args.task]
    smallest = NATIVE_SIZE if single else 64
    if not smallest <= size <= LARGEST:
        _refuse(parser, f"--size is {size}, expected {smallest} to {LARGEST}")
    settings: dict[str, Any] = {"size": size, **defaults, **given}
    if not all(1 <= settings.get(name, 1) <= MOST_SCENES for name in SPLITS) or settings.get("seed", 0) < 0:
        _refuse(parser, f"--train and --val are at least 1 and at most {MOST_SCENES}, --seed at least 0")
    folders = {"classification": "digits", "detection": "digits_coco", "segmentation": "digits_ade"}
    out = args.out or Path("data", folders[args.task])
    try:
        written = write_digits(out, args.task, settings)
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    train, val = (1438, 359) if single else (settings["train"], settings["val"])
    print(f"{out}: {train} training and {val} validation images{'' if written else ' (already there)'}")
    return 0
