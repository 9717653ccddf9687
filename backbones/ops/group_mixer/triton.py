"""The mixer's forward and backward pass: products by cuBLAS, the scan, the convolution and `kernels` between them."""

# mypy: ignore-errors

from typing import NamedTuple

import torch
from torch import Tensor

from backbones.ops.depthwise import triton as depthwise
from backbones.ops.group_mixer import kernels
from backbones.ops.group_mixer.operator import Plan, Weights
from backbones.ops.scan.triton import projected
from backbones.ops.triton_host import device_of


class _Saved(NamedTuple):
    """What forward leaves to backward: ``uz`` (k, b l, 2 w); u convolved, and y scanned, gated and projected, all
    (k, b l, w); the means, hidden values and channel weights of each image; and what the scan saves.
    """

    uz: Tensor
    u: Tensor
    scanned: Tensor
    gated: Tensor
    projected: Tensor
    mean: Tensor
    hidden: Tensor
    scale: Tensor
    scan_x: Tensor
    scan_blocks: Tensor
    scan_delta: Tensor
    scan_A: Tensor
    scan_states: Tensor


def forward(x: Tensor, plan: Plan, weights: Weights, save: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :mod:`backbones.ops.group_mixer.operator`."""
    with device_of(x):
        b, length, _ = x.shape
        k, _, width = weights.in_proj.shape
        mean = x.mean(1, dtype=torch.float32)
        hidden, scale = kernels.channel_weights(mean, weights.fc1, weights.fc1_bias, weights.fc2, weights.fc2_bias)
        uz = torch.bmm(_groups(x, k), weights.in_proj.transpose(1, 2))
        u, z = _halves(uz)
        u = depthwise.forward(u.view(k, b, length, width), *_conv(weights, k), *plan[2:4], True)
        y = torch.empty_like(u)
        by_token = u.permute(1, 2, 0, 3), y.permute(1, 2, 0, 3)
        _, scan = projected.forward(by_token[0], *_scan(weights, plan), 0, plan.visits, by_token[1], save)
        y = y.view(k, b * length, width)
        gated = kernels.gated_norm(y, z, weights.out_norm, weights.out_norm_bias, plan.out_norm_eps)
        o = torch.bmm(gated, weights.out_proj.transpose(1, 2))
        out = kernels.modulated_norm(o, x, scale, weights.skip, weights.norm, weights.norm_bias, plan.norm_eps)
        if scan is None:
            return out, ()
        return out, _Saved(uz, u, y, gated, o, mean, hidden, scale, *scan)


def backward(grad: Tensor, x: Tensor, plan: Plan, weights: Weights, tensors: list[Tensor]) -> tuple[Tensor, Weights]:
    """Gradients of x and of the weights."""
    with device_of(x):
        b, length, _ = x.shape
        k, _, width = weights.in_proj.shape
        saved = _Saved(*tensors)
        do, dx, dnorm, dnorm_bias, sums = kernels.modulated_norm_backward(
            grad, saved.projected, x, saved.scale, weights.skip, weights.norm, plan.norm_eps
        )
        dmean, dfc1, dfc1_bias, dfc2, dfc2_bias, dskip = kernels.channel_weights_backward(
            sums, length, saved.mean, saved.hidden, saved.scale, weights.skip, *weights[:4]
        )
        dx += dmean.unsqueeze(1)

        dout_proj = projected.product_per_order(do, saved.gated, b)
        duz = torch.empty_like(saved.uz)
        (u, z), (du, dz) = _halves(saved.uz), _halves(duz)
        dy, dout_norm, dout_norm_bias = kernels.gated_norm_backward(
            torch.bmm(do, weights.out_proj), saved.scanned, z, weights.out_norm, weights.out_norm_bias,
            plan.out_norm_eps, dz,
        )  # fmt: skip
        shape = k, b, length, width
        x_proj, dt_proj, dt_bias, _, D, *options = _scan(weights, plan)
        dscanned, *dscan = projected.backward(
            dy.view(shape).permute(1, 2, 0, 3), projected.Saved(*saved[8:]), saved.u.permute(1, 2, 0, 3),
            x_proj, dt_proj, dt_bias, D, *options, 0, plan.visits,
        )  # fmt: skip
        _, dconv, dconv_bias = depthwise.backward(
            dscanned.permute(2, 0, 1, 3), u.view(shape), *_conv(weights, k), *plan[2:4], True, dx=du.view(shape)
        )
        din_proj = projected.product_per_order(duz, _groups(x, k), b)
        _groups(dx, k).baddbmm_(duz, weights.in_proj)
        return dx, Weights(
            dfc1, dfc1_bias, dfc2, dfc2_bias, din_proj, dout_proj, *dscan, dconv.view_as(weights.conv),
            dconv_bias.flatten(), dout_norm, dout_norm_bias, dskip, dnorm, dnorm_bias,
        )  # fmt: skip


def _groups(x: Tensor, k: int) -> Tensor:
    """The groups of channels of x (b, l, c), as (k, b l, c / k), a view."""
    return x.view(-1, k, x.shape[-1] // k).transpose(0, 1)


def _halves(uz: Tensor) -> tuple[Tensor, Tensor]:
    return uz.tensor_split(2, dim=-1)


def _conv(weights: Weights, k: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of each group's convolution."""
    conv = weights.conv
    return conv.view(k, conv.shape[0] // k, -1), weights.conv_bias.view(k, -1)


def _scan(weights: Weights, plan: Plan) -> tuple:
    """What the scan reads besides u."""
    return *weights[6:11], plan.orders, "per_order"
