"""A straight line of operations on a GPU, such as a residual block, as one node of autograd's graph.

Each operation by itself costs the host its checks, a node in the graph and what that keeps, which together take longer
than the launches. Here they are steps behind one another on rows of tokens, each with its gradient, and autograd sees
the whole. Kernels and products are those of the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import recorded
from backbones.ops.depthwise import triton as depthwise
from backbones.ops.derivatives import first_order
from backbones.ops.fused.gate import triton as gate
from backbones.ops.fused.layer_norm import triton as layer_norm
from backbones.ops.recorded import Recordings
from backbones.ops.scan.triton import projected
from backbones.ops.scan.visits import Visits
from backbones.ops.source import Packed
from backbones.ops.tracing import Weight, casts, has_saved_tensor_hooks, kind_of
from backbones.ops.triton_host import device_of

Weights = Sequence[Any]  # tensors, and None for those that a layer goes without
Places = Sequence[Weight | None]
Saved = tuple[Any, ...]  # tensors
Gradients = tuple[Tensor | None, ...]


class Flow:
    """What runs along the steps; on the way back, the gradients of it.

    Attributes:
        images: b, the number of images.
        stream: (b l, dim), the residual stream.
        y: (b l, c), the branch, which the next step takes further; None in front of the first norm, where there is
            nothing to add.
        z: (b l, c), a part of the branch that waits for its gate.
    """

    __slots__ = ("images", "stream", "y", "z")

    def __init__(self, images: int, stream: Tensor, y: Tensor | None) -> None:
        self.images = images
        self.stream = stream
        self.y: Any = y
        self.z: Any = None


@dataclass(slots=True)
class Step:
    """One operation.

    Attributes:
        weights: where its parameters stand. Both methods are given them as tensors without history.
        halves: how many of the weights, from the first on, autocast would cast.
    """

    weights: Places
    halves: ClassVar[int] = 0

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        """Takes ``flow`` further; with ``save``, returns what `backward` reads."""
        raise NotImplementedError

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        """Takes gradients back; returns those of the weights, at least where they learn."""
        raise NotImplementedError


@dataclass(slots=True)
class Norm(Step):
    """LayerNorm or RMSNorm of the stream and the branch, whose sum becomes the stream; or of the branch alone.

    Attributes:
        eps: added to the variance.
        centred: LayerNorm.
        dtype: of the result.
        adds: normalises the sum.
        branch: dtype of the branch that is added, or None where there is none.
    """

    eps: float
    centred: bool
    dtype: torch.dtype
    adds: bool
    branch: torch.dtype | None = None

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        weight, bias = weights
        x, branch = (flow.stream, flow.y) if self.adds else (flow.y, None)
        total, flow.y, statistics = layer_norm.forward(
            x, branch, weight, bias, self.eps, self.dtype, self.centred, save
        )
        if self.adds:
            flow.stream = total
        return (total, statistics) if save else ()

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        weight, bias = weights
        total, statistics = saved
        stream = flow.stream if self.adds else None
        dx, dbranch, sums = layer_norm.backward(flow.y, stream, total, weight, statistics, self.centred, self.branch)
        if self.adds:
            flow.stream, flow.y = dx, None if self.branch is None else dbranch
        else:
            flow.y = dx
        dweight, dbias = (sums if sums.dtype == weight.dtype else sums.to(weight.dtype)).unbind(0)
        return dweight, None if bias is None else dbias


@dataclass(slots=True)
class Linear(Step):
    """A linear layer."""

    halves = 2

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        rows = flow.y
        flow.y = F.linear(rows, *weights)
        return (rows,)

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        grad, (rows,) = flow.y, saved
        flow.y = torch.mm(grad, weights[0])
        return torch.mm(grad.t(), rows) if learns[0] else None, grad.sum(0) if learns[1] else None


@dataclass(slots=True)
class Split(Step):
    """Sets the second half of the branch aside for a gate."""

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        half = flow.y.shape[1] // 2
        flow.y, flow.z = flow.y.split_with_sizes((half, half), 1)
        return ()

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        flow.y, flow.z = torch.cat((flow.y, flow.z), 1), None
        return ()


@dataclass(slots=True)
class ConvolvedScan:
    """A depthwise convolution, SiLU, and the selective scan with its projections, along k orders.

    Its weights are those of :func:`backbones.ops.scan.projected.projected_scan`, then weight and bias of the
    convolution, of k orders or of one that all scans read.

    Attributes:
        taps: (k, j, l) of the convolution, see :func:`backbones.ops.depthwise_conv`.
        inverse_taps: as ``taps``.
        orders: (k, t) of the scan, or None.
        out: see :func:`backbones.ops.selective_scan`.
        window: steps of the scan's window.
        visits: what is known of the orders.
    """

    taps: Tensor
    inverse_taps: Tensor
    orders: Tensor | None
    out: str
    window: int
    visits: Visits | None

    def forward(self, x: Tensor, weights: Weights, save: bool, into: Tensor | None = None) -> tuple[Tensor, Saved]:
        """The scan of x (b, l, c), see `projected.forward`, and what `backward` reads."""
        x_weight, dt_weight, dt_bias, A_log, D, *conv = weights
        u = depthwise.forward(x, *_as_taps(conv, self.taps), self.taps, self.inverse_taps, True)
        u = u[0] if u.shape[0] == 1 else u.permute(1, 2, 0, 3)
        y, scan = projected.forward(
            u, x_weight, dt_weight, dt_bias, A_log, D, self.orders, self.out, self.window, self.visits, into, save
        )  # fmt: skip
        return y, () if scan is None else (u, *scan)

    def backward(self, grad: Tensor, x: Tensor, weights: Weights, saved: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
        """The gradients of x and of the weights."""
        x_weight, dt_weight, dt_bias, _, D, *conv = weights
        u, *scan = saved
        du, *of_scan = projected.backward(
            grad, projected.Saved(*scan), u, x_weight, dt_weight, dt_bias, D, self.orders, self.out, self.window,
            self.visits,
        )  # fmt: skip
        du = du.unsqueeze(0) if du.dim() == 3 else du.permute(2, 0, 1, 3)
        dx, *dconv = depthwise.backward(du, x, *_as_taps(conv, self.taps), self.taps, self.inverse_taps, True)
        return dx, (*of_scan, *_as_given(dconv, conv))


@dataclass(slots=True)
class Scan(Step):
    """A `ConvolvedScan`, whose orders are added.

    Attributes:
        operation: with ``out="sum"``.
    """

    operation: ConvolvedScan
    halves = 2

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        rows, c = flow.y.shape
        x = flow.y.view(flow.images, -1, c)
        y, saved = self.operation.forward(x, weights, save)
        flow.y = y.view(rows, -1)
        return (x, *saved) if save else ()

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        x, *saved = saved
        rows, c = flow.y.shape
        dx, gradients = self.operation.backward(flow.y.view(flow.images, -1, c), x, weights, saved)
        flow.y = dx.view(rows, -1)
        return gradients


def _as_taps(conv: Weights, taps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a depthwise convolution as the kernels read them, for the orders of ``taps``."""
    (weight, bias), (k, j, _) = conv, taps.shape
    return weight.view(k, -1, j), None if bias is None else bias.view(k, -1)


