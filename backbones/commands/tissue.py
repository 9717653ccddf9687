"""Write a small real data set for binary segmentation from what scikit-image ships, without a download.

    ssm-backbones data tissue --out data/tissue

The picture is colon tissue whose epithelium is stained brown by immunohistochemistry, 512 x 512 pixels
(skimage.data.immunohistochemistry). Nobody has drawn its glands: the masks come from classical segmentation. The stains
are separated by their colours (Ruifrok and Johnston 2001), the brown one is smoothed and thresholded by Otsu's method,
and small holes and specks are removed. So a network can learn what this rule does, and Dice says how well it did.

OUT/images/{training,validation}/NNNNNN.png and OUT/annotations/{training,validation}/NNNNNN.png, 0 for the ground and 1
for epithelium. Training crops come from the upper 320 rows, validation windows from the 192 below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import color, data, filters, morphology

from backbones.commands.write_once import write_once

KINDS = ("images", "annotations")
SPLIT_ROW = 320
WINDOW = 192  # pixels; validation windows lie side by side, overlapping
WINDOW_COLUMNS = (0, 160, 320)
SMOOTHING = 5  # pixels
SMALLEST = 1000  # pixels of a speck or hole that stays


def mask_of(image: np.ndarray) -> np.ndarray:
    """Where an image (h, w, 3) of uint8 is stained brown, (h, w) of bool."""
    brown = gaussian_filter(color.rgb2hed(image)[..., 2], SMOOTHING)
    mask = brown > filters.threshold_otsu(brown)
    mask = morphology.remove_small_objects(mask, max_size=SMALLEST)
    return morphology.remove_small_holes(mask, max_size=SMALLEST)


def crops(count: int, size: int, seed: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Images and masks of each split."""
    image = data.immunohistochemistry()
    mask = mask_of(image).astype(np.uint8)
    rng = np.random.default_rng(seed)
    corners = rng.integers([0, 0], [SPLIT_ROW - size + 1, image.shape[1] - size + 1], (count, 2))
    boxes = {
        "training": [np.s_[top : top + size, left : left + size] for top, left in corners],
        "validation": [np.s_[SPLIT_ROW : SPLIT_ROW + WINDOW, left : left + WINDOW] for left in WINDOW_COLUMNS],
    }
    return {split: [(image[box], mask[box]) for box in of_split] for split, of_split in boxes.items()}


def write(out: Path, count: int, size: int, seed: int) -> bool:
    """Writes the data set; returns whether anything was written: a folder that is complete stays as it is.

    Raises:
        FileExistsError: ``out`` holds something else, or tissue made with other settings.
    """
    counts = {"training": count, "validation": len(WINDOW_COLUMNS)}
    names = [(split, f"{i:06d}.png") for split, number in counts.items() for i in range(number)]
    files = [Path(kind, split, name) for kind in KINDS for split, name in names]
    settings = {"train": count, "size": size, "seed": seed}
    return write_once(out, "tissue", settings, files, lambda folder: _write(folder, crops(count, size, seed)))


def _write(folder: Path, made: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    for split, pairs in made.items():
        for k, kind in enumerate(KINDS):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            for i, pair in enumerate(pairs):
                Image.fromarray(pair[k]).save(folder / kind / split / f"{i:06d}.png")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/tissue"), help="folder to write (default: %(default)s)")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training crops (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="their sides in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their places (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.train < 1 or not 32 <= args.size <= SPLIT_ROW or args.seed < 0:
        parser.error(f"--train is at least 1, --size 32 to {SPLIT_ROW}, --seed at least 0")
    try:
        written = write(args.out, args.train, args.size, args.seed)
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    there = "" if written else " (already there)"
    print(f"{args.out}: {args.train} training and {len(WINDOW_COLUMNS)} validation images{there}")
    return 0
