"""The `cpu` backend of LayerNorm and RMSNorm, part of the same C++ library as the scan's.

The residual sum in front, the norm, and the conversion to the dtype behind are one pass through memory. Results are
bitwise the same for any number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.native import NormCall, pointer, run
from backbones.ops.rows import matrix
from backbones.ops.tracing import register_fake, runs_eagerly

DTYPES = (torch.float32, torch.bfloat16)  # that the kernel reads and writes


def _run(
    direction: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    branch: torch.dtype | None, out: torch.dtype, rows: dict[str, Tensor | None], **results: Tensor | None,
) -> None:  # fmt: skip
    """Calls the kernel. ``rows`` are the inputs beside x by name, ``results`` the record's buffers."""
    rows = {name: None if t is None else matrix(t) for name, t in {"x": x, **rows}.items()}
    half = torch.bfloat16
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    call = NormCall(
        rows=x.numel() // x.shape[-1], c=x.shape[-1], threads=torch.get_num_threads(), centred=centred,
        x_bf16=x.dtype == half, branch_bf16=branch == half, y_bf16=out == half,
        weight_bf16=weight is not None and weight.dtype == half, weight=pointer(weight), bias=pointer(bias), eps=eps,
        **{name: pointer(t) for name, t in {**rows, **results}.items()},
        **{f"{name}_row": t.stride(0) for name, t in rows.items() if t is not None},
    )  # fmt: skip
    run(direction, call)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x + branch in the dtype of x, no elements where there is no branch; its norm in ``dtype``; its statistics."""
    total = x.new_empty(0 if branch is None else x.shape)
    y = x.new_empty(x.shape, dtype=dtype)
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    kind = None if branch is None else branch.dtype
    _run(
        "forward", x, weight, bias, eps, centred, kind, dtype, {"branch": branch}, total=total, y=y,
        statistics=statistics,
    )  # fmt: skip
    return total, y, statistics


def backward(
    grad: Tensor, stream: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, centred: bool,
    branch: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the branch, and of weight and bias (2, c) in float32.

    The branch's has no elements where there is no branch, or one of the dtype of x, whose gradient is that of x.

    Args:
        grad: of the norm.
        stream: of ``total`` by other ways, in its dtype, or None.
        total: what was normalised.
        statistics: from `forward`.
        branch: its dtype, or None.
    """
    dx = total.new_empty(total.shape)
    dbranch = None if branch in (None, total.dtype) else total.new_empty(total.shape, dtype=branch)
    sums = total.new_empty((2, total.shape[-1]), dtype=torch.float32)
    _run(
        "backward", total, weight, None, 0.0, centred, branch, grad.dtype, {"grad": grad, "stream": stream},
        dx=dx, dbranch=dbranch, statistics=statistics, dweight=sums[0], dbias=sums[1],
    )  # fmt: skip
    return dx, total.new_empty(0) if dbranch is None else dbranch, sums


_library = torch.library.Library("backbones", "FRAGMENT")
_schemas = {
    "norm": (
        "(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, bool centred, ScalarType dtype)"
        " -> (Tensor, Tensor, Tensor)",
        forward,
    ),
    "norm_backward": (
        "(Tensor grad, Tensor? stream, Tensor total, Tensor? weight, Tensor statistics, bool centred, "
        "ScalarType? branch) -> (Tensor, Tensor, Tensor)",
        backward,
    ),
}
for _name, (_schema, _function) in _schemas.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _function, "CPU")
norm_op = torch.ops.backbones.norm.default
norm_backward_op = torch.ops.backbones.norm_backward.default


@register_fake(_library, "norm")
def _(x, branch, weight, bias, eps, centred, dtype):  # type: ignore[no-untyped-def]
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=dtype), statistics


@register_fake(_library, "norm_backward")
def _(grad, stream, total, weight, statistics, centred, branch):  # type: ignore[no-untyped-def]
    dbranch = total.new_empty(0) if branch in (None, total.dtype) else total.new_empty(total.shape, dtype=branch)
    return total.new_empty(total.shape), dbranch, total.new_empty((2, total.shape[-1]), dtype=torch.float32)


def normalise(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + branch in the dtype of x, without elements where there is no branch, and its norm in ``dtype``.

    Used for both, the gradient of x needs no sum of its own, and that of the branch no conversion.
    """
    arguments = (x, branch, weight, bias, eps, centred, dtype)
    return _Normalise.apply(*arguments) if torch.is_grad_enabled() else norm_op(*arguments)[:2]


class _Normalise(torch.autograd.Function):
    # `register_autograd` would do the same in twice the time.

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, branch, weight, bias, _, ctx.centred, _ = arguments
        total, y, statistics = norm_op(*arguments)
        ctx.save_for_backward(x if branch is None else total, weight, statistics)
        ctx.set_materialize_grads(False)
        ctx.branch, ctx.bias = None if branch is None else branch.dtype, None if bias is None else bias.dtype
        if branch is None:
            ctx.mark_non_differentiable(total)
        return total, y

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nobody reads the norm
            dbranch = None if stream is None else stream.to(ctx.branch)
            return stream, dbranch, None, None, None, None, None
        total, weight, statistics = ctx.saved_tensors
        stream = None if ctx.branch is None else stream
        results = norm_backward_op(grad, stream, total, weight, statistics, ctx.centred, ctx.branch)
        name = "layer_norm" if ctx.centred else "rms_norm"
        dx, dbranch, sums = first_order(name, results, (grad, stream, total, weight))
        dweight = None if weight is None else sums[0].to(weight.dtype)
        dbias = None if ctx.bias is None else sums[1].to(ctx.bias)
        if ctx.branch is None:
            dbranch = None
        elif ctx.branch == dx.dtype:
            dbranch = dx
        return dx, dbranch, dweight, dbias, None, None, None


def reads(x: Tensor, dtype: torch.dtype, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel serves such tensors, and a result in ``dtype``, outside torch.compile, which fuses PyTorch's
    own operations.
    """
    known = all(t is None or t.dtype in DTYPES for t in (x, branch, weight, bias)) and dtype in DTYPES
    return known and (bias is None or (weight is not None and bias.dtype == weight.dtype)) and runs_eagerly(x)