def _as_given(gradients: Sequence[Tensor], conv: Sequence[Any]) -> Gradients:
    """Gradients of what `_as_taps` made, for weight and bias as they were."""
    return tuple(None if x is None else grad.view(x.shape) for grad, x in zip(gradients, conv, strict=True))


@dataclass(slots=True)
class Gate(Step):
    """Multiplies by SiLU of what was set aside, and by ``scale``."""

    scale: float

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        y, z = flow.y, flow.z
        flow.y, flow.z = gate.forward(y, z, self.scale), None
        return y, z

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        y, z = saved
        flow.y, flow.z = gate.backward(flow.y, y, z, self.scale)
        return ()


@dataclass(slots=True)
class Conv(Step):
    """A depthwise convolution of a map, with GELU.

    Attributes:
        taps: see :func:`backbones.ops.depthwise_conv`.
        inverse_taps: as ``taps``.
        residual: whether the map is added before GELU.
    """

    taps: Tensor
    inverse_taps: Tensor
    residual: bool

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        rows, c = flow.y.shape
        x = flow.y.view(flow.images, -1, c)
        conv = _as_taps(weights, self.taps)
        y = depthwise.forward(x, *conv, self.taps, self.inverse_taps, False, True, self.residual)
        flow.y = y.view(rows, c)
        return (x,)

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        (x,) = saved
        conv = _as_taps(weights, self.taps)
        dx, *dconv = depthwise.backward(
            flow.y.view(1, *x.shape), x, *conv, self.taps, self.inverse_taps, False, True, self.residual
        )
        flow.y = dx.view(flow.y.shape)
        return _as_given(dconv, weights)


