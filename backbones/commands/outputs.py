"""Whether what a tool is to write can be written, asked before any work is done."""

from __future__ import annotations

import tempfile
from pathlib import Path


def unwritable(path: Path, *suffixes: str) -> str | None:
    """Why a file of this name cannot be written, or None.

    Args:
        suffixes: what the name must end in, one of them; anything if there are none.
    """
    if suffixes and path.suffix not in suffixes:
        return f"got {path}, expected a name that ends in {' or '.join(suffixes)}"
    if path.is_dir():
        return f"got {path}, which is a folder"
    if not path.parent.is_dir():
        return f"got {path}, expected a name in a folder that exists"
    return unwritable_folder(path.parent)


def unwritable_folder(folder: Path) -> str | None:
    """Why nothing can be written into ``folder``, which may have to be made, or None; nothing is made here."""
    try:
        with tempfile.TemporaryFile(dir=next(x for x in (folder, *folder.absolute().parents) if x.exists())):
            return None
    except OSError as error:
        return f"nothing can be written to {folder}: {error.strerror}"
