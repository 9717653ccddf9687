"""The forward kernel: walks the steps of one order for a block of channels, the state in registers."""

# mypy: ignore-errors

import triton
import triton.language as tl

from backbones.ops.scan.triton.common import LOG2_E, entering, offset_of, rows_of, step_of, step_size, tokens_of


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, orders, bias, starts, totals, states, y,
    u_b, u_l, u_k, d_b, d_l, d_k, B_b, B_l, B_k, C_b, C_l, C_k, y_b, y_l, y_k,
    steps, k, c, n, segment, segments, chunk, slots, all_slots,
    N: tl.constexpr, BLOCK_C: tl.constexpr, U: tl.constexpr,
    HAS_ORDERS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_STARTS: tl.constexpr,
    CARRY: tl.constexpr, SOFTPLUS: tl.constexpr, SAVE: tl.constexpr, EMIT: tl.constexpr, BY_STEP: tl.constexpr,
    WINDOW: tl.constexpr, RESET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (batch, order, segment, channel block): h_t = a_t h_{t-1} + b_t and y_t = <C_t, h_t> + D u_t.

    The rows of the next U steps, and the tokens of the U after those, are asked for before U steps are computed.
    SAVE keeps the state at the start of every chunk but the first (which is 0). EMIT is off where only these are
    wanted. BY_STEP writes y by step instead of by token. WINDOW is the second, local scan of LBMamba: it runs from
    the end of a window to its start, adds <C_t, h_t - b_t> to a y that is already there, and starts every chunk
    from 0 if RESET is set.
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
    skip = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_D:
        skip = tl.load(D + order * c + cs, mask=c_mask, other=0.0)
    u += batch * u_b + order * u_k
    delta += batch * d_b + order * d_k
    B += batch * B_b + order * B_k
    C += batch * C_b + order * C_k
    if EMIT:
        y += batch * y_b + order * y_k
    if HAS_ORDERS:
        orders += order * steps
    if SAVE:
        states += bk.to(tl.int64) * all_slots * n * c + tile

    first = s * segment
    end = tl.minimum(first + segment, steps)
    groups = tl.cdiv(chunk, U)
    count = tl.cdiv(segment, chunk) * groups if WINDOW else tl.cdiv(end - first, U)
    h = tl.zeros((N, BLOCK_C), tl.float32)
    if HAS_STARTS:
        h = entering(
            starts, totals, bk.to(tl.int64) * segments, s, segments, c, n, a2, cs, tile, c_mask, mask, CARRY, False
        )

    tokens = tokens_of(orders, 0, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
    later = tokens_of(orders, 1, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
    rows = (
        rows_of(tokens, u, u_l, cs, c_mask, U, WIDE),
        rows_of(tokens, delta, d_l, cs, c_mask, U, WIDE),
        rows_of(tokens, B, B_l, ns, n_mask, U, WIDE),
        rows_of(tokens, C, C_l, ns, n_mask, U, WIDE),
    )
    for group in range(count):
        next_rows = (
            rows_of(later, u, u_l, cs, c_mask, U, WIDE),
            rows_of(later, delta, d_l, cs, c_mask, U, WIDE),
            rows_of(later, B, B_l, ns, n_mask, U, WIDE),
            rows_of(later, C, C_l, ns, n_mask, U, WIDE),
        )
        latest = tokens_of(orders, group + 2, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
        if SAVE or RESET:  # noqa: SIM102 (a constant, so not one condition with the next)
            if group % groups == 0:
                if RESET:
                    h = tl.zeros((N, BLOCK_C), tl.float32)
                if SAVE:
                    slot = s * slots + group // groups - 1
                    from_zero = group == 0 if WINDOW else (group == 0) & (s == 0)
                    tl.store(states + slot.to(tl.int64) * n * c, h, mask=mask & (from_zero == 0))
        for j in tl.static_range(U):
            step, valid = step_of(group, j, first, end, segment, chunk, groups, U, WINDOW)
            u_t = rows[0][j].to(tl.float32)
            dt, _ = step_size(rows[1][j].to(tl.float32) + shift, SOFTPLUS)
            dt_u = dt * u_t
            if WINDOW:  # elsewhere nothing follows the positions without a step
                dt = tl.where(valid, dt, 0.0)
                dt_u = tl.where(valid, dt_u, 0.0)
            added = dt_u[None, :] * rows[2][j].to(tl.float32)[:, None]
            h = tl.exp2(dt[None, :] * a2) * h
            shown = h
            h += added
            if EMIT:
                if not WINDOW:
                    shown = h
                y_t = tl.sum(shown * rows[3][j].to(tl.float32)[:, None], axis=0)
                if HAS_D:
                    y_t += skip * u_t
                y_at = y + offset_of(step if BY_STEP else tokens[j], y_l, WIDE) + cs
                if WINDOW:
                    y_t += tl.load(y_at, mask=c_mask & valid, other=0.0)
                tl.store(y_at, y_t.to(y.dtype.element_ty), mask=c_mask & valid)
        rows = next_rows
        tokens = later
        later = latest
