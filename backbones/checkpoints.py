"""Official weight files into our models: safe reading, declared key rules, strict checking.

A family states how the authors' names and layouts map to ours as a table of :class:`KeyRule`. The same table
turns our parameters back into theirs, so that a conversion can be checked in both directions. Nothing is
skipped in silence: an unknown, missing or misshapen key raises before the model is touched."""

import argparse
import logging
import pickle
import re
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
_WRAPPERS = ("module.", "_orig_mod.")


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
    """One line of a conversion table; ``{}`` stands for one part of a dotted name, ``{*}`` for any number of
    parts.

    A tuple of official names is stacked along a new first axis, or with ``concat`` joined along the first one
    they have; a tuple of our names receives the slices of the first axis. ``ours=None`` drops the tensor (it
    is reported)."""

    official: str | tuple[str, ...]
    ours: str | tuple[str, ...] | None
    layout: Layout = SAME
    concat: bool = False


def read(path: str | Path, keys: Sequence[str] = WEIGHT_KEYS) -> StateDict:
    """Reads the weights of a ``.safetensors`` file or of a PyTorch checkpoint, without running code from it.

    Args:
        path: the file; training states are fine, ``argparse.Namespace`` is the one foreign class that they
            may hold.
        keys: where a training state keeps its weights, the first that exists is taken; else the file itself
            is the dict.

    Returns:
        Names and tensors on the CPU, without ``module.`` or ``_orig_mod.`` prefixes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, holds foreign classes, or no dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs the class {foreign[1]}" if foreign else "it is no plain pickle of tensors"
        raise CheckpointError(f"{path}: refused, {what}, and code from a weight file is never run") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated or no weight file: {error}") from error

    if isinstance(content, Mapping):
        content = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected names and tensors")
    foreign = [str(name) for name, x in content.items() if not isinstance(x, Tensor)]
    if foreign:
        raise CheckpointError(
            f"{path}: expected names and tensors, but these are no tensors: {_enumerate(foreign)}"
        )
    return {_unwrap(name): x for name, x in content.items()}


def _torch_load(path: Path) -> Any:
    allowed = [argparse.Namespace]
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    torch.serialization.add_safe_globals(allowed)  # torch 2.4 has no scoped form
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def to_ours(state_dict: Mapping[str, Tensor], rules: Iterable[KeyRule]) -> StateDict:
    """Applies a conversion table to official weights. Names that no rule matches stay, so our own files pass
    unchanged."""
    left = dict(state_dict)
    converted: StateDict = {}
    dropped: list[str] = []
    for rule in rules:
        sources = _names(rule.official)
        for binding in _bindings(sources[0], left):
            names = [_fill(source, binding) for source in sources]
            if not all(name in left for name in names):
                continue  # an incomplete stack: the check reports what is there as unknown
            values = [rule.layout.to_ours(left.pop(name)) for name in names]
            if rule.ours is None:
                dropped += names
            elif isinstance(rule.ours, tuple):
                converted.update(
                    zip((_fill(name, binding) for name in rule.ours), values[0].unbind(0), strict=True)
                )
            else:
                join = torch.cat if rule.concat else torch.stack
                converted[_fill(rule.ours, binding)] = join(values) if len(values) > 1 else values[0]
    if dropped:
        _logger.info("left out of the weight file, as the model has no use for them: %s", _enumerate(dropped))
    twice = sorted(converted.keys() & left.keys())
    if twice:
        raise CheckpointError(
            f"the weights hold these both in the official layout and in ours: {_enumerate(twice)}"
        )
    return {**left, **converted}


def to_official(state_dict: Mapping[str, Tensor], rules: Iterable[KeyRule]) -> StateDict:
    """The inverse of :func:`to_ours`, dropped tensors aside."""
    left = dict(state_dict)
    converted: StateDict = {}
    for rule in rules:
        if rule.ours is None:
            continue
        targets = _names(rule.ours)
        for binding in _bindings(targets[0], left):
            values = [left.pop(_fill(target, binding)) for target in targets]
            sources = [_fill(source, binding) for source in _names(rule.official)]
            stacked = torch.stack(values) if len(targets) > 1 else values[0]
            slices: Sequence[Tensor] = (stacked,)
            if len(sources) > 1:
                slices = stacked.chunk(len(sources)) if rule.concat else stacked.unbind(0)
            converted.update(
                {name: rule.layout.to_official(x) for name, x in zip(sources, slices, strict=True)}
            )
    return {**left, **converted}


def check(state_dict: Mapping[str, Tensor], model: nn.Module, ignore: Sequence[str] = ()) -> None:
    """Raises :class:`CheckpointError`, naming every key that ``model`` lacks, misses, or has in another
    shape.

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
