"""What MSVMamba's block is made of besides the steps of :mod:`backbones.ops.steps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.fused.gate import triton as gate
from backbones.ops.fused.layer_norm import triton as layer_norm
from backbones.ops.fused.row_sums import triton as row_sums
from backbones.ops.steps import ConvolvedScan, Flow, Gradients, Saved, Step, Weights


@dataclass(slots=True)
class TwoScales(Step):
    """Two branches, whose steps are normalised and summed to the cells of the map.

    Weights: x_proj and dt_proj of both scans, then of each branch the other weights of the scan and those of the
    convolution, then weight and bias of the norm.

    Attributes:
        branches: both of them, with ``out="per_step"``.
        sizes: their steps.
        tables: of :func:`backbones.ops.fused.row_sums.operator.row_sums`, over the steps of both.
        eps: added to the variance.
        dtype: of the norm's result.
    """

    branches: tuple[ConvolvedScan, ConvolvedScan]
    sizes: tuple[int, int]
    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    eps: float
    dtype: torch.dtype
    halves = 4

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        rows, c = flow.y.shape
        x = flow.y.view(flow.images, -1, c)
        steps = x.new_empty(flow.images, sum(self.sizes), 1, c)
        saved: list[Tensor] = []
        places = steps.split_with_sizes(self.sizes, 1)
        for branch, own, into in zip(self.branches, _of_each(weights), places, strict=True):
            saved += branch.forward(x, own, save, into)[1]
        steps = steps.squeeze(2)
        weight, bias = weights[-2:]
        _, normed, statistics = layer_norm.forward(steps, None, weight, bias, self.eps, self.dtype, True, save)
        flow.y = row_sums.forward(normed, None, *self.tables[:2]).view(rows, c)
        return (x, steps, statistics, *saved) if save else ()

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        x, steps, statistics, *scans = saved
        grad = row_sums.forward(flow.y.view(x.shape), None, *self.tables[2:])
        grad, _, sums = layer_norm.backward(grad, None, steps, weights[-2], statistics, True, None)
        dweight, dbias = (sums if sums.dtype == weights[-2].dtype else sums.to(weights[-2].dtype)).unbind(0)
        parts = grad.unsqueeze(2).split_with_sizes(self.sizes, 1)
        half = len(scans) // 2
        found = [
            branch.backward(part, x, own, kept)
            for branch, part, own, kept in zip(
                self.branches, parts, _of_each(weights), (scans[:half], scans[half:]), strict=True
            )
        ]
        (dx, first), (dx_of_second, second) = found
        flow.y = dx.add_(dx_of_second).view(flow.y.shape)
        return *first[:2], *second[:2], *first[2:], *second[2:], dweight, None if weights[-1] is None else dbias


@dataclass(slots=True)
class Excite(Step):
    """Squeeze and excitation, and a gate by SiLU of what was set aside, if anything.

    Weights: of both linear layers, which have no biases.
    """

    halves = 2

    def forward(self, flow: Flow, weights: Weights, save: bool) -> Saved:
        rows, c = flow.y.shape
        x, z = flow.y.view(flow.images, -1, c), None if flow.z is None else flow.z.view(flow.images, -1, c)
        mean = x.mean(1)
        hidden = F.linear(mean, weights[0]).relu_()
        logits = F.linear(hidden, weights[1])
        flow.y, flow.z = gate.excited(x, logits, z).view(rows, c), None
        return (x, mean, hidden, logits, *(() if z is None else (z,)))

    def backward(self, flow: Flow, weights: Weights, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        x, mean, hidden, logits, *gates = saved
        z = gates[0] if gates else None
        dx, dlogits, dz = gate.excited_backward(flow.y.view(x.shape), x, logits, z)
        dhidden = torch.ops.aten.threshold_backward(torch.mm(dlogits, weights[1]), hidden, 0)
        dx.add_(torch.mm(dhidden, weights[0]).unsqueeze(1), alpha=1 / x.shape[1])
        flow.y, flow.z = dx.view(flow.y.shape), None if dz is None else dz.view(flow.y.shape)
        return torch.mm(dhidden.t(), mean), torch.mm(dlogits.t(), hidden)


def _of_each(weights: Weights) -> tuple[Weights, Weights]:
    """Those of both branches, see `ConvolvedScan`."""
    return (*weights[:2], *weights[4:9]), (*weights[2:4], *weights[9:14])
