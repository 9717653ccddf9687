"""Official weight files into our models: safe reading, declared key rules, strict checking.

A family states how the authors' names and layouts map to ours as a table of :class:`KeyRule`. The same table
turns our parameters back into theirs, so that a conversion can be checked in both directions. Nothing is
skipped in silence: an unknown, missing or misshapen key raises before the model is touched.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


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


def to_ours(state_dict: Mapping[str, Tensor], rules: Iterable[KeyRule]) -> StateDict:
    """Applies a conversion table to official weights.

    Names that no rule matches stay, so our own files pass unchanged. An incomplete group of official names
    stays too, for :func:`check` to report.

    Raises:
        CheckpointError: a tensor has another shape than its layout, or stands there in two layouts.
    """
    converted, dropped = convert(state_dict, rules)
    if dropped:
        _logger.info("left out of the weight file, as the model has no use for them: %s", enumerate_names(dropped))
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
        raise CheckpointError(f"the weights hold these in two layouts: {enumerate_names(sorted(twice))}")
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


def rename(name: str, rules: Iterable[KeyRule]) -> str:
    """Our name for ``name`` by the first rule, of one name each, that matches; ``name`` itself where none does."""
    for rule in rules:
        if isinstance(rule.official, str) and isinstance(rule.ours, str):
            for binding in _bindings(rule.official, [name]):
                return _fill(rule.ours, binding)
    return name


def _names(template: str | tuple[str, ...]) -> tuple[str, ...]:
    return (template,) if isinstance(template, str) else template


def _bindings(template: str, names: Iterable[str]) -> list[tuple[str, ...]]:
    pattern = re.escape(template).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)")
    return [match.groups() for match in map(re.compile(pattern).fullmatch, names) if match]


def _fill(template: str, binding: tuple[str, ...]) -> str:
    return template.replace("{*}", "{}").format(*binding)


def enumerate_names(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
