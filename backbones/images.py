"""How every tool and data set reads an image, upright and with all of its grey levels, and how pictures are written."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Exceptions that Pillow raises for damaged files; OSError covers UnidentifiedImageError."""

PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
"""What the name of a picture that is written may end in; the end decides on the format."""

# Text stays text: TrueType fonts in a PDF, where matplotlib would draw outlines of type 3, and letters in an SVG. Names
# inside an SVG are drawn from a salt, not from the clock.
_TEXT_AS_TEXT: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "ssm-backbones"}
# Neither dates nor versions: the same figure gives the same file.
_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": "ssm-backbones"},
    ".pdf": {"Creator": "ssm-backbones", "Producer": "matplotlib", "CreationDate": None},
    ".svg": {"Creator": "ssm-backbones", "Date": None},
}
_PRINT_DPI = 300  # of the photographs and maps inside a PDF or SVG

_ORIENTATION = 0x0112
_DEEP = ("I", "F")  # modes that hold more than 8 bits; a caller who asks for one gets it


def read_image(file: str | Path | IO[bytes], mode: str = "RGB") -> Image.Image:
    """The image, turned as its EXIF orientation says, in the Pillow mode ``mode``.

    16-bit grey levels are scaled to 8 bits, which Pillow would clip. Transparency is dropped, as OpenCV does.

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: see :data:`UNREADABLE`.
    """
    with Image.open(file) as stored:
        stored.load()
        turn = _TURNS.get(_orientation(stored))
        image: Image.Image = stored if turn is None else stored.transpose(turn)
        if image.mode.startswith(_DEEP) and not mode.startswith(_DEEP):
            image = _to_8_bits(image)
        if "transparency" in image.info:  # Pillow warns where it drops that of a palette
            image = image.convert("RGBA")
        return image.convert(mode)


def write_picture(figure: Any, path: str | Path, dpi: int = 110) -> None:
    """Write a figure of matplotlib's to ``path``, which appears when it is complete.

    The end of the name decides on the format, see :data:`PICTURE_SUFFIXES`. In PDF and SVG lines stay lines and text
    stays text, and photographs have 300 pixels per inch. The same figure always gives the same file.

    Args:
        dpi: pixels per inch of a PNG.

    Raises:
        ValueError: the name has another end.
        OSError: it cannot be written; nothing is left of it, and what was there before stays.
    """
    import matplotlib

    path = Path(path)
    if path.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"path: got {path}, expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    partial = path.with_name(f".partial-{path.name}")
    try:
        with matplotlib.rc_context(_TEXT_AS_TEXT):
            figure.savefig(
                partial,
                dpi=dpi if path.suffix == ".png" else _PRINT_DPI,
                format=path.suffix[1:],
                metadata=_METADATA[path.suffix],
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def image_size(file: str | Path) -> tuple[int, int]:
    """Width and height of the upright image, from the file's header.

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: see :data:`UNREADABLE`.
    """
    with Image.open(file) as image:
        width, height = image.size
        # Pillow states the upright size of a TIFF file, and turns it when it loads the pixels.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    try:
        # Not the method of PNG files, which reads all pixels in search of a block that stands behind them.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except (SyntaxError, TypeError, ValueError, struct.error):
        return 1  # a damaged EXIF block says nothing; the pixels are whole


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} from {values.min()} to {values.max()}, expected 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
