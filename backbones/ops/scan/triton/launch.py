"""Buffers and launches of the Triton scan.

Bytes that pass through memory for each step, order and channel, n = 1, e bytes an element (2 or 4), u shared by k
orders:

===========================  ==========================================================================
forward                      e (delta) + e/k (u, read by k orders: once, the rest comes from the cache)
  out="per_order"/"per_step" + e
  out="sum", k > 1           + e written per order, e read and e/k written by the sum of the orders
  saved for backward         + 4 n / 64
  in segments                + e (delta) + e (u) for the first of two readings
backward                     2 e (delta, again from the cache in the second level) + e/k (u) + e/k (grad) + e (ddelta)
                             + e per order (du), and e read + e/k written by the sum where u is shared
===========================  ==========================================================================

B, C and their gradients are n/c of that: the gradients are summed over c in the kernel, and the partial sums of the
blocks of channels in float32 by atomic addition, or, with one state, where they are few, and under
``torch.use_deterministic_algorithms``, in buffers that are summed in a fixed order. Nothing else depends on timing.
States are float32 throughout. With ``local_window`` everything is read twice and outputs are accumulated in float32
buffers; so are they where an order repeats tokens: its visits are written by step and gathered by token, since a sum
over repeats inside a running scan would be neither parallel nor reproducible.

Sums over orders add, in float32, per-order values rounded to the dtype of u: of four orders in bfloat16, the sum has a
relative RMS error of 2.4e-3, and one rounded only once 1.7e-3. Per-order values in float32 would double what the scan
writes and the sum reads, and the peak of memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backbones.ops.column_sums import column_sums
from backbones.ops.remember import remember
from backbones.ops.rows import contiguous_rows
from backbones.ops.scan.triton import CHUNK
from backbones.ops.scan.triton.common import (
    carry_kernel,
    gather_visits_kernel,
    segment_ends_kernel,
    sum_orders_kernel,
)
from backbones.ops.scan.triton.config import Config, backward_config, backward_window_config, forward_config
from backbones.ops.scan.triton.kernels_backward import backward_kernel
from backbones.ops.scan.triton.kernels_forward import forward_kernel
from backbones.ops.scan.triton.tables import order_facts, visits_of
from backbones.ops.scan.visits import Visits
from backbones.ops.triton_host import (
    Launch,
    cdiv,
    check_device,
    device_of,
    empty,
    launch,
    multiprocessors,
    next_power_of_2,
)

_SCRATCH_BYTES = 64 * 2**20  # of backward, whatever the problem
_SEGMENT_U = 4
_CARRIED = 16  # most segments through which a scan carries the state itself, which saves a launch
_WALK = ("segment", "segments", "chunk", "slots", "all_slots")  # in the kernels' order

# u, delta, A, B, C, D, orders and the bias: A as (k, n, c), which is how `decay_rates` lays it out, and the rows of u,
# delta, B and C without gaps.
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Scan:
    """What all calls have in common whose inputs have the same shapes, strides and dtypes, and their launches."""

    def __init__(
        self, tensors: Operands, softplus: bool, out: str, window: int, facts: Visits, processors: int
    ) -> None:  # fmt: skip
        u, delta, A, B, C, D, orders, bias = tensors
        self.b, self.length, self.k, self.c = delta.shape
        self.n = A.shape[1]
        self.steps = self.length if orders is None else orders.shape[1]
        self.shared = u.dim() == 3
        self.softplus, self.out = softplus, out
        self.window = min(window, self.steps)
        self.facts = facts
        self.dtype, self.device = u.dtype, u.device
        self.multiprocessors = processors
        shape = self.n, self.c, self.b * self.k, self.multiprocessors
        self.forward_config, self.backward_config = forward_config(*shape), backward_config(*shape)
        if self.window > 1:
            self.backward_config = backward_window_config(self.backward_config)
        self.strides = [_strides(x) for x in (u, delta, B, C)]
        self.flags: dict[str, Any] = dict(
            HAS_ORDERS=orders is not None,
            HAS_BIAS=bias is not None,
            SOFTPLUS=softplus,
            WIDE=self.is_wide(u, delta, B, C),
        )
        self.has_D = D is not None
        self.launches: dict[tuple[Any, ...], Launch] = {}  # by what else they depend on

    @classmethod
    def of(
        cls, tensors: Operands, softplus: bool, out: str, window: int, visits: Sequence[bool] | None
    ) -> "_Scan":  # fmt: skip
        """Made once for each key."""
        u, delta, A, B, C, D, orders, bias = tensors
        if orders is None or visits is None:
            facts = order_facts(orders, delta.shape[1], delta.shape[2])
        else:
            facts = Visits(*visits)
        processors = multiprocessors(u.device)
        steps = None if orders is None else orders.shape[1]
        key = (
            u.shape, u.stride(), u.dtype, delta.shape, delta.stride(), delta.dtype, A.shape, B.stride(), C.stride(),
            B.dtype, D is None, steps, bias is None, softplus, out, window, facts, processors, u.device, _CARRIED,
        )  # fmt: skip
        found = _scans.get(key)
        if found is None:
            made = cls(tensors, softplus, out, window, facts, processors)
            found = remember(_scans, key, made)
        return found

    def is_wide(self, *tensors: Tensor) -> bool:
        """Whether the offset of some row, in what is read or written, needs more than 31 bits."""
        widest = max(*(x.stride(1) for x in tensors), self.k * max(self.c, self.n))
        return max(self.length, self.steps) * widest >= 2**31

    def buffer(
        self, width: int, merged: bool, dtype: torch.dtype | None = None, by_step: bool = False,
        order_by_order: bool = False,
    ) -> Tensor:  # fmt: skip
        """(b, rows, k, width) to be written by a scan, or (b, rows, width) if it may write the sum over orders.

        ``order_by_order`` stores it as (k, b, rows, width).
        """
        gathered = self.facts.repeats and not by_step
        by_step |= self.facts.repeats
        dtype = torch.float32 if self.window > 1 or gathered else dtype or self.dtype
        merged &= self.merges
        shape = (self.b, self.steps if by_step else self.length, *(() if merged else (self.k,)), width)
        written = by_step or (self.facts.covers if merged else self.facts.complete)
        if order_by_order and not merged:
            shape = (self.k, *shape[:2], width)
        y = empty(shape, dtype, self.device) if written else torch.zeros(shape, dtype=dtype, device=self.device)
        return y.permute(1, 2, 0, 3) if order_by_order and not merged else y

    @property
    def merges(self) -> bool:
        """Whether no two visits meet in one row of the sum over orders."""
        return self.facts.disjoint and not self.facts.repeats

    def collect(self, buffer: Tensor, merged: bool, dtype: torch.dtype, orders: Tensor | None) -> Tensor:
        """A buffer that was written by step or by order, as (b, l, k, width), or (b, l, width) if ``merged``."""
        if self.facts.repeats:
            assert orders is not None
            width = buffer.shape[-1]
            visits, starts = visits_of(orders, self.length, per_order=not merged)
            rows = starts.shape[0] - 1
            batches = buffer.shape[0]
            y = empty((batches, rows, width), dtype, self.device)
            block = min(128, next_power_of_2(width))
            grid = (batches * rows, cdiv(width, block))
            launch(
                gather_visits_kernel, grid, (buffer, visits, starts, y), (self.steps * self.k, rows, width), 1,
                BLOCK=block,
            )  # fmt: skip
            return y if merged else y.view(batches, self.length, self.k, width)
        if buffer.dim() == 4 and merged:
            width = buffer.shape[-1]
            y = empty((self.b, self.length, width), dtype, self.device)
            run = self.launches.get(("sum", width, buffer.dtype, dtype))
            if run is None:
                block = min(128, next_power_of_2(width))
                rows = self.b * self.length
                grid = (cdiv(rows, 16), cdiv(width, block))
                run = Launch(sum_orders_kernel, grid, (rows, self.k, width), 4, ROWS=16, BLOCK_C=block)
                self.launches["sum", width, buffer.dtype, dtype] = run
            run(buffer, y)
            return y
        return _as_dtype(buffer, dtype)

    def segments(self, config: Config) -> tuple[int, int]:
        """(steps, number) of the segments of an order.

        One where that leaves 4 programs for every multiprocessor: more would read everything twice. Else enough for
        16.
        """
        programs = self.b * self.k * cdiv(self.c, config.BLOCK_C)
        if programs >= 4 * self.multiprocessors:
            return self.steps, 1
        wanted = cdiv(16 * self.multiprocessors, programs)
        segment = CHUNK * max(1, cdiv(self.steps, CHUNK) // wanted)
        return segment, cdiv(self.steps, segment)

    def carried(
        self, config: Config, segment: int, segments: int, x: Tensor, delta: Tensor, A: Tensor, V: Tensor,
        orders: Tensor | None, bias: Tensor | None, adjoint: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The states that enter every segment, from u and B, or, from the gradient of y and C, their gradients.

        Of few segments, what they add to the state and their sums of dt, for the next kernel to carry.
        """
        ends = empty((self.b * self.k, segments, self.n, self.c), torch.float32, self.device)
        totals = empty((self.b * self.k, segments, self.c), torch.float32, self.device)
        key = ("ends", adjoint, x.dtype, x.stride())
        run = self.launches.get(key)
        if run is None:
            blocks = cdiv(self.c, config.BLOCK_C)
            self.launches[key] = run = Launch(
                segment_ends_kernel, (self.b * self.k * segments * blocks,),
                (
                    *_strides(x), *self.strides[1], *_strides(V),
                    self.steps, self.k, self.c, self.n, segment, segments,
                ),
                config.num_warps, N=config.N, BLOCK_C=config.BLOCK_C, U=_SEGMENT_U, ADJOINT=adjoint,
                X_BY_STEP=adjoint and self.out == "per_step", **self.flags,
            )  # fmt: skip
        run(x, delta, A, V, orders, bias, ends, totals)
        if segments <= _CARRIED:
            return ends, totals
        grid = (self.b * self.k * cdiv(self.n * self.c, 64),)
        launch(
            carry_kernel, grid, (ends, totals, A), (self.k, self.c, self.n, segments), 1,
            REVERSE=adjoint, BLOCK=64, U=8,
        )  # fmt: skip
        return ends, None

    def window_walk(self) -> tuple[dict[str, int], bool]:
        """How the local scan walks: by windows as chunks if they are short, else a segment a window, by chunks."""
        short = self.window <= CHUNK
        segment = self.window * cdiv(CHUNK, self.window) if short else self.window
        segments = cdiv(self.steps, segment)
        slots = 0 if short else cdiv(segment, CHUNK) - 1
        chunk = self.window if short else CHUNK
        return dict(segment=segment, segments=segments, chunk=chunk, slots=slots, all_slots=slots * segments), short

    def run_forward(
        self, tensors: Operands, walk: dict[str, int], y: Tensor | None,
        starts: Tensor | None = None, totals: Tensor | None = None, states: Tensor | None = None, window: bool = False,
        reset: bool = False,
    ) -> None:  # fmt: skip
        key = ("forward", None if y is None else y.stride(), starts is None, totals is None, states is None, window)
        run = self.launches.get(key)
        if run is None:
            config = self.forward_config
            blocks = cdiv(self.c, config.BLOCK_C)
            self.launches[key] = run = Launch(
                forward_kernel, (self.b * self.k * walk["segments"] * blocks,),
                (
                    *(stride for strides in self.strides for stride in strides),
                    *((0, 0, 0) if y is None else _strides(y)),
                    self.steps, self.k, self.c, self.n, *(walk[name] for name in _WALK),
                ),
                config.num_warps, N=config.N, BLOCK_C=config.BLOCK_C, U=config.U,
                HAS_D=self.has_D and not window, HAS_STARTS=starts is not None, CARRY=totals is not None,
                SAVE=states is not None, EMIT=y is not None,
                BY_STEP=self.facts.repeats or self.out == "per_step", WINDOW=window, RESET=reset, **self.flags,
            )  # fmt: skip
        run(*tensors, starts, totals, states, y)

    def forward(self, tensors: Operands, save: bool, into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output in the dtype of u, and with ``save`` the states.

        ``into`` takes the former, in that dtype with rows of any distance, without a window: (b, t, k, c) where it is
        "per_step", or (b, l, k, c) where it is "per_order" and orders visit all tokens once.
        """
        u, delta, A, B, _, _, orders, bias = tensors
        slots = (self.steps - 1) // CHUNK
        states = empty((self.b, self.k, slots, self.n, self.c), torch.float32, self.device) if save else None
        y = self.buffer(self.c, merged=self.out == "sum", by_step=self.out == "per_step") if into is None else into
        segment, segments = self.segments(self.forward_config)
        walk = dict(segment=segment, segments=segments, chunk=CHUNK, slots=segment // CHUNK, all_slots=slots)
        starts, totals = None, None
        if segments > 1:
            config = self.forward_config
            starts, totals = self.carried(config, segment, segments, u, delta, A, B, orders, bias, False)
        self.run_forward(tensors, walk, y, starts, totals, states)
        if self.window > 1:
            walk, short = self.window_walk()
            self.run_forward(tensors, walk, y, window=True, reset=short)
        if self.out == "per_step":
            return _as_dtype(y, self.dtype), states
        return self.collect(y, self.out == "sum", self.dtype, orders), states

    def backward(
        self, grad: Tensor, tensors: Operands, states: Tensor, order_by_order: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients as the kernel leaves them: of u and delta as `buffer` makes them; the partial sums of those of B
        and C, see `_partials`, and of those of A, D and bias, in rows, see `_split_sums`.
        """
        u, delta, A, B, C, D, orders, bias = tensors
        config = self.backward_config
        segment, segments = self.segments(config)
        walks = [
            dict(
                segment=segment,
                segments=segments,
                chunk=CHUNK,
                slots=segment // CHUNK,
                all_slots=states.shape[2],
            )
        ]
        reset = False
        if self.window > 1:
            window_walk, reset = self.window_walk()
            walks.append(window_walk)

        blocks = cdiv(self.c, config.BLOCK_C)
        atomic = blocks > 1 and self.n > 1 and not torch.are_deterministic_algorithms_enabled()
        du = self.buffer(self.c, merged=self.shared, order_by_order=order_by_order)
        ddelta = self.buffer(self.c, merged=False, order_by_order=order_by_order)
        partials = _partials(self, 1 if atomic else blocks, atomic, B.dtype)
        dB, dC = partials.unbind(0)
        counts = [self.b * walk["segments"] for walk in walks]
        all_parts = empty((sum(counts), self.k * self.c * (self.n + 2)), torch.float32, self.device)
        for walk, parts in zip(walks, all_parts.split(counts) if self.window > 1 else (all_parts,), strict=True):
            window = walk is not walks[0]
            kept: Tensor | None = states
            if window:
                kept = None
                if not reset:
                    shape = (self.b, self.k, walk["all_slots"], self.n, self.c)
                    kept = empty(shape, torch.float32, self.device)
                    self.run_forward(tensors, walk, None, states=kept, window=True)
            adjoints, totals = None, None
            if segments > 1 and not window:
                adjoints, totals = self.carried(config, segment, segments, grad, delta, A, C, orders, bias, True)
            items = self.b * self.k * walk["segments"] * blocks
            tile_bytes = 4 * config.N * config.BLOCK_C * cdiv(walk["chunk"], config.U)
            programs = min(items, max(1, _SCRATCH_BYTES // tile_bytes))
            scratch = empty((programs * tile_bytes // 4,), torch.float32, self.device)
            key = ("backward", window, atomic, grad.dtype, grad.stride(), order_by_order, kept is None)
            run = self.launches.get(key)
            if run is None:
                flags = {**self.flags, "WIDE": self.flags["WIDE"] or self.is_wide(grad)}
                self.launches[key] = run = Launch(
                    backward_kernel, (programs,),
                    (
                        *_strides(grad), *(stride for strides in self.strides for stride in strides),
                        *_strides(du), *_strides(ddelta), 0 if atomic else dB.stride(0), *dB.stride()[1:4],
                        self.steps, self.k, self.c, self.n, *(walk[name] for name in _WALK), items,
                    ),
                    config.num_warps, N=config.N, BLOCK_C=config.BLOCK_C, U=config.U,
                    HAS_D=D is not None and not window, HAS_STATES=kept is not None, HAS_ADJOINTS=adjoints is not None,
                    CARRY=totals is not None, GRAD_BY_STEP=self.out == "per_step", BY_STEP=self.facts.repeats,
                    ATOMIC=atomic, WINDOW=window, RESET=window and reset, **flags,
                )  # fmt: skip
            run(
                grad, u, delta, A, B, C, D, orders, bias, kept, adjoints, totals, scratch,
                du, ddelta, dB, dC, parts,
            )  # fmt: skip
            del scratch  # or the peak would hold it beside the sums of what follows
        return du, ddelta, partials, all_parts


_scans: dict[tuple[Any, ...], _Scan] = {}


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, out: str, local_window: int, save: bool,
    visits: list[bool] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :mod:`backbones.ops.scan.operator`."""
    check_device("u", u)
    with device_of(u):
        tensors = _as_kernels_read(u, delta, A, B, C, D, orders, delta_bias)
        scan = _Scan.of(tensors, delta_softplus, out, local_window, visits)
        y, states = scan.forward(tensors, save)
        return y, u.new_empty(0, dtype=torch.float32) if states is None else states


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, states: Tensor, delta_softplus: bool, out: str, local_window: int,
    visits: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See :mod:`backbones.ops.scan.operator`."""
    with device_of(u):
        tensors = _as_kernels_read(u, delta, A, B, C, D, orders, delta_bias)
        scan = _Scan.of(tensors, delta_softplus, out, local_window, visits)
        du, ddelta, partials, parts = scan.backward(contiguous_rows(grad), tensors, states)
        dA, dD, dbias = _split_sums(column_sums(parts), scan)
        if not scan.facts.repeats:
            partials = _as_dtype(partials if partials.shape[1] == 1 else partials.sum(1, keepdim=True), B.dtype)
        none = dA.new_empty(0)
        return (
            scan.collect(du, scan.shared, u.dtype, orders),
            scan.collect(ddelta, False, delta.dtype, orders),
            dA,
            *(scan.collect(_sum_blocks(x), False, B.dtype, orders) for x in partials),
            none if D is None else dD,
            none if delta_bias is None else dbias,
        )


def _as_kernels_read(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    bias: Tensor | None,
) -> Operands:  # fmt: skip
    u, delta, B, C = (contiguous_rows(x) for x in (u, delta, B, C))
    D, orders, bias = (None if x is None else x.contiguous() for x in (D, orders, bias))
    return u, delta, _transposed(A), B, C, D, orders, bias


def _transposed(x: Tensor) -> Tensor:
    """(k, n, c) as (k, c, n), or the other way around, contiguous."""
    x = x.transpose(1, 2)
    return x if x.is_contiguous() else _copied(torch.empty_like(x, memory_format=torch.contiguous_format), x)


def _as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else _copied(torch.empty_like(x, dtype=dtype), x)


def _copied(y: Tensor, x: Tensor) -> Tensor:
    """x in the memory of y: the library can run this in recorded programs, but not an operator that makes y itself."""
    return y.copy_(x)


def _split_sums(sums: Tensor, scan: _Scan) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A (k, c, n), D (k, c) and bias (k, c)."""
    k, c, n = scan.k, scan.c, scan.n
    dA, dD, dbias = sums.split_with_sizes([k * c * n, k * c, k * c])
    return _transposed(dA.view(k, n, c)), dD.view(k, c), dbias.view(k, c)


def _partials(scan: _Scan, blocks: int, atomic: bool, dtype: torch.dtype) -> Tensor:
    """(2, blocks, b, rows, k, n): the gradients of B and C as every block of channels sees them."""
    facts = scan.facts
    whole = blocks == 1 and not atomic and not facts.repeats and scan.window <= 1
    shape = (2, blocks, scan.b, scan.steps if facts.repeats else scan.length, scan.k, scan.n)
    dtype = dtype if whole else torch.float32
    if atomic or not (facts.repeats or facts.complete):
        return torch.zeros(shape, dtype=dtype, device=scan.device)
    return empty(shape, dtype, scan.device)


def _sum_blocks(partials: Tensor) -> Tensor:
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and order; the last is 0 where all orders share a row."""
    return x.stride(0), x.stride(1), x.stride(2) if x.dim() == 4 else 0
