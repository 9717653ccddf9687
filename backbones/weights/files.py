"""Weight files, read without running code from them: what a file is, and where in it the weights are."""

import argparse
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backbones.weights.rules import CheckpointError, StateDict, enumerate_names

# Where files keep their weights, the first found wins. Averaged weights come last: the published accuracies
# of the families that store both belong to the plain ones.
WEIGHT_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema", "ema_model")
_WRAPPERS = ("module.", "_orig_mod.", "network.")  # the last is our own ImageClassifier
# What a download leaves behind that went wrong.
_NO_WEIGHTS = {"a web page": b"<", "a pointer of Git LFS": b"version https://git-lfs"}
# What PyTorch's reader raises on damaged bytes, found by damaging some.
_BROKEN = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, MemoryError,
    struct.error, SafetensorError,
)  # fmt: skip


def read(path: str | Path, keys: Sequence[str] = WEIGHT_KEYS) -> StateDict:
    """Reads the weights of a ``.safetensors`` file or of a PyTorch checkpoint, without running code from it.

    Args:
        path: the file; a training state may hold an ``argparse.Namespace``, or a configuration of yacs.
        keys: where a training state keeps its weights, the first that exists is taken; else the file itself
            is the dict.

    Returns:
        Names and tensors on the CPU, without the prefixes of modules that wrap a model.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, holds foreign classes, or no dict of tensors.
    """
    return select(load(path), path, keys)


def select(content: Any, path: str | Path, keys: Sequence[str] = WEIGHT_KEYS) -> StateDict:
    """The weights in the content of a file, see :func:`read`; ``path`` is for messages."""
    key = weight_key(content, keys)
    content = content if key is None else content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected names and tensors")
    foreign = [str(name) for name, x in content.items() if not isinstance(x, Tensor)]
    if foreign:
        raise CheckpointError(
            f"{path}: expected names and tensors, but these are no tensors: {enumerate_names(foreign)}"
        )
    return {_unwrap(name): x for name, x in content.items()}


def weight_key(content: Any, keys: Sequence[str] = WEIGHT_KEYS) -> str | None:
    """The entry of a training state that holds its weights; None where the content itself are the weights."""
    if not isinstance(content, Mapping):
        return None
    return next((key for key in keys if isinstance(content.get(key), Mapping)), None)


def load(path: str | Path, map_location: Any = "cpu") -> Any:
    """The whole content of a ``.safetensors`` file or of a PyTorch checkpoint, see :func:`read`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    for what, mark in _NO_WEIGHTS.items():
        if start.startswith(mark):
            raise CheckpointError(f"{path}: {what}, not weights; download it again")
    if not start:
        raise CheckpointError(f"{path}: empty, not weights; download it again")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _torch_load(path, map_location)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs the class {named[1]}" if named else "it is no plain pickle of tensors"
        raise CheckpointError(f"{path}: refused, {what}, and code from a weight file is never run") from error
    except _BROKEN as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: truncated or no weight file: {reason}") from error


def _torch_load(path: Path, map_location: Any) -> Any:
    allowed: list[Any] = [argparse.Namespace]
    if hasattr(torch.serialization, "safe_globals"):
        # The configuration in Swin-style training states; as a plain dict it needs no yacs.
        allowed.append((OrderedDict, "yacs.config.CfgNode"))
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location=map_location, weights_only=True)
    torch.serialization.add_safe_globals(allowed)  # torch 2.4 has no scoped form
    return torch.load(path, map_location=map_location, weights_only=True)


def _unwrap(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
