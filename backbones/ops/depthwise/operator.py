"""Depthwise convolution of channels-last tokens that reads its taps through a table.

The table does for a convolution what an order does for the selective scan: a causal convolution along any traversal
and a window over a grid, with stride or dilation, are one operator that copies, flips and transposes nothing.
`backbones.patterns.taps` makes the tables.

>>> import torch
>>> from backbones.ops import depthwise_conv
>>> from backbones.patterns.taps import window_taps
>>> x, weight = torch.randn(2, 5 * 7, 4), torch.randn(1, 4, 3 * 3)
>>> depthwise_conv(x, weight, None, *window_taps(5, 7, kernel_size=3), silu=True).shape
torch.Size([2, 35, 1, 4])
"""

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from backbones.ops.depthwise import naive as depthwise_naive
from backbones.ops.derivatives import empty_result, first_order
from backbones.ops.dispatch import choose_for
from backbones.ops.tracing import is_watched, register_fake, runs_eagerly

_MOST_PASSED = 4096  # images of ever new sizes


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    inverse_taps: Tensor,
    *,
    silu: bool = False,
    gelu: bool = False,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolves l tokens to m, for k orders at once, each channel by itself::

        y[:, i, k] = act(bias[k] + sum_j weight[k, :, j] x[:, taps[k, j, i]])

    Args:
        x: (b, l, c), read by every order.
        weight: (k, c, j).
        bias: (k, c), or None.
        taps: (k, j, m) integers, the token that tap j reads for output i, or -1, which reads zeros.
        inverse_taps: (k, j, l) integers, the output that reads a token with tap j, or -1. The gradient goes by it: it
            has to be the inverse of ``taps``, which is not checked, so no tap may read a token for two outputs.
        silu: apply SiLU. Without it and ``gelu``, ``act`` is the identity.
        gelu: apply GELU instead.
        residual: add x[:, i] before ``act``; for one order, and as many outputs as tokens.
        backend: "naive", "cpu" or "triton"; None takes the fastest that runs on the tensors' device.

    Returns:
        (b, m, k, c) in ``x.dtype``, stored order by order as (k, b, m, c). Accumulated in float32 (float64 where ``x``
        is float64); the gradients are deterministic.

    Raises:
        ValueError: an argument has another shape, dtype or device than stated, is empty (but for a batch of 0,
            whose result is empty), or, on a CPU, names a token or output out of range; the message names it. Also
            where ``backend`` is given and cannot run, both activations are asked for, or a residual that has another
            shape than the result.
        NotImplementedError: forward-mode or ``torch.func`` derivatives, or second ones, through another backend than
            "naive".
    """
    eager = isinstance(x, Tensor) and runs_eagerly(x)
    if eager:
        _check_once(x, weight, bias, taps, inverse_taps)
    else:
        _check(x, weight, bias, taps, inverse_taps)
    if gelu and silu:
        raise ValueError("gelu: got True, expected False beside silu")
    if residual and (weight.shape[0] != 1 or taps.shape[2] != x.shape[1]):
        raise ValueError(
            f"residual: got True with {weight.shape[0]} orders and {taps.shape[2]} outputs, expected 1 order and "
            f"{x.shape[1]} outputs"
        )
    backend, transformed = choose_for("depthwise_conv", backend, x, weight, bias)
    if x.shape[0] == 0:
        return empty_result((0, taps.shape[2], *weight.shape[:2]), x, weight, bias)
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    unread = backend == "cpu" and x.dtype == torch.float16  # by the kernel
    arguments = (
        x.float() if unread else x,
        _as(weight, state_dtype),
        None if bias is None else _as(bias, state_dtype),
        _as(taps, torch.int32),
        _as(inverse_taps, torch.int32),
    )
    if backend == "triton" and eager and not transformed and not is_watched():
        # The operator itself is as long as two launches.
        run = _Conv.apply if torch.is_grad_enabled() else _module(backend).forward
        return run(*arguments, silu, gelu, residual).permute(1, 2, 0, 3)
    y = depthwise_naive.forward(*arguments, silu) if transformed else conv_op(*arguments, silu, backend)
    y = (y if y.dtype == x.dtype else y.to(x.dtype)).permute(1, 2, 0, 3)
    y = x.unsqueeze(2) + y if residual else y
    return F.gelu(y) if gelu else y


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


_passed: set[tuple[Any, ...]] = set()


def _check_once(*tensors: Tensor | None) -> None:
    """`_check`, unless it passed such tensors before: it looks at types, shapes, dtypes and devices alone."""
    key = tuple([(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in tensors])
    if key not in _passed:
        _check(*tensors)  # type: ignore[arg-type]
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed.add(key)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor) -> None:
    given = {"x": x, "weight": weight, "bias": bias, "taps": taps, "inverse_taps": inverse_taps}
    tensors: dict[str, Any] = {name: tensor for name, tensor in given.items() if tensor is not None or name != "bias"}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {x.device}, where x is")
        if name.endswith("taps"):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"{name}: got dtype {tensor.dtype}, expected an integer dtype")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected a real floating dtype")
        dims = 2 if name == "bias" else 3
        if tensor.dim() != dims or 0 in tensor.shape[name == "x" :]:
            but = " but the first" if name == "x" else ""
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {dims} dimensions, none of them 0{but}"
            )

    (_, length, c), (k, _, j) = x.shape, weight.shape
    expected = {"weight": (k, c, j), "bias": (k, c), "taps": (k, j, taps.shape[2]), "inverse_taps": (k, j, length)}
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensors[name].shape)}, expected {shape}, "
                f"given x {tuple(x.shape)} and weight {tuple(weight.shape)}"
            )


_MODULES = {
    "naive": "backbones.ops.depthwise.naive",
    "cpu": "backbones.ops.depthwise.cpu",
    "triton": "backbones.ops.depthwise.triton",
}


@functools.cache
def _module(backend: str) -> ModuleType:
    """The backend's ``forward`` and ``backward``; imported when first used, because Triton takes long."""
    return import_module(_MODULES[backend])


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor taps, Tensor inverse_taps"


