"""Data sets that tools make: written once, whole, and not over anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def write_once(
    out: Path, name: str, settings: dict[str, Any], files: Iterable[Path], write: Callable[[Path], None]
) -> bool:
    """Write the data set ``out``; nothing happens if it is already complete.

    Args:
        out: its folder.
        name: what it is called in messages; ``<name>.json`` in the folder holds the settings.
        settings: what it is made with.
        files: all of its files, relative to the folder.
        write: called with a folder, writes them there.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: ``out`` holds something else, or the data set made with other settings.
    """
    marker = f"{name}.json"
    if (out / marker).is_file():
        found = json.loads((out / marker).read_text())
        if found != settings:
            raise FileExistsError(
                f"{out} holds {name} made with {found}, not {settings}; remove it or choose another --out"
            )
        if all((out / path).is_file() for path in files):
            return False
        folder = out
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and was not made by this script; choose another --out")
    else:
        # The folder gets its name when it is complete, so an interrupted run leaves no half data set.
        folder = out.with_name(out.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
    write(folder)
    (folder / marker).write_text(json.dumps(settings) + "\n")
    if folder != out:
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return True
