"""Residual blocks as steps behind one another, see :mod:`backbones.ops.steps`, which spares a GPU's host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from backbones.layers.autocast import autocast_dtype
from backbones.layers.half_weights import cast_their_own
from backbones.layers.norm import LayerNorm, RMSNorm
from backbones.layers.scan import OnBackend
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import check_width
from backbones.ops import Visits
from backbones.ops.dispatch import choose, kernels
from backbones.ops.remember import remember
from backbones.ops.scan.triton import interprets
from backbones.ops.tracing import (
    State,
    Weight,
    is_as_written,
    is_hooked_everywhere,
    is_transformed,
    is_watched,
    runs_eagerly,
)


class Line:
    """Collects the steps of a block, part by part; the methods take them in the order in which they run.

    Once a part cannot be a step, for it is of another class, hooked, on another backend, or its weights are of other
    dtypes than its kernels read, the line has failed, and the block is to be called as it is.

    Args:
        x: the stream (b, ..., dim) in front of the block.
        pending: a branch that is still to be added to it, or None.
        backend: of all parts.

    Attributes:
        fails: whether the line has failed.
        half: autocast's dtype, or None.
    """

    def __init__(self, x: Tensor, pending: Tensor | None, backend: str | None) -> None:
        self.x, self.backend = x, backend
        self.fails = False
        self._kernels = kernels("steps")
        self._steps: list[Any] = []
        self.half = autocast_dtype(x)
        self._branch = None if pending is None else pending.dtype

    @classmethod
    def of(cls, x: Tensor, pending: Tensor | None, backend: str | None) -> Line | None:
        """An empty line where the kernels run on x; else None."""
        runs = choose("selective_scan", backend, x.device.type, x.dtype) == "triton"
        return cls(x, pending, backend) if runs else None

    def weights(self, module: nn.Module | None, kind: type[nn.Module], *names: str) -> list[Any] | None:
        """Where weights of these names stand, None for each that is missing, of a module that computes what ``kind``
        says; else None, and the line fails.
        """
        if not self.fails and module is not None and type(module) is kind and is_as_written(module):
            weights = [Weight.of(module, name) for name in names]
            at_home = not isinstance(module, OnBackend) or module.backend == self.backend
            if at_home and all([x is None or x.is_plain for x in weights]):
                return weights
        self.fails = True
        return None

    def fits(self, *weights: Weight | None) -> bool:
        """Whether products of the branch read such weights, which autocast would cast."""
        whole = None if self.half is None else torch.float32
        return all([x is None or x.dtype in (self._branch, whole) for x in weights])

    def scan_weights(self, ssm: nn.Module | None) -> list[Any] | None:
        """Of a selective scan with its projections; the first two are those of products. See `weights`."""
        return self.weights(ssm, SelectiveSSM, *SelectiveSSM.scanned)

    def layer(self, layer: Any, x: Tensor, *args: Any) -> None:
        """A layer on ``x``: timm's ``Mlp``, or one whose class has a method ``add_to(line, x, *args)`` of its own."""
        kind = type(layer)
        if self.fails or not is_as_written(layer):
            self.fails = True
        elif kind is Mlp:
            self._mlp(layer)
        elif "add_to" in vars(kind):
            layer.add_to(self, x, *args)
        else:
            self.fails = True

    def norm(self, norm: nn.Module, adds: bool = True) -> None:
        """A norm of the stream and the branch that is pending, or, unless it ``adds``, of the branch."""
        centred = type(norm) is LayerNorm
        weights = self.weights(norm, LayerNorm if centred else RMSNorm, "weight", "bias")
        if weights is None:
            return
        assert isinstance(norm, LayerNorm | RMSNorm)
        stream, branch = self.x.dtype, self._branch if adds else None
        if branch not in (None, stream) and torch.promote_types(stream, branch) != stream:
            self.fails = True
        if weights[0] is None or (self.half is not None and not norm.autocast_out):
            self.fails = True
            return
        if adds:
            check_width(self.x, weights[0].shape[0])
        dtype = self.half or (stream if centred else torch.promote_types(stream, weights[0].dtype))
        self._steps.append(self._kernels.Norm(weights, norm.eps, centred, dtype, adds, branch))
        self._branch = dtype

    def linear(self, linear: nn.Module) -> None:
        """A linear layer."""
        weights = self.weights(linear, nn.Linear, "weight", "bias")
        if weights is None or not self.fits(*weights):
            self.fails = True
            return
        self._steps.append(self._kernels.Linear(weights))

    def add(self, step: Any) -> None:
        """A step whose weights have been looked at, or None where it cannot be one."""
        self.fails |= step is None
        self._steps.append(step)

    def split(self) -> None:
        """Sets the second half of the branch aside for the gate."""
        self._steps.append(self._kernels.Split(()))

    def gate(self, scale: float = 1.0) -> None:
        """Multiplies by SiLU of what was set aside, and by ``scale``."""
        self._steps.append(self._kernels.Gate((), scale))

    def scan(
        self, conv: Sequence[Any] | None, taps: Sequence[Tensor], ssm: nn.Module | None, orders: Tensor,
        window: int, visits: Visits | None,
    ) -> None:  # fmt: skip
        """A depthwise convolution with SiLU and a selective scan with its projections, whose orders are added.

        ``conv`` are weight and bias of the convolution, from `weights`.
        """
        weights = self.scan_weights(ssm)
        if weights is None or conv is None or visits is None or not self.fits(*weights[:2]):
            self.fails = True
            return
        if not are_whole(*weights[2:], *conv):
            self.fails = True
            return
        operation = self._kernels.ConvolvedScan(*taps, orders, "sum", window, visits)
        self._steps.append(self._kernels.Scan((*weights, *conv), operation))

    def _mlp(self, mlp: Mlp) -> None:
        """With GELU, without dropout or norm."""
        act, *passed = mlp.act, mlp.drop1, mlp.norm, mlp.drop2
        usual = type(act) is nn.GELU and act.approximate == "none" and is_as_written(act)
        if not usual or not all([_is_idle(x) for x in passed]):
            self.fails = True
            return
        self.linear(mlp.fc1)
        self._steps.append(self._kernels.Gelu(()))
        self.linear(mlp.fc2)

    def drop_path(self, drop: nn.Module) -> None:
        """timm's ``DropPath``, or an identity."""
        if _is_idle(drop):
            return
        if type(drop) is not DropPath or not is_as_written(drop):
            self.fails = True
            return
        self._steps.append(self._kernels.DropPath((), drop.drop_prob, drop.scale_by_keep))

    def steps(self) -> Any:
        """All of them, as :class:`backbones.ops.steps.Steps`. Not after the line has failed."""
        assert not self.fails
        return self._kernels.Steps(self._steps, self.half)


