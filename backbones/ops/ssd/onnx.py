"""State-space duality in ONNX: PyTorch's own operations, but for the one that adds up the visits of a token."""

from collections.abc import Callable
from typing import Any


def index_add_translation(op: Any) -> Callable:
    """``aten.index_add`` for ``torch.onnx.export``; ``op`` is a set of ``onnxscript``, such as ``opset20``.

    The exporter's own is a ScatterND, in which onnxruntime may lose an addend; see :mod:`backbones.ops.scan.onnx`.
    """

    def index_add(x, dim: int, index, source, alpha: float = 1.0):  # type: ignore[no-untyped-def]
        shape = [1] * len(source.shape)
        shape[dim] = -1
        rows = op.Expand(op.Reshape(op.Cast(index, to=7), shape), op.Shape(source))
        source = source if alpha == 1 else op.Mul(source, alpha)
        return op.ScatterElements(x, rows, source, axis=dim, reduction="add")

    return index_add
