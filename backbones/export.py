"""Models for other runtimes: ONNX files without any custom operator, and ``torch.export`` programs.

In ONNX the selective scan becomes loop-free arithmetic. h_t = a_t h_(t-1) + x_t is solved by halving: two steps are one
of the same form, so the odd states follow from a scan of half the length and the even ones from them (Blelloch 1990,
Prefix sums and their applications). The work is twice that of the loop, in 2 log2(t) parallel operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

import backbones.ops  # noqa: F401  (registers the operators)

OPSET = 20


def export_program(model: nn.Module, image: Tensor) -> ExportedProgram:
    """Traces ``model`` for images of the size of ``image`` (b, in_chans, height, width) and any batch size.

    The scan stays one operator: whoever loads the saved program imports ``backbones.ops`` first.
    """
    example = image.expand(2, -1, -1, -1) if len(image) == 1 else image  # a batch of 1 would be taken for a constant
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))


def export_onnx(model: nn.Module, image: Tensor, path: str | Path) -> None:
    """Writes ``model`` as ONNX (opset 20, standard operators only) for images as ``image``, in any number.

    Its input is called "image"; its output "logits" or, of a model that gives several, "output_0" and so on.

    Args:
        model: in eval mode and in float32.
        image: (b, in_chans, height, width); the sides are fixed by it, the batch size is not.
        path: the file to write.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is in training mode or in another precision.
    """
    if model.training:
        raise ValueError("model: in training mode, call eval() first")
    foreign = {x.dtype for x in model.parameters()} - {torch.float32}
    if foreign:
        raise ValueError(f"model: has parameters of {foreign.pop()}, expected torch.float32")
    to_onnx(export_program(model, image), ["image"]).save(path)


def to_onnx(program: ExportedProgram, input_names: Sequence[str]) -> ONNXProgram:
    """A program whose scans are the operator of this library, in ONNX; outputs are named as by :func:`export_onnx`."""
    outputs = len(program.graph_signature.user_outputs)
    with warnings.catch_warnings():
        # The exporter copies trees with a class that PyTorch itself has deprecated.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=["logits"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
            custom_translation_table=_translations(),
        )
    assert exported is not None  # with dynamo=True it never is
    return exported


def _translations() -> dict[Callable, Callable]:
    """The operators in ONNX, for the exporter; made here because onnxscript is optional."""
    import onnxscript

    op: Any = onnxscript.opset20

    def selective_scan(  # type: ignore[no-untyped-def]
        u, delta, A, B, C, D, orders, delta_bias, dt_weight,
        delta_softplus: bool, out: str, local_window: int, save: bool, visits, backend: str,
    ):  # fmt: skip
        length, (k, c, n) = delta.shape[1], A.shape
        t = length if orders is None else orders.shape[1]
        if orders is not None:
            tokens = op.Transpose(op.Cast(orders, to=7), perm=[1, 0])  # (t, k) int64
            visits = op.Add(op.Mul(tokens, k), list(range(k)))  # rows of an (l k, ...) table

        def steps(x, width):  # type: ignore[no-untyped-def]
            """(b, l, k, width) to (t, k, b, width): a step is one contiguous block."""
            x = op.Transpose(x, perm=[1, 2, 0, 3])
            return x if orders is None else op.Gather(op.Reshape(x, [length * k, -1, width]), visits, axis=0)

        if len(u.shape) == 4:
            u = steps(u, c)
        else:
            u = op.Transpose(u, perm=[1, 0, 2])
            u = op.Unsqueeze(u, [1]) if orders is None else op.Gather(u, tokens, axis=0)
        dt, B, C = steps(delta, delta.shape[3]), steps(B, n), steps(C, n)
        if dt_weight is not None:
            dt = op.MatMul(dt, op.Transpose(dt_weight, perm=[0, 2, 1]))
        if delta_bias is not None:
            dt = op.Add(dt, op.Unsqueeze(delta_bias, [1]))
        if delta_softplus:
            dt = op.Softplus(dt)
        dt = op.Unsqueeze(dt, [-1])
        decays = op.Exp(op.Mul(dt, op.Unsqueeze(A, [1])))  # (t, k, b, c, n), as all that follows
        inputs = op.Mul(op.Mul(dt, op.Unsqueeze(u, [-1])), op.Unsqueeze(B, [-2]))
        h = _states(op, decays, inputs, (t, k, c, n))
        if local_window > 1:
            h = op.Add(h, _later(op, decays, inputs, (t, k, c, n), local_window))
        y = op.ReduceSum(op.Mul(h, op.Unsqueeze(C, [-2])), [-1], keepdims=0)
        if D is not None:
            y = op.Add(y, op.Mul(op.Unsqueeze(D, [1]), u))

        if out == "per_step":
            y = op.Transpose(y, perm=[2, 0, 1, 3])
        elif out == "per_order":
            if orders is not None:
                y = op.Reshape(_added(op, y, visits, (t * k, c), length * k), [length, k, -1, c])
            y = op.Transpose(y, perm=[2, 0, 1, 3])
        else:
            y = op.ReduceSum(y, [1], keepdims=0) if orders is None else _added(op, y, tokens, (t * k, c), length)
            y = op.Transpose(y, perm=[1, 0, 2])
        return y, op.ConstantOfShape(op.Constant(value_ints=[0]))

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

    return {
        torch.ops.backbones.selective_scan.default: selective_scan,
        torch.ops.backbones.depthwise_conv.default: depthwise_conv,
    }


def _states(op: Any, a: Any, x: Any, shape: tuple[int, int, int, int]) -> Any:
    """h_t = a_t h_(t-1) + x_t along the first axis; ``shape`` is (t, k, c, n)."""
    t, k, c, n = shape
    if t == 1:
        return x
    half = t // 2
    even_a, even_x = (op.Slice(y, [0], [2 * half], [0], [2]) for y in (a, x))
    odd_a, odd_x = (op.Slice(y, [1], [t], [0], [2]) for y in (a, x))
    odd = _states(op, op.Mul(even_a, odd_a), op.Add(op.Mul(odd_a, even_x), odd_x), (half, k, c, n))
    even = op.Slice(x, [0], [1], [0])
    if t > 2:
        before = op.Slice(odd, [0], [(t - 1) // 2], [0])
        a, x = (op.Slice(y, [2], [t], [0], [2]) for y in (a, x))
        even = op.Concat(even, op.Add(op.Mul(a, before), x), axis=0)
    last = op.Slice(even, [half], [half + 1], [0]) if t % 2 else None
    even = op.Slice(even, [0], [half], [0]) if t % 2 else even
    pairs = op.Concat(op.Unsqueeze(even, [1]), op.Unsqueeze(odd, [1]), axis=1)
    pairs = op.Reshape(pairs, [2 * half, k, -1, c, n])
    return pairs if last is None else op.Concat(pairs, last, axis=0)


def _later(op: Any, decays: Any, inputs: Any, shape: tuple[int, int, int, int], window: int) -> Any:
    """What each state receives from the later steps of its window, decayed back to it."""
    t, k, c, n = shape
    pads = [0] * 5 + [-t % window] + [0] * 4
    decays, inputs = (
        op.Split(op.Reshape(op.Pad(y, pads), [-(-t // window), window, k, -1, c, n]), axis=1, num_outputs=window)
        for y in (decays, inputs)
    )
    received = [op.Mul(decays[-1], 0.0)]
    later = inputs[-1]
    for decay, x in zip(decays[-2::-1], inputs[-2::-1], strict=True):
        received.append(op.Mul(decay, later))
        later = op.Add(received[-1], x)
    y = op.Reshape(op.Concat(*received[::-1], axis=1), [-(-t // window) * window, k, -1, c, n])
    return op.Slice(y, [0], [t], [0])


def _added(op: Any, y: Any, rows: Any, shape: tuple[int, int], length: int) -> Any:
    """The (t, k, b, c) outputs added at ``rows`` (t, k) of a (length, b, c) table.

    onnxruntime runs ScatterND on several threads and may lose an addend where a row comes twice (seen in 1.32: with two
    threads and 12,544 rows of 96 numbers, in a third of the runs). It runs ScatterElements on one.
    """
    y = op.Reshape(y, [shape[0], -1, shape[1]])
    rest = op.Shape(y, start=1)
    table = op.Expand(0.0, op.Concat(op.Constant(value_ints=[length]), rest, axis=0))
    index = op.Expand(op.Reshape(rows, [-1, 1, 1]), op.Shape(y))
    return op.ScatterElements(table, index, y, axis=0, reduction="add")
