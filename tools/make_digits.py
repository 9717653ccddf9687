#!/usr/bin/env python
"""Write scikit-learn's 1,797 scanned handwritten digits as an image folder, without a download.

    python tools/make_digits.py --out data/digits

OUT/train/<digit>/NNNN.png and OUT/val/<digit>/NNNN.png, greyscale; NNNN is the scan's place in the data set.
Every fifth scan of a digit is held out, 359 in all. The scans are 8 x 8 with 17 grey levels: the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
NATIVE_SIZE = 8
MARKER = "digits.json"


def image_paths(labels: np.ndarray) -> list[Path]:
    """Where each scan belongs, relative to the output folder; every fifth of a class goes to ``val``."""
    seen = np.zeros(10, dtype=int)
    paths = []
    for index, label in enumerate(labels.tolist()):
        split = "val" if seen[label] % 5 == 2 else "train"
        seen[label] += 1
        paths.append(Path(split, str(label), f"{index:04d}.png"))
    return paths


def write_digits(out: Path, size: int, resample: str) -> bool:
    """Write the image folder ``out``; nothing happens if it is already complete.

    Args:
        size: height and width of the images in pixels.
        resample: "nearest" or "bicubic".

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: ``out`` holds something else, or digits made with other settings.
    """
    digits = load_digits()
    paths = image_paths(digits.target)
    settings = {"size": size, "resample": resample, "images": len(paths)}
    marker = out / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found != settings:
            raise FileExistsError(
                f"{out} holds digits made with {found}, not {settings}; remove it or choose another --out"
            )
        if all((out / path).is_file() for path in paths):
            return False
        folder = out
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and was not made by this script; choose another --out")
    else:
        # The folder gets its name when it is complete, so an interrupted run leaves no half data set.
        folder = out.with_name(out.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
    for path, pixels in zip(paths, digits.images, strict=True):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        scan = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        scan.resize((size, size), RESAMPLING[resample]).save(target)
    (folder / MARKER).write_text(json.dumps(settings) + "\n")
    if folder != out:
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="folder to write (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--resample", choices=sorted(RESAMPLING), default="bicubic", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.size < NATIVE_SIZE:
        parser.error(f"--size is {args.size}, expected at least {NATIVE_SIZE}, the size of the scans")
    try:
        written = write_digits(args.out, args.size, args.resample)
    except FileExistsError as error:
        print(f"make_digits.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: 1438 training and 359 validation images{'' if written else ' (already there)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
