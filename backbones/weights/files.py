"""Weight files, read without running code from them: what a file is, and where in it the weights are."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.weights.rules import CheckpointError, StateDict, enumerate_names

_logger = logging.getLogger(__name__)

# Where files keep their weights, the first found wins. Averaged weights come last: the published accuracies
# of the families that store both belong to the plain ones.
WEIGHT_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema", "ema_model")
WRAPPERS = ("module.", "_orig_mod.")  # what PyTorch puts before the names of a wrapped model
_CLASSIFIER = "network."  # our own ImageClassifier and MaskedImageModelling
_PRETRAINING = "pretraining."  # what the latter trains beside the network, of no use to any model
INDEX = ".index.json"  # how the name of an index ends, which tells the files that weights are spread over
# What a download leaves behind that went wrong.
_NO_WEIGHTS = {"a web page": b"<", "a pointer of Git LFS": b"version https://git-lfs"}
# What PyTorch's reader raises on damaged bytes, found by damaging some.
_BROKEN = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, MemoryError,
    struct.error, SafetensorError,
)  # fmt: skip

# The configuration in Swin-style training states is read as a plain dict, which needs no yacs; also where timm reads
# a file, for `create_model(checkpoint_path=)`.
if hasattr(torch.serialization, "safe_globals"):  # torch 2.4 takes no pairs
    torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

Grid = tuple[int, int]
GRID = "grid_size"
"""The entry in a state dict's ``_metadata``, and in a safetensors file, for rows and columns of ``pos_embed``."""


class Weights(StateDict):
    """Names and tensors, and what a file tells about them besides.

    Attributes:
        grids: rows and columns of the position embeddings, by name, as far as the file tells.
    """

    def __init__(self, tensors: Mapping[str, Tensor], grids: Mapping[str, Grid] | None = None) -> None:
        super().__init__(tensors)
        self.grids = dict(grids or {})

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The weights that ``names`` maps new names to, under these."""
        grids = {new: self.grids[name] for new, name in names.items() if name in self.grids}
        return Weights({new: self[name] for new, name in names.items()}, grids)


class NoWeightFileError(CheckpointError, FileNotFoundError):
    """There is no weight file where one was expected."""


def read(path: str | Path, keys: Sequence[str] = WEIGHT_KEYS) -> Weights:
    """Reads the weights of a ``.safetensors`` file or of a PyTorch checkpoint, without running code from it.

    Args:
        path: the file; a training state may hold an ``argparse.Namespace``, or a configuration of yacs. Of weights that
            are spread over several files, their index.
        keys: where a training state keeps its weights, the first that exists is taken; else the file itself
            is the dict.

    Returns:
        Names and tensors on the CPU, without the prefixes of modules that wrap a model.

    Raises:
        NoWeightFileError: there is no such file.
        CheckpointError: the file is truncated, holds foreign classes, no dict of tensors, or a name twice.
    """
    return select(load(path), path, keys)


def select(
    content: Any,
    path: str | Path,
    keys: Sequence[str] = WEIGHT_KEYS,
    wrappers: Sequence[str] = (*WRAPPERS, _CLASSIFIER),
) -> Weights:
    """The weights in the content of a file, see :func:`read`; ``path`` is for messages, ``wrappers`` are peeled off."""
    key = weight_key(content, keys)
    content = content if key is None else content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected names and tensors")
    for what, entries in {
        "these are no tensors": [str(name) for name, x in content.items() if not isinstance(x, Tensor)],
        "these are no names": [f"{name!r} ({type(name).__name__})" for name in content if not isinstance(name, str)],
        "these have no values in memory": [
            f"{name} ({kind})" for name, x in content.items() if isinstance(x, Tensor) and (kind := _unusable(x))
        ],
    }.items():
        if entries:
            where = "" if key is None else f" under {key!r}"
            raise CheckpointError(f"{path}: expected names and tensors{where}, but {what}: {enumerate_names(entries)}")
    grids = grids_of(content)
    if _CLASSIFIER in wrappers:
        beside = [name for name in content if name[len(_prefix(name, WRAPPERS)) :].startswith(_PRETRAINING)]
        if beside and len(beside) < len(content):
            _logger.info("%s: of pre-training alone, left out: %s", path, ", ".join(beside))
            content = {name: x for name, x in content.items() if name not in beside}
    whole = {name: name.removeprefix(_prefix(name, wrappers)) for name in content}
    refuse_duplicates(whole, path)
    grids = {whole[name]: grid for name, grid in grids.items() if name in whole}
    return Weights({whole[name]: x for name, x in content.items()}, grids)


def refuse_duplicates(short: Mapping[str, str], path: str | Path = "the weights") -> None:
    """Raises :class:`CheckpointError` where two names in a file (keys) stand for one weight (values)."""
    first: dict[str, str] = {}
    twice = [f"{first[own]} and {name}" for name, own in short.items() if first.setdefault(own, name) != name]
    if twice:
        raise CheckpointError(f"{path}: expected every weight once, got {enumerate_names(twice)}")


def weight_key(content: Any, keys: Sequence[str] = WEIGHT_KEYS) -> str | None:
    """The entry of a training state that holds its weights; None where the content itself are the weights."""
    if not isinstance(content, Mapping):
        return None
    return next((key for key in keys if isinstance(content.get(key), Mapping)), None)


def grids_of(state_dict: Any) -> dict[str, Grid]:
    """Rows and columns of the position embeddings, by name, that a state dict of ours carries in its ``_metadata``.

    Raises:
        CheckpointError: an entry is not a pair of positive numbers.
    """
    metadata = getattr(state_dict, "_metadata", None) or {}
    entries = {f"{module}.pos_embed".lstrip("."): entry for module, entry in metadata.items()}
    return {name: grid for name, entry in entries.items() if (grid := grid_in(entry, name))}


def grid_in(metadata: Mapping[str, Any], name: str = "pos_embed") -> Grid | None:
    """Rows and columns in a module's ``_metadata``, see :func:`grids_of`; None where it does not tell."""
    grid = metadata.get(GRID)
    if grid is None or (isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)):
        return grid
    raise CheckpointError(f"{name}: its {GRID} is {grid!r}, expected rows and columns")