# `torch.library.custom_op` would do the same, but looks for aliases in every call, which takes longer than a launch.
_library = torch.library.Library("backbones", "FRAGMENT")
_library.define(
    f"depthwise_conv({_TENSORS}, bool silu, str backend) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)  # y (k, b, m, c), contiguous
_library.define(
    f"depthwise_conv_backward(Tensor grad, {_TENSORS}, bool silu, str backend) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)  # gradients of x, weight and bias, the last one without elements where there is no bias
conv_op = torch.ops.backbones.depthwise_conv.default
conv_backward_op = torch.ops.backbones.depthwise_conv_backward.default


@torch.library.impl(_library, "depthwise_conv", "CompositeExplicitAutograd")
def _(*args):  # type: ignore[no-untyped-def]
    return _module(args[-1]).forward(*args[:-1])


@torch.library.impl(_library, "depthwise_conv_backward", "CompositeExplicitAutograd")
def _(*args):  # type: ignore[no-untyped-def]
    return _module(args[-1]).backward(*args[:-1])


@register_fake(_library, "depthwise_conv")
def _(x, weight, bias, taps, inverse_taps, silu, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(weight.shape[0], x.shape[0], taps.shape[2], x.shape[2])


@register_fake(_library, "depthwise_conv_backward")
def _(grad, x, weight, bias, taps, inverse_taps, silu, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    args = (grad, *tensors, ctx.silu)
    # The gradient of plain PyTorch is autograd's own, which does not run inside of an operator.
    if ctx.backend == "naive":
        dx, dweight, dbias = depthwise_naive.backward(*args)
    else:
        results = conv_backward_op(*args, ctx.backend)
        dx, dweight, dbias = first_order("depthwise_conv", results, (grad, *tensors[:3]))
    return dx, dweight, None if tensors[2] is None else dbias, None, None, None, None


class _Conv(torch.autograd.Function):
    """The operator on a GPU, where nobody looks on."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, *options: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, taps, inverse_taps)
        ctx.options = options
        return _module("triton").forward(x, weight, bias, taps, inverse_taps, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        results = _module("triton").backward(grad, *tensors, *ctx.options)
        if torch.is_grad_enabled():
            results = first_order("depthwise_conv", results, (grad, *tensors[:3]))
        dx, dweight, dbias = results
        return dx, dweight, None if tensors[2] is None else dbias, *[None] * 5


torch.library.register_autograd(conv_op, _autograd, setup_context=_setup_context, lib=_library)


def _forward_flops(x, weight, bias, taps, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """A multiplication and an addition a tap."""
    (b, _, c), (k, j, m) = x, taps
    return 2 * b * k * j * m * c


def _backward_flops(grad, x, weight, bias, taps, inverse_taps, silu, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """As much for the gradient of x and for that of the weights, and for SiLU's argument, computed again."""
    return (3 if silu else 2) * _forward_flops(x, weight, bias, taps)


# `register_flop_formula` of torch 2.4 files a formula where its counter does not look.
flop_registry[torch.ops.backbones.depthwise_conv] = shape_wrapper(_forward_flops)
flop_registry[torch.ops.backbones.depthwise_conv_backward] = shape_wrapper(_backward_flops)
