"""GroupMamba's mixer from its normed input to the input of its last projection, as one operation on a GPU.

Layer by layer, PyTorch takes some fifty launches forward and backward for what stands between the products and the
scan, and copies groups of channels to and fro. Here groups lie one behind the other throughout.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import kernels
from backbones.ops.rows import PLAIN
from backbones.ops.scan.projected import has_projected_scan
from backbones.ops.scan.visits import Visits

_TRITON = "group_mixer.triton"


class Weights(NamedTuple):
    """Parameters, with k groups of w channels each, k w = c.

    ``fc1`` (h, c) and ``fc2`` (c, h), with biases, make the channel weights; ``in_proj`` (k, 2 w, w) and ``out_proj``
    (k, w, w); ``conv`` (c, 1, j, j); ``x_proj`` (k, r + 2 n, w), ``dt_proj`` (k, w, r), ``dt_bias``, ``D`` (k, w) and
    ``A_log`` (k, w, n) of the scan; ``skip`` (1); all others (c).
    """

    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    in_proj: Tensor
    out_proj: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    conv: Tensor
    conv_bias: Tensor
    out_norm: Tensor
    out_norm_bias: Tensor
    skip: Tensor
    norm: Tensor
    norm_bias: Tensor


HALVES = 8  # of the weights, which have the dtype of products; the others are in float32


class Plan(NamedTuple):
    """What does not learn: orders of the scan and their visits, taps of the convolution, eps of both norms."""

    orders: Tensor
    visits: Visits | None
    taps: Tensor
    inverse_taps: Tensor
    out_norm_eps: float
    norm_eps: float


def has_group_mixer(x: Tensor, plan: Plan, weights: Weights, backend: str | None) -> bool:
    """Whether :func:`group_mixer` serves the map x (b, h, w, c) and all weights: where `has_projected_scan` holds,
    orders visit every token, and weights are plain and of the dtypes that autocast leaves.
    """
    scan = weights.x_proj, weights.dt_proj, weights.dt_bias, weights.A_log, weights.D
    if not has_projected_scan(x, *scan, orders=plan.orders, visits=plan.visits, backend=backend):
        return False
    if plan.visits is None or not plan.visits.complete or any([type(weight) not in PLAIN for weight in weights]):
        return False
    return all([weight.dtype == x.dtype for weight in weights[:HALVES]]) and all(
        [weight.dtype == torch.float32 for weight in weights[HALVES:]]
    )


def group_mixer(x: Tensor, plan: Plan, weights: Weights) -> Tensor:
    """The norm of skip x s o, where s are the channel weights and o is what the groups make of x; both (b, l, c).

    s = sigmoid(fc2 relu(fc1 mean(x))) for each image. A group makes u and z of its channels (``in_proj``), convolves u,
    applies SiLU, scans along its order, normalises, gates by SiLU(z) and projects (``out_proj``).

    Raises:
        NotImplementedError: second derivatives.
    """
    if torch.is_grad_enabled():
        return _GroupMixer.apply(x, plan, *weights)
    return kernels(_TRITON).forward(x.contiguous(), plan, weights, False)[0]


class _GroupMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *weights: Tensor) -> Tensor:
        x = x.contiguous()
        out, saved = kernels(_TRITON).forward(x, plan, Weights(*weights), True)
        ctx.save_for_backward(x, *plan[:1], *plan[2:4], *weights, *saved)
        ctx.visits, ctx.eps = plan.visits, plan[4:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, orders, taps, inverse_taps, *tensors = ctx.saved_tensors
        weights, saved = Weights(*tensors[: len(Weights._fields)]), tensors[len(Weights._fields) :]
        plan = Plan(orders, ctx.visits, taps, inverse_taps, *ctx.eps)
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            dx, dweights = kernels(_TRITON).backward(grad.contiguous(), x, plan, weights, saved)
        dx, *dweights = first_order("GroupMamba's mixer", (dx, *dweights), (grad, x, *weights))
        return dx, None, *dweights
