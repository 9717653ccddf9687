"""Blocks as recordings of what they did, see :mod:`backbones.ops.passes`, which spares a GPU's host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backbones.layers.autocast import autocast_dtype
from backbones.layers.half_weights import cast_their_own, with_half_weights
from backbones.ops.dispatch import kernels
from backbones.ops.scan.triton import interprets
from backbones.ops.tracing import (
    State,
    all_modules,
    is_as_written,
    is_hooked_everywhere,
    is_transformed,
    is_watched,
    kind_of,
    runs_eagerly,
)

Result = TypeVar("Result")
_OURS = ("backbones.", "timm.", "torch.nn.modules.")  # modules that do the same at every call of a kind
_CUDA: Any = torch.backends.cuda
# What PyTorch's attention asks before it chooses a kernel, which is then recorded.
_KERNELS_OF_ATTENTION = [
    getattr(_CUDA, name)
    for name in ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")
    if hasattr(_CUDA, name)
]
_SIMPLE = (int, float, str, bool, type(None))


def run_recorded(function: Callable[..., Result], block: nn.Module, *args: Any) -> Result:
    """``with_half_weights(function, block, *args)``, by a recording once there is one.

    Only on a GPU in eager mode, for arguments that are tensors and plain numbers, and blocks of this package's, timm's
    and PyTorch's modules that nobody hooks; the recording is of the block as it is, and begins anew when it changes.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not _may_be(tensors, args):
        return with_half_weights(function, block, *args)
    known = _known_of(block)
    if known is None:
        return with_half_weights(function, block, *args)
    rest = tuple([Tensor if isinstance(x, Tensor) else x for x in args])
    call = getattr(function, "__name__", None), rest

    def run(*given: Tensor) -> Any:
        left = iter(given)
        filled = [next(left) if x is Tensor else x for x in rest]
        result = with_half_weights(function, block, *filled)
        known.single[call] = isinstance(result, Tensor)
        return (result,) if known.single[call] else result

    kinds = tuple([(x.shape, x.dtype, x.device) for x in tensors])
    settings = autocast_dtype(tensors[0]), *[allowed() for allowed in _KERNELS_OF_ATTENTION]
    found = known.passes.call(run, tensors, known.weights(), call, kinds, settings)
    return cast(Result, found[0] if known.single[call] else found)


def _may_be(tensors: list[Tensor], args: tuple[Any, ...]) -> bool:
    """Whether arguments are such that a recording is possible."""
    if not tensors or not runs_eagerly(tensors[0]) or not (tensors[0].is_cuda or interprets()):
        return False
    if is_watched() or is_hooked_everywhere() or is_transformed(*tensors):
        return False
    device = tensors[0].device
    if not all([type(x) is Tensor and x.device == device for x in tensors]):
        return False
    return all([isinstance(x, Tensor) or _is_simple(x) for x in args])


def _is_simple(x: Any) -> bool:
    return type(x) in _SIMPLE or (type(x) is tuple and all([type(each) in _SIMPLE for each in x]))


class _Known:
    """A block as it is.

    Attributes:
        single: by function and arguments, whether the result was a tensor, and no tuple of them.
    """

    def __init__(self, block: nn.Module) -> None:
        self._state = State(block)
        modules = list(all_modules(block))
        self._places = [
            (vars(module), own, name)
            for module in modules
            for own in (module._parameters, module._buffers)
            for name, x in own.items()
            if x is not None
        ]
        self._kinds = [kind_of(x) for x in self.weights()]
        self._all_distinct = self._are_distinct()
        plain = all([kind[0] in (Tensor, nn.Parameter) and kind[3] for kind in self._kinds])
        self.fits = plain and self._all_distinct and all([_is_ours(module) for module in modules])
        self.passes = kernels("passes").Passes("selective_scan")
        self.single: dict[Any, bool] = {}

    def weights(self) -> list[Any]:
        """All parameters, or what stands for them now, and buffers."""
        return [values.get(name, own.get(name)) for values, own, name in self._places]

    def holds(self) -> bool:
        """Whether it is still so."""
        same = self._state.holds() and [kind_of(x) for x in self.weights()] == self._kinds
        return same and self._are_distinct() == self._all_distinct

    def _are_distinct(self) -> bool:
        """Whether no tensor stands in two places: it has one gradient."""
        return len({*map(id, self.weights())}) == len(self._places)


_known: WeakKeyDictionary[nn.Module, dict[bool, _Known]] = WeakKeyDictionary()


def _known_of(block: nn.Module) -> _Known | None:
    """What is known of a block in its mode; None where it is not to be recorded."""
    modes = _known.setdefault(block, {})
    known = modes.get(block.training)
    if known is None or not known.holds():
        known = modes[block.training] = _Known(block)
        (cast_their_own.add if known.fits else cast_their_own.discard)(block)
    return known if known.fits else None


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_OURS) and is_as_written(module)
