"""One reader for all images: orientation, 16 bits, palettes, and that every tool uses it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from backbones.images import image_size, read_image

ROOT = Path(__file__).parents[1]
PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
# The stored pixels as the standard says that they are seen: row 0 is the top, left, ... of the picture.
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS[::-1].transpose(1, 0, 2),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: PIXELS[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    expected = UPRIGHT[orientation]
    assert np.array_equal(np.asarray(read_image(path)), expected)
    assert image_size(path) == expected.shape[1::-1]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_as_openmmlab_turns_them(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).resize((48, 32)).save(path, exif=exif, quality=100, subsampling=0)
    expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
    found = np.asarray(read_image(path))
    assert image_size(path) == found.shape[1::-1] == expected.shape[1::-1]
    assert np.abs(found.astype(int) - expected).max() <= 3  # two decoders


def test_damaged_exif_leaves_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0nonsense" * 3)
    assert read_image(path).size == image_size(path) == (3, 2)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tiff", np.uint16), ("tiff", np.int32)])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str, dtype: type) -> None:
    levels = np.array([[0, 255, 257, 32896, 65278, 65535]])
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(levels.astype(dtype)).save(path)
    expected = [[0, 1, 1, 128, 254, 255]]
    assert np.asarray(read_image(path))[..., 0].tolist() == expected
    assert np.asarray(read_image(path, "L")).tolist() == expected


@pytest.mark.parametrize("pixels", [np.array([[0.5, 1.0]], np.float32), np.array([[0, 70000]], np.int32)])
def test_unknown_ranges_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="expected 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    black_and_white = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    black_and_white.save(path)
    assert np.asarray(read_image(path)).tolist() == [[[0] * 3, [255] * 3]]


def test_transparency_of_a_palette_is_dropped_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(tmp_path / "a.png")
    assert np.asarray(found).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_nothing_else_opens_images() -> None:
    files = [*(ROOT / "backbones").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    opening = re.compile(r"Image(\.open|File)\(")
    users = {str(x.relative_to(ROOT)) for x in files if opening.search(x.read_text(encoding="utf-8"))}
    assert users == {"backbones/images.py", "tools/cards/pictures.py"}  # the latter compares its own pictures