class _Lines:
    """The steps of a block for each kind of input, as long as the block is what it was."""

    def __init__(self, block: nn.Module) -> None:
        self.state = State(block)
        self.found: dict[Any, Any] = {}


_MOST = 16  # kinds of inputs
_lines: WeakKeyDictionary[nn.Module, dict[bool, _Lines]] = WeakKeyDictionary()  # by whether it is in training


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether tensors are plain, on one device, on which kernels run in eager mode, and nobody looks on."""
    first = tensors[0]
    if not runs_eagerly(first) or not (first.is_cuda or interprets()):
        return False
    if is_watched() or is_hooked_everywhere() or is_transformed(*tensors):
        return False
    return all([type(x) is Tensor and x.device == first.device for x in tensors])


def kind_of_call(x: Tensor, pending: Tensor | None, *args: Any) -> tuple[Any, ...] | None:
    """What the steps of a block depend on besides the block, and pending's dtype: the same for what comes out of them.

    None where no kernel runs on x, tensors are not plain, or somebody looks on.
    """
    given = (x,) if pending is None else (x, pending)
    if not is_plain_call(*given) or any([each.shape != x.shape for each in given]):
        return None
    return x.shape, x.dtype, x.device, autocast_dtype(x), args


def steps_of(block: Any, kind: tuple[Any, ...] | None, x: Tensor, pending: Tensor | None, *args: Any) -> Any:
    """What ``block.chained(x, pending, *args)`` does, as :class:`backbones.ops.steps.Steps` to be run on x and pending.

    ``block.line(x, pending, *args)`` collects them, once for each ``kind`` of input, see `kind_of_call`. None where it
    cannot, or there is no kind.
    """
    if kind is None:
        return None
    key = kind, None if pending is None else pending.dtype
    modes = _lines.setdefault(block, {})
    lines = modes.get(block.training)
    if lines is not None and not lines.state.holds():
        del modes[block.training]
        cast_their_own.discard(block)
        lines = None
    steps = None if lines is None else lines.found.get(key)
    if steps is not None and steps.have_same_weights():
        return steps
    line = block.line(x, pending, *args)
    if line is None or line.fails:
        return None
    if lines is None:
        lines = modes[block.training] = _Lines(block)
        cast_their_own.add(block)
    return remember(lines.found, key, line.steps(), _MOST)


def are_whole(*weights: Weight | None) -> bool:
    """Whether all of these are in float32, as the kernels read them."""
    return all([x is None or x.dtype == torch.float32 for x in weights])


def _is_idle(module: nn.Module) -> bool:
    """Whether a call of ``module`` returns its input: an identity, or dropout that drops nothing."""
    if not is_as_written(module):
        return False
    if isinstance(module, nn.Dropout | DropPath):
        rate = module.p if isinstance(module, nn.Dropout) else module.drop_prob
        return type(module) in (nn.Dropout, DropPath) and (not module.training or rate == 0)
    return type(module) is nn.Identity
