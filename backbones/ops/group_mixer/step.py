"""GroupMamba's mixer as a step of a block, see :mod:`backbones.ops.steps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backbones.ops.group_mixer import triton
from backbones.ops.group_mixer.operator import HALVES, Plan, Weights
from backbones.ops.steps import Flow, Gradients, Saved, Step
from backbones.ops.steps import Weights as Given


@dataclass(slots=True)
class GroupMixer(Step):
    """Of the branch, which is normed. Its weights are those of :class:`backbones.ops.group_mixer.operator.Weights`.

    Attributes:
        plan: what does not learn.
    """

    plan: Plan
    halves = HALVES

    def forward(self, flow: Flow, weights: Given, save: bool) -> Saved:
        rows, c = flow.y.shape
        x = flow.y.view(flow.images, -1, c)
        y, saved = triton.forward(x, self.plan, Weights(*weights), save)
        flow.y = y.view(rows, c)
        return (x, *saved)

    def backward(self, flow: Flow, weights: Given, saved: Sequence[Tensor], learns: Sequence[bool]) -> Gradients:
        x, *saved = saved
        dx, gradients = triton.backward(flow.y.view(x.shape), x, self.plan, Weights(*weights), saved)
        flow.y = dx.view(flow.y.shape)
        return gradients
