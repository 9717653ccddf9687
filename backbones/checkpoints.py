"""Official weight files into our models: safe reading, declared key rules, strict checking.

A family states how the authors' names and layouts map to ours as a table of :class:`KeyRule`. The same table
turns our parameters back into theirs, so that a conversion can be checked in both directions. Nothing is
skipped in silence: an unknown, missing or misshapen key raises before the model is touched.
"""

import argparse
import logging
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

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


class CheckpointError(ValueError):
    """A weight file that cannot be read, or does not fit the model."""


class Layout(NamedTuple):
    """How one official tensor is reshaped into ours, and back."""

    to_ours: Callable[[Tensor], Tensor]
    to_official: Callable[[Tensor], Tensor]


SAME = Layout(lambda x: x, lambda x: x)
ONE_ORDER = Layout(lambda x: x[None], lambda x: x[0])  # a layer of one order has no order axis officially
SQUEEZE_1 = Layout(lambda x: x.squeeze(1), lambda x: x.unsqueeze(1))  # depthwise kernels (c, 1, d) and (c, d)


@dataclass(frozen=True)
class KeyRule:
    """One line of a conversion table; ``{}`` stands for one part of a dotted name, ``{*}`` for any number.

    Several official names are stacked along a new first axis, or with ``concat`` joined along the first axis
    that they have; several names of ours receive the slices of the first axis. ``ours=None`` drops the
    tensor, which is reported.
    """

    official: str | tuple[str, ...]
    ours: str | tuple[str, ...] | None
    layout: Layout = SAME
    concat: bool = False

    def regroup(self, tensors: Sequence[Tensor], parts: int) -> Sequence[Tensor]:
        """``parts`` tensors with the same content; either there is one before or one after."""
        if len(tensors) > 1:
            return [torch.cat(list(tensors)) if self.concat else torch.stack(list(tensors))]
        if parts > 1:
            return tensors[0].chunk(parts) if self.concat else tensors[0].unbind(0)
        return tensors


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
        raise CheckpointError(f"{path}: expected names and tensors, but these are no tensors: {_enumerate(foreign)}")
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


def to_ours(state_dict: Mapping[str, Tensor], rules: Iterable[KeyRule]) -> StateDict:
    """Applies a conversion table to official weights.

    Names that no rule matches stay, so our own files pass unchanged. An incomplete group of official names
    stays too, for :func:`check` to report.

    Raises:
        CheckpointError: a tensor has another shape than its layout, or stands there in two layouts.
    """
    converted, dropped = convert(state_dict, rules)
    if dropped:
        _logger.info("left out of the weight file, as the model has no use for them: %s", _enumerate(dropped))
    return converted


def convert(state_dict: Mapping[str, Tensor], rules: Iterable[KeyRule]) -> tuple[StateDict, list[str]]:
    """:func:`to_ours`, with the names of the tensors that a rule drops instead of a line in the log."""
    left = dict(state_dict)
    converted: StateDict = {}
    dropped: list[str] = []
    twice: set[str] = set()
    for rule in rules:
        official = _names(rule.official)
        for binding in _bindings(official[0], left):
            names = [_fill(name, binding) for name in official]
            if not all(name in left for name in names):
                continue
            tensors = [left.pop(name) for name in names]
            if rule.ours is None:
                dropped += names
                continue
            targets = [_fill(name, binding) for name in _names(rule.ours)]
            try:
                ours = rule.regroup([rule.layout.to_ours(x) for x in tensors], len(targets))
                renamed = dict(zip(targets, ours, strict=True))
            except (RuntimeError, IndexError, ValueError) as error:
                shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, tensors, strict=True))
                raise CheckpointError(f"misshapen, of another layout than this model's: {shapes}") from error
            twice |= renamed.keys() & converted.keys()
            converted |= renamed
    twice |= converted.keys() & left.keys()
    if twice:
        raise CheckpointError(f"the weights hold these in two layouts: {_enumerate(sorted(twice))}")
    return left | converted, dropped


def to_official(state_dict: Mapping[str, Tensor], rules: Iterable[KeyRule]) -> StateDict:
    """The inverse of :func:`to_ours`, dropped tensors aside."""
    left = dict(state_dict)
    converted: StateDict = {}
    for rule in rules:
        ours = _names(rule.ours or ())
        for binding in _bindings(ours[0], left) if ours else ():
            tensors = [left.pop(_fill(name, binding)) for name in ours]
            targets = [_fill(name, binding) for name in _names(rule.official)]
            for name, x in zip(targets, rule.regroup(tensors, len(targets)), strict=True):
                converted[name] = rule.layout.to_official(x)
    return left | converted


def check(state_dict: Mapping[str, Tensor], model: nn.Module, ignore: Sequence[str] = ()) -> None:
    """Raises :class:`CheckpointError` and names every missing, unknown and misshapen key.

    Args:
        state_dict: weights in our layout.
        model: the model that is to load them; it is not changed.
        ignore: modules whose weights may differ, such as a classifier for another number of classes.
    """
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    given = {name: tuple(x.shape) for name, x in state_dict.items()}

    def names(these: Iterable[str]) -> list[str]:
        return sorted(x for x in these if not x.startswith(tuple(f"{module}." for module in ignore)))

    problems = [
        f"{what}: {_enumerate(keys)}"
        for what, keys in (
            ("missing", names(expected.keys() - given.keys())),
            ("unknown", names(given.keys() - expected.keys())),
            (
                "misshapen",
                [
                    f"{name} {given[name]}, expected {expected[name]}"
                    for name in names(expected.keys() & given.keys())
                    if given[name] != expected[name]
                ],
            ),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; " + "; ".join(problems))


def _names(template: str | tuple[str, ...]) -> tuple[str, ...]:
    return (template,) if isinstance(template, str) else template


def _bindings(template: str, names: Iterable[str]) -> list[tuple[str, ...]]:
    pattern = re.escape(template).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)")
    return [match.groups() for match in map(re.compile(pattern).fullmatch, names) if match]


def _fill(template: str, binding: tuple[str, ...]) -> str:
    return template.replace("{*}", "{}").format(*binding)


def _enumerate(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
