"""Blocks as recordings of what they did, see :mod:`backbones.ops.passes`, which spares a GPU's host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backbones.layers.autocast import autocast_dtype
from backbones.layers.half_weights import cast_their_own, with_half_weights
from backbones.layers.line import is_plain_call
from backbones.ops.dispatch import kernels
from backbones.ops.tracing import State, Weight, all_modules, is_as_written, kind_of

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
    simple = all([isinstance(x, Tensor) or _is_simple(x) for x in args])
    known = _known_of(block) if tensors and is_plain_call(*tensors) and simple else None
    if known is None:
        return with_half_weights(function, block, *args)
    passes, weights, single = known
    rest = tuple([Tensor if isinstance(x, Tensor) else x for x in args])
    call = getattr(function, "__name__", None), rest

    def run(*given: Tensor) -> Any:
        left = iter(given)
        filled = [next(left) if x is Tensor else x for x in rest]
        result = with_half_weights(function, block, *filled)
        single[call] = isinstance(result, Tensor)
        return (result,) if single[call] else result

    kinds = tuple([(x.shape, x.dtype, x.device) for x in tensors])
    settings = autocast_dtype(tensors[0]), *[allowed() for allowed in _KERNELS_OF_ATTENTION]
    found = passes.call(run, tensors, weights, call, kinds, settings)
    return cast(Result, found[0] if single[call] else found)


def _is_simple(x: Any) -> bool:
    return type(x) in _SIMPLE or (type(x) is tuple and all([type(each) in _SIMPLE for each in x]))


class _Known:
    """A block as it is.

    Attributes:
        fits: whether it may be recorded.
        single: by function and arguments, whether the result was a tensor, and no tuple of them.
    """

    def __init__(self, block: nn.Module) -> None:
        self._state = State(block)
        modules = list(all_modules(block))
        self._weights = [Weight(module, name) for module in modules for name in _names(module)]
        self._kinds = [weight.kind for weight in self._weights]
        weights = self.weights()
        self._are_distinct = _are_distinct(weights)
        plain = all([weight.is_plain for weight in self._weights])
        self.fits = plain and self._are_distinct and all([_is_ours(module) for module in modules])
        self.passes = kernels("passes").Passes("selective_scan")
        self.single: dict[Any, bool] = {}

    def weights(self) -> list[Any]:
        """All parameters, or what stands for them now, and buffers."""
        return [weight.now() for weight in self._weights]

    def holds(self, weights: list[Any]) -> bool:
        """Whether it is still so, with the weights that it has now."""
        same = self._state.holds() and [kind_of(x) for x in weights] == self._kinds
        return same and _are_distinct(weights) == self._are_distinct


def _names(module: nn.Module) -> list[str]:
    """Of its own parameters and buffers."""
    return [name for own in (module._parameters, module._buffers) for name, x in own.items() if x is not None]


def _are_distinct(weights: list[Any]) -> bool:
    """Whether no tensor stands in two places: it has one gradient."""
    return len({*map(id, weights)}) == len(weights)


_known: WeakKeyDictionary[nn.Module, dict[bool, _Known]] = WeakKeyDictionary()


def _known_of(block: nn.Module) -> tuple[Any, list[Any], dict[Any, bool]] | None:
    """The passes of a block in its mode, its weights, and `_Known.single`; None where it is not to be recorded."""
    modes = _known.setdefault(block, {})
    known = modes.get(block.training)
    weights = [] if known is None else known.weights()
    if known is None or not known.holds(weights):
        known = modes[block.training] = _Known(block)
        weights = known.weights()
        (cast_their_own.add if known.fits else cast_their_own.discard)(block)
    return (known.passes, weights, known.single) if known.fits else None


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_OURS) and is_as_written(module)
