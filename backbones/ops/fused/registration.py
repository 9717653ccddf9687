"""Registers the operators (x, other, constant) with `torch.library`: their schemas, shapes and gradients."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.tracing import register_fake, runs_eagerly

_library = torch.library.Library("backbones", "FRAGMENT")


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def register(name: str, other: str, constant: str, kernel: ModuleType) -> Any:
    """The operator ``backbones::name(x, other, constant)``, whose result is shaped as x and gradients as x and other.

    Args:
        name: of the operator; that of its backward pass ends in "_backward".
        other: name of the second tensor.
        constant: name of the number.
        kernel: the `cpu` backend, a module with ``forward`` and ``backward``.
    """
    tensors = f"Tensor x, Tensor {other}, float {constant}"
    schemas = {
        name: (f"({tensors}) -> Tensor", kernel.forward),
        f"{name}_backward": (f"(Tensor grad, {tensors}) -> (Tensor, Tensor)", kernel.backward),
    }
    for each, (schema, function) in schemas.items():
        _library.define(each + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(each, function, "CPU")
    op, backward = (getattr(torch.ops.backbones, each).default for each in schemas)

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.constant = inputs[2]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which gradient checkpointing unpacks once only
        results = backward(grad, *saved, ctx.constant)
        return *first_order(name, results, (grad, *saved)), None

    register_fake(_library, name)(lambda x, other, constant: _contiguous_like(x)[0])
    register_fake(_library, f"{name}_backward")(lambda grad, x, other, constant: _contiguous_like(x, other))
    torch.library.register_autograd(op, differentiate, setup_context=setup_context, lib=_library)
    return op


def reads(x: Tensor, other: Tensor) -> bool:
    """Whether the C++ kernels serve such tensors outside torch.compile, which fuses PyTorch's own operations."""
    return (
        x.device.type == "cpu"
        and x.dtype == other.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and runs_eagerly(x)
    )
