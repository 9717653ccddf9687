"""Device functions that several kernels share, and the small kernels between the scans."""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton adds tuples but does not unpack them into new ones)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step_size(raw, SOFTPLUS: tl.constexpr):
    """dt and its derivative by ``raw``.

    softplus(x) = max(x, 0) + log1p(exp(-|x|)), with log1p(t) = t p(t) and p the polynomial of degree 8 of least
    relative error (3e-8) on [0, 1]. Portable, half the instructions of a logarithm, and exact to rounding where dt
    is small.
    """
    if SOFTPLUS:
        t = tl.exp2(-tl.abs(raw) * LOG2_E)
        p = 0.00523268791 * t - 0.0295052133
        p = p * t + 0.0782259104
        p = p * t - 0.136632423
        p = p * t + 0.191060051
        p = p * t - 0.248429818
        p = p * t + 0.333190968
        p = p * t - 0.499994931
        p = p * t + 0.99999997
        return tl.maximum(raw, 0.0) + p * t, tl.where(raw > 0, 1.0, t) / (1 + t)
    else:
        return raw, tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def step_of(group, j, first, end, segment, chunk, groups, U: tl.constexpr, WINDOW: tl.constexpr):
    """The step that is the j-th of a group of U, and whether there is one.

    A segment is walked chunk by chunk; a chunk is ``groups`` groups, the last of them short where U does not divide
    it. With WINDOW the walk runs from the segment's last step to its first. A position without a step is given a
    step of the same chunk, so that its row may be read.
    """
    if WINDOW:
        offset = (group % groups) * U + j
        step = first + segment - 1 - (group // groups) * chunk - tl.minimum(offset, chunk - 1)
        valid = (offset < chunk) & (step >= first) & (step < end)
    else:
        step = first + group * U + j
        valid = step < end
    return tl.maximum(tl.minimum(step, end - 1), first), valid


@triton.jit
def tokens_of(
    orders,
    group,
    first,
    end,
    segment,
    chunk,
    groups,
    U: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_ORDERS: tl.constexpr,
):
    """The tokens visited at the U steps of a group."""
    tokens = ()
    for j in tl.static_range(U):
        step, _ = step_of(group, j, first, end, segment, chunk, groups, U, WINDOW)
        if HAS_ORDERS:
            tokens = tokens + (tl.load(orders + step),)
        else:
            tokens = tokens + (step,)
    return tokens


@triton.jit
def rows_of(tokens, x, stride, at, mask, U: tl.constexpr, WIDE: tl.constexpr):
    """Columns ``at`` of the rows of x at U tokens."""
    rows = ()
    for j in tl.static_range(U):
        rows = rows + (tl.load(x + offset_of(tokens[j], stride, WIDE) + at, mask=mask, other=0.0),)
    return rows


@triton.jit
def offset_of(row, stride, WIDE: tl.constexpr):
    """Where a row starts; 64-bit products, a third of a scan's instructions, only where 32 bits do not hold them."""
    if WIDE:
        return row.to(tl.int64) * stride
    else:
        return row * stride


@triton.jit
def segment_ends_kernel(
    x, delta, A, V, orders, bias, ends, totals,
    x_b, x_l, x_k, d_b, d_l, d_k, V_b, V_l, V_k,
    steps, k, c, n, segment, segments,
    N: tl.constexpr, BLOCK_C: tl.constexpr, U: tl.constexpr,
    HAS_ORDERS: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ADJOINT: tl.constexpr, X_BY_STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A segment's contribution to the carried state, and its sum of dt, which gives the decay over the segment.

    Forward, x is u and V is B. ADJOINT: x is the gradient of y, V is C, and the walk runs from the last step to the
    first; the state is then a_t times the gradient of the state h_t, which is what step t - 1 receives.
    """
    blocks = tl.cdiv(c, BLOCK_C)
    item = tl.program_id(0)
    s = item // blocks % segments
    bk = item // blocks // segments
    order = bk % k
    batch = (bk // k).to(tl.int64)
    cs = item % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    ns = tl.arange(0, N)
    c_mask = cs < c
    n_mask = ns < n
    mask = n_mask[:, None] & c_mask[None, :]
    tile = ns[:, None] * c + cs[None, :]
    a2 = tl.load(A + order * n * c + tile, mask=mask, other=0.0) * LOG2_E
    shift = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + order * c + cs, mask=c_mask, other=0.0)
    x += batch * x_b + order * x_k
    delta += batch * d_b + order * d_k
    V += batch * V_b + order * V_k
    if HAS_ORDERS:
        orders += order * steps
    first = s * segment
    end = tl.minimum(first + segment, steps)

    h = tl.zeros((N, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.cdiv(end - first, U)
    step_sign = -1 if ADJOINT else 1
    at = count - 1 if ADJOINT else 0
    tokens = tokens_of(orders, at, first, end, segment, segment, 1, U, False, HAS_ORDERS)
    x_tokens = tokens
    if X_BY_STEP:
        x_tokens = tokens_of(orders, at, first, end, segment, segment, 1, U, False, False)
    rows = (
        rows_of(x_tokens, x, x_l, cs, c_mask, U, WIDE),
        rows_of(tokens, delta, d_l, cs, c_mask, U, WIDE),
        rows_of(tokens, V, V_l, ns, n_mask, U, WIDE),
    )
    tokens = tokens_of(orders, at + step_sign, first, end, segment, segment, 1, U, False, HAS_ORDERS)
    for _ in range(count):
        x_tokens = tokens
        if X_BY_STEP:
            x_tokens = tokens_of(orders, at + step_sign, first, end, segment, segment, 1, U, False, False)
        next_rows = (
            rows_of(x_tokens, x, x_l, cs, c_mask, U, WIDE),
            rows_of(tokens, delta, d_l, cs, c_mask, U, WIDE),
            rows_of(tokens, V, V_l, ns, n_mask, U, WIDE),
        )
        tokens = tokens_of(orders, at + 2 * step_sign, first, end, segment, segment, 1, U, False, HAS_ORDERS)
        for i in tl.static_range(U):
            _, valid = step_of(at, U - 1 - i if ADJOINT else i, first, end, segment, segment, 1, U, False)
            x_t = rows[0][U - 1 - i if ADJOINT else i].to(tl.float32)
            dt, _ = step_size(rows[1][U - 1 - i if ADJOINT else i].to(tl.float32) + shift, SOFTPLUS)
            V_t = rows[2][U - 1 - i if ADJOINT else i].to(tl.float32)[:, None]
            dt = tl.where(valid, dt, 0.0)
            decay = tl.exp2(dt[None, :] * a2)
            if ADJOINT:
                h = decay * (h + tl.where(valid, x_t, 0.0)[None, :] * V_t)
            else:
                h = decay * h + tl.where(valid, dt * x_t, 0.0)[None, :] * V_t
            total += dt
        rows = next_rows
        at += step_sign
    row = (bk.to(tl.int64) * segments + s) * c
    tl.store(ends + row * n + tile, h, mask=mask)
    tl.store(totals + row + cs, total, mask=c_mask)


@triton.jit
def entering(
    ends, totals, row, s, segments, c, n, a2, cs, tile, c_mask, mask, CARRY: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The state that enters segment s of those from ``row`` on, from what :func:`carry_kernel` left.

    CARRY does that kernel's work here: it passes through what the segments before s (after it, with REVERSE) add.
    """
    if CARRY:
        h = tl.zeros(mask.shape, tl.float32)
        for i in range(segments - 1 - s if REVERSE else s):
            at = row + (segments - 1 - i if REVERSE else i)
            total = tl.load(totals + at * c + cs, mask=c_mask, other=0.0)
            h = tl.exp2(a2 * total[None, :]) * h + tl.load(ends + at * n * c + tile, mask=mask, other=0.0)
        return h
    else:
        return tl.load(ends + (row + s) * n * c + tile, mask=mask, other=0.0)


@triton.jit
def carry_kernel(
    ends, totals, A, k, c, n, segments, REVERSE: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    """Replaces what every segment adds by the state that enters it; one program a block of the n * c states."""
    blocks = tl.cdiv(n * c, BLOCK)
    bk = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < n * c
    a2 = tl.load(A + bk % k * n * c + at, mask=mask, other=0.0) * LOG2_E
    row = bk.to(tl.int64) * segments
    carry = tl.zeros((BLOCK,), tl.float32)
    for group in range(tl.cdiv(segments, U)):
        # All loads before any store: one wait for U segments.
        added = ()
        decay = ()
        for j in tl.static_range(U):
            i = group * U + j
            s = tl.maximum(segments - 1 - i, 0) if REVERSE else tl.minimum(i, segments - 1)
            added = added + (tl.load(ends + (row + s) * n * c + at, mask=mask, other=0.0),)
            decay = decay + (tl.load(totals + (row + s) * c + at % c, mask=mask, other=0.0),)
        for j in tl.static_range(U):
            i = group * U + j
            s = segments - 1 - i if REVERSE else i
            tl.store(ends + (row + s) * n * c + at, carry, mask=mask & (i < segments))
            carry = tl.exp2(a2 * decay[j]) * carry + added[j]


@triton.jit
def sum_orders_kernel(x, y, rows, k, c, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """y (rows, c) = x (rows, k, c) summed over k in float32, in order."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (r < rows) & (cs < c)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for order in range(k):
        total += tl.load(x + (r * k + order) * c + cs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + r * c + cs, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gather_visits_kernel(x, visits, starts, y, visited, rows, width, BLOCK: tl.constexpr):
    """y (b, rows, width): row r is the sum, in float32 and in order, of x[:, visits[starts[r] : starts[r + 1]]]."""
    r = tl.program_id(0) % rows
    batch = (tl.program_id(0) // rows).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts + r), tl.load(starts + r + 1)):
        visit = tl.load(visits + i)
        total += tl.load(x + (batch * visited + visit) * width + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + (batch * rows + r) * width + at, total.to(y.dtype.element_ty), mask=mask)
