"""The depthwise convolution in ONNX: standard operators."""

from collections.abc import Callable
from typing import Any


def translation(op: Any) -> Callable:
    """The operator for ``torch.onnx.export``; ``op`` is a set of ``onnxscript``, such as ``opset20``."""

    def depthwise_conv(  # type: ignore[no-untyped-def]
        x, weight, bias, taps, inverse_taps, silu: bool, backend: str
    ):  # fmt: skip
        k, c, j = weight.shape
        tokens = op.Cast(taps, to=7)
        tokens = op.Where(op.Less(tokens, 0), x.shape[1], tokens)  # the zero behind the last token
        read = op.Gather(op.Pad(x, [0, 0, 0, 0, 1, 0]), op.Transpose(tokens, perm=[1, 0, 2]), axis=1)  # (b, j, k, m, c)
        weight = op.Reshape(op.Transpose(weight, perm=[2, 0, 1]), [j, k, 1, c])
        y = op.ReduceSum(op.Mul(read, weight), [1], keepdims=0)
        if bias is not None:
            y = op.Add(y, op.Unsqueeze(bias, [1]))
        if silu:
            y = op.Mul(y, op.Sigmoid(y))
        return op.Transpose(y, perm=[1, 0, 2, 3])

    return depthwise_conv
