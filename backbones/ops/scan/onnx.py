"""The selective scan in ONNX: standard operators, without a loop.

h_t = a_t h_(t-1) + x_t is solved by halving: two steps are one of the same form, so the odd states follow from a scan
of half the length and the even ones from them (Blelloch 1990, Prefix sums and their applications). The work is twice
that of the loop, in 2 log2(t) parallel operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def translation(op: Any) -> Callable:
    """The operator for ``torch.onnx.export``; ``op`` is a set of ``onnxscript``, such as ``opset20``."""

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

    return selective_scan


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
    """The contribution of the later steps of its window to each state, decayed back to it."""
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