def load(path: str | Path, map_location: Any = "cpu") -> Any:
    """The whole content of a ``.safetensors`` file or of a PyTorch checkpoint, see :func:`read`."""
    path = Path(path)
    if not path.is_file():
        raise NoWeightFileError(f"no weight file at {path}")
    if path.name.endswith(INDEX):
        return _load_parts(path, map_location)
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    for what, mark in _NO_WEIGHTS.items():
        if start.startswith(mark):
            raise CheckpointError(f"{path}: {what}, not weights; download it again")
    if not start:
        raise CheckpointError(f"{path}: empty, not weights; download it again")
    try:
        return _load_safetensors(path) if path.suffix == ".safetensors" else _torch_load(path, map_location)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs the class {named[1]}" if named else "it is no plain pickle of tensors"
        raise CheckpointError(f"{path}: refused, {what}, and code from a weight file is never run") from error
    except _BROKEN as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: truncated or no weight file: {reason}") from error


def parts(path: Path) -> dict[str, list[str]]:
    """The files beside the index at ``path``, and the names of the weights that it expects in each.

    Raises:
        CheckpointError: this is no such index, or it points out of its folder.
    """
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {file: [name for name in where if where[name] == file] for file in dict.fromkeys(where.values())}
        outside = [file for file in files if Path(file).name != file]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no index of weights, expected a 'weight_map' of names and files") from error
    if outside:
        raise CheckpointError(f"{path}: expected files beside it, got {enumerate_names(outside)}")
    return files


def _load_parts(path: Path, map_location: Any) -> OrderedDict[str, Tensor]:
    content: OrderedDict[str, Tensor] = OrderedDict()
    for file, names in parts(path).items():
        part = load(path.with_name(file), map_location)
        if not isinstance(part, Mapping) or part.keys() != {*names}:
            given = part.keys() if isinstance(part, Mapping) else set()
            wrong = sorted(map(str, given ^ {*names}))
            raise CheckpointError(
                f"{path.with_name(file)}: other weights than {path.name} says: {enumerate_names(wrong)}"
            )
        content.update(part)
        if metadata := getattr(part, "_metadata", None):
            content._metadata = metadata  # type: ignore[attr-defined]
    return content


def _load_safetensors(path: Path) -> OrderedDict[str, Tensor]:
    with safe_open(path, "pt") as file:
        content = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        grid = re.fullmatch(r"(\d+) x (\d+)", (file.metadata() or {}).get(GRID, ""))
    if grid:
        content._metadata = {"": {GRID: (int(grid[1]), int(grid[2]))}}  # type: ignore[attr-defined]
    return content


def _torch_load(path: Path, map_location: Any) -> Any:
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=map_location, weights_only=True)
    torch.serialization.add_safe_globals([argparse.Namespace])  # torch 2.4 has no scoped form
    return torch.load(path, map_location=map_location, weights_only=True)


def _prefix(name: str, wrappers: Iterable[str]) -> str:
    prefix = ""
    while more := next((wrapper for wrapper in wrappers if name.startswith(prefix + wrapper)), ""):
        prefix += more
    return prefix


def _unusable(x: Tensor) -> str:
    if x.is_meta:
        return "meta"
    return "quantized" if x.is_quantized else str(x.layout) if x.layout is not torch.strided else ""
