"""mmengine's counters of operations and activations, taught this library's operators when this is imported."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import Handle, generic_activation_jit, get_shape
from torch.utils.flop_counter import flop_registry, shape_wrapper

from backbones.analysis.flops import COUNTED_ONCE, as_counted
from backbones.ops.scan.projection import _PerOrderProduct


def _handle(op: Any) -> Handle:
    """A handle of ``FlopAnalyzer`` for ``op``, made of the formula of PyTorch's counter."""

    formula = shape_wrapper(COUNTED_ONCE[op]) if op in COUNTED_ONCE else flop_registry[op]

    def flops(inputs: list[Any], outputs: list[Any]) -> int:
        arguments = [_on_meta(value) for value in inputs]
        return as_counted(op, formula(*arguments, out_val=_on_meta(outputs[0])))

    return flops


def _on_meta(value: Any) -> Any:
    """A tensor of the shape that ``value`` has in a trace; of other values, what they are."""
    shape = get_shape(value)
    return value.toIValue() if shape is None else torch.empty(shape, device="meta")


def _per_order_product(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(get_shape(inputs[0])) * get_shape(inputs[1])[1]


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The products q k^T and softmax(.) v."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


for _op in list(flop_registry):
    _name = _op._qualified_op_name
    if _name.startswith("backbones::") and not _name.endswith("_backward"):
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[_name] = _handle(_op)
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[_name] = generic_activation_jit()
# A trace shows an autograd function as a whole.
_product = f"prim::PythonOp.{_PerOrderProduct.__name__}"
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[_product] = _per_order_product
complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[_product] = generic_activation_jit()
# mmengine does not know it; VSSD's last stage has it.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault("aten::scaled_dot_product_attention", _attention)