@dataclass(slots=True)
class Gelu(Step):
    """The exact GELU."""

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        x = flow.y
        flow.y = F.gelu(x)
        return (x,)

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        flow.y = torch.ops.aten.gelu_backward(flow.y, *saved)
        return ()


@dataclass(slots=True)
class DropPath(Step):
    """timm's stochastic depth, drawn as timm draws it.

    Attributes:
        rate: of the images whose branch is dropped.
        scales: divides the other branches by their share.
    """

    rate: float
    scales: bool

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        keep = 1 - self.rate
        kept = flow.y.new_empty((flow.images, 1, 1)).bernoulli_(keep)
        if keep > 0 and self.scales:
            kept.div_(keep)
        self._multiply(flow, kept)
        return (kept,)

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        self._multiply(flow, saved[0])
        return ()

    @staticmethod
    def _multiply(flow: Flow, kept: Tensor) -> None:
        rows, c = flow.y.shape
        flow.y = (flow.y.view(flow.images, -1, c) * kept).view(rows, c)


class Steps:
    """Steps behind one another, for inputs of one shape and dtype.

    Args:
        steps: end with a branch of the stream's width.
        half: autocast's dtype, to which weights in float32 are cast, or None.
    """

    def __init__(self, steps: Sequence[Step], half: torch.dtype | None) -> None:
        self._steps, self._half = steps, half
        self._weights = [weight for step in steps for weight in step.weights]
        self._kinds = [() if weight is None else weight.kind for weight in self._weights]
        self._saved: list[int] = []  # how many tensors each step saves
        self._recordings = Recordings()

    def weights(self) -> list[Any]:
        """The parameters, or what stands for them now."""
        return [None if weight is None else weight.now() for weight in self._weights]

    def have_same_weights(self) -> bool:
        """Whether all of them are of the kinds that they were of."""
        return [kind_of(weight) for weight in self.weights()] == self._kinds

    def run(self, stream: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream and the branch behind all steps.

        Args:
            stream: (b, ..., dim).
            y: as the stream, or None.

        Raises:
            NotImplementedError: second derivatives.
        """
        if torch.is_grad_enabled():
            return _Line.apply(self, stream, y, *self.weights())
        with device_of(stream):
            found: Any = self._recordings.call(self._forward, (stream, y, *self.weights()), False)
        return found

    def forward(self, stream: Tensor, y: Tensor | None, weights: Weights) -> tuple[Saved, Packed | None]:
        """The stream and the branch behind all steps, and what `backward` is given."""
        packs = None if has_saved_tensor_hooks() else 2
        with device_of(stream):
            found = self._recordings.call(self._forward, (stream, y, *weights), True, packs=packs)
        return (found[:-1], found[-1]) if isinstance(found[-1], Packed) else (found, None)

    def backward(
        self, dstream: Tensor, dy: Tensor, saved: Saved, packed: Packed | None, learns: Sequence[bool],
        has_branch: bool,
    ) -> Gradients:  # fmt: skip
        """Gradients of the stream, of the branch if there was one, and of the weights that learn."""
        tensors, key = (dstream, dy, *saved), (tuple(learns), has_branch, packed)
        seen = recorded.SEEN + 1 if packed is None else 0  # once `forward` is recorded, tensors may come packed
        device = dstream.device.type
        with device_of(dstream):
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
                return self._recordings.call(self._backward, tensors, *key, seen=seen)
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return self._recordings.call(self._backward, tensors, *key, seen=seen)

    def _forward(self, tensors: Sequence[Any], save: bool) -> Saved:
        stream, y, *weights = tensors
        shape = stream.shape
        if self._half is not None:
            _cast(weights, self._places(weights, self._half), self._half)
        flow = Flow(shape[0], _rows(stream), None if y is None else _rows(y))
        saved, end = [], 0
        for step in self._steps:
            begin, end = end, end + len(step.weights)
            saved.append(step.forward(flow, weights[begin:end], save))
        found = flow.stream.view(shape), flow.y.view(shape)
        if not save:
            return found
        self._saved = [len(each) for each in saved]
        return *found, *weights, *[x for each in saved for x in each]

    def _backward(
        self, tensors: Sequence[Any], learns: Sequence[bool], has_branch: bool, packed: Packed | None
    ) -> Gradients:  # fmt: skip
        dstream, dy, *saved = tensors
        if packed is not None:
            saved = packed.unpack((None, None, *saved[:-1]), saved[-1])[2:]
        begin, end = len(learns), len(saved)
        flow = Flow(dstream.shape[0], _rows(dstream), _rows(dy))
        grads: list[Any] = [None] * begin
        for step, count in zip(reversed(self._steps), reversed(self._saved), strict=True):
            own = slice(begin - len(step.weights), begin)
            grads[own] = step.backward(flow, saved[own], saved[end - count : end], learns[own])
            begin, end = own.start, end - count
        given = zip(grads, self._weights, learns, strict=True)
        places = [i for i, (x, weight, learn) in enumerate(given) if weight and learn and x.dtype != weight.dtype]
        _cast(grads, places, torch.float32)
        dx, dbranch = flow.stream.view(dstream.shape), None
        if has_branch:  # one tensor twice is copied for leaves, which would add to both of two views of it
            dbranch = dx if flow.y is flow.stream else flow.y.view(dstream.shape)
        return dx, dbranch, *grads

    def _places(self, weights: Weights, half: torch.dtype) -> list[int]:
        """Of the weights that autocast would cast."""
        places, begin = [], 0
        for step in self._steps:
            own = range(begin, begin + step.halves)
            places += [i for i in own if weights[i] is not None and weights[i].dtype != half]
            begin += len(step.weights)
        return places


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _cast(tensors: list[Any], places: Sequence[int], dtype: torch.dtype) -> None:
    """Casts the tensors at these places together."""
    for i, x in zip(places, casts([tensors[i] for i in places], dtype), strict=True):
        tensors[i] = x


class _Line(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: Steps, stream: Tensor, y: Tensor | None, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found, ctx.packed = steps.forward(stream, y, weights)
        ctx.steps, ctx.has_branch = steps, y is not None
        ctx.save_for_backward(found[0], *found[2:])
        return found[0], found[1]

    @staticmethod
    def backward(ctx: Any, dstream: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        stream, *saved = ctx.saved_tensors
        learns = ctx.needs_input_grad[3:]
        found = ctx.steps.backward(dstream, dy, saved, ctx.packed, learns, ctx.has_branch)
        if torch.is_grad_enabled():
            whole = [x for x in found if x is not None]
            once = iter(first_order("selective_scan", whole, (stream, dstream, dy, *saved[: len(learns)])))
            found = tuple(None if x is None else next(once) for x in found)
        return None, *found
