"""Folders of images for training runs that only have to be short: a class is a grey level with noise."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(
    root: Path, splits: Mapping[str, int], classes: int, side: int = 16, noise: int = 60, step: int = 60
) -> None:
    """Writes ``root/<split>/<label>/<i>.png``, always the same.

    Args:
        root: folder, which need not exist.
        splits: images of each class, by split.
        classes: number of classes.
        side: pixels of a side.
        noise: range of grey levels within a class.
        step: from the darkest of a class to that of the next.
    """
    rng = np.random.default_rng(0)
    for split, images in splits.items():
        for label in range(classes):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(images):
                pixels = (rng.integers(0, noise, (side, side)) + step * label).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / str(label) / f"{i}.png")
