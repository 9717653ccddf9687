"""The backward kernel: recomputes the states of a chunk from the saved one, then walks the chunk backwards."""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton adds tuples but does not unpack them into new ones)

import triton
import triton.language as tl

from backbones.ops.scan.triton.common import LOG2_E, entering, offset_of, rows_of, step_of, step_size, tokens_of


@triton.jit
def _rows_ahead(
    tokens, g_tokens, u, u_l, d, d_l, B, B_l, g, g_l, cs, c_mask, ns, n_mask,
    U: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    return (
        rows_of(tokens, u, u_l, cs, c_mask, U, WIDE),
        rows_of(tokens, d, d_l, cs, c_mask, U, WIDE),
        rows_of(tokens, B, B_l, ns, n_mask, U, WIDE),
        rows_of(g_tokens, g, g_l, cs, c_mask, U, WIDE),
    )


@triton.jit
def backward_kernel(
    grad, u, delta, A, B, C, D, orders, bias, states, adjoints, totals, scratch, du, ddelta, dB, dC, sums,
    g_b, g_l, g_k, u_b, u_l, u_k, d_b, d_l, d_k, B_b, B_l, B_k, C_b, C_l, C_k, du_b, du_l, du_k, dd_b, dd_l, dd_k,
    dB_block, dB_b, dB_l, dB_k,
    steps, k, c, n, segment, segments, chunk, slots, all_slots, items,
    N: tl.constexpr, BLOCK_C: tl.constexpr, U: tl.constexpr,
    HAS_ORDERS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_ADJOINTS: tl.constexpr, CARRY: tl.constexpr, SOFTPLUS: tl.constexpr,
    GRAD_BY_STEP: tl.constexpr, BY_STEP: tl.constexpr, ATOMIC: tl.constexpr,
    WINDOW: tl.constexpr, RESET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Work item (batch, order, segment, channel block); a program takes every num_programs-th, to bound ``scratch``.

    With e_t = a_t h_{t-1} and q_t = C_t g_t + a_{t+1} q_{t+1}, the gradient of the state h_t:
    du = D g + dt <q, B>, ddelta = u <q, B> + <A, q e>, dB = sum_c q dt u, dC = sum_c g h, dA = sum_t dt q e.
    Two levels: a first pass over the chunk leaves the state of every U-th step in ``scratch``; then, group by group
    from the last, U states are computed again into registers and swept. The rows of the next group are asked for in
    between. ``before`` uses an unmasked dt also to keep the decays of both apart: sharing them would cost N
    registers a step.
    WINDOW (see the forward kernel) shows e_t instead of h_t = e_t + b_t, walks the other way, and adds to what is
    there.
    """
    blocks = tl.cdiv(c, BLOCK_C)
    ns = tl.arange(0, N)
    n_mask = ns < n
    local = ns[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    groups = tl.cdiv(chunk, U)
    scratch += tl.program_id(0).to(tl.int64) * groups * N * BLOCK_C + local
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        s = item // blocks % segments
        bk = item // blocks // segments
        order = bk % k
        batch = (bk // k).to(tl.int64)
        cs = block * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = cs < c
        mask = n_mask[:, None] & c_mask[None, :]
        tile = ns[:, None] * c + cs[None, :]
        A_tile = tl.load(A + order * n * c + tile, mask=mask, other=0.0)
        shift = tl.zeros((BLOCK_C,), tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + order * c + cs, mask=c_mask, other=0.0)
        skip = tl.zeros((BLOCK_C,), tl.float32)
        if HAS_D:
            skip = tl.load(D + order * c + cs, mask=c_mask, other=0.0)
        g_at = grad + batch * g_b + order * g_k
        u_at = u + batch * u_b + order * u_k
        d_at = delta + batch * d_b + order * d_k
        B_at = B + batch * B_b + order * B_k
        C_at = C + batch * C_b + order * C_k
        du_at = du + batch * du_b + order * du_k
        dd_at = ddelta + batch * dd_b + order * dd_k
        partial = block.to(tl.int64) * dB_block + batch * dB_b + order * dB_k
        dB_at = dB + partial
        dC_at = dC + partial
        order_at = orders
        if HAS_ORDERS:
            order_at = orders + order * steps
        states_at = states
        if HAS_STATES:
            states_at = states + bk.to(tl.int64) * all_slots * n * c + tile

        first = s * segment
        end = tl.minimum(first + segment, steps)
        chunks = tl.cdiv(segment, chunk) if WINDOW else tl.cdiv(end - first, chunk)
        received = tl.zeros((N, BLOCK_C), tl.float32)  # a_{t+1} q_{t+1}
        if HAS_ADJOINTS:
            received = entering(
                adjoints, totals, bk.to(tl.int64) * segments, s, segments, c, n, A_tile * LOG2_E, cs, tile, c_mask,
                mask, CARRY, True,
            )  # fmt: skip
        dA_sum = tl.zeros((N, BLOCK_C), tl.float32)
        dD_sum = tl.zeros((BLOCK_C,), tl.float32)
        dbias_sum = tl.zeros((BLOCK_C,), tl.float32)
        for i in range(chunks):
            number = chunks - 1 - i
            h = tl.zeros((N, BLOCK_C), tl.float32)
            if HAS_STATES:
                from_zero = number == 0 if WINDOW else (number == 0) & (s == 0)
                slot = (s * slots + number - 1).to(tl.int64)
                h = tl.load(states_at + slot * n * c, mask=mask & (from_zero == 0), other=0.0)
            if RESET:
                received = tl.zeros((N, BLOCK_C), tl.float32)
            count = groups if WINDOW else tl.minimum(groups, tl.cdiv(end - first - number * chunk, U))
            group = number * groups
            tokens = tokens_of(order_at, group, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
            rows = (
                rows_of(tokens, u_at, u_l, cs, c_mask, U, WIDE),
                rows_of(tokens, d_at, d_l, cs, c_mask, U, WIDE),
                rows_of(tokens, B_at, B_l, ns, n_mask, U, WIDE),
            )
            tokens = tokens_of(order_at, group + 1, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
            for at in range(count - 1):
                tl.store(scratch + at * N * BLOCK_C, h)
                next_rows = (
                    rows_of(tokens, u_at, u_l, cs, c_mask, U, WIDE),
                    rows_of(tokens, d_at, d_l, cs, c_mask, U, WIDE),
                    rows_of(tokens, B_at, B_l, ns, n_mask, U, WIDE),
                )
                tokens = tokens_of(order_at, group + at + 2, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
                for j in tl.static_range(U):
                    dt, _ = step_size(rows[1][j].to(tl.float32) + shift, SOFTPLUS)
                    dt_u = dt * rows[0][j].to(tl.float32)
                    if WINDOW:  # elsewhere only the last group has positions without a step
                        _, valid = step_of(group + at, j, first, end, segment, chunk, groups, U, WINDOW)
                        dt = tl.where(valid, dt, 0.0)
                        dt_u = tl.where(valid, dt_u, 0.0)
                    h = tl.exp2((dt * LOG2_E)[None, :] * A_tile) * h
                    h += dt_u[None, :] * rows[2][j].to(tl.float32)[:, None]
                rows = next_rows
            tl.store(scratch + (count - 1) * N * BLOCK_C, h)
            tl.debug_barrier()

            group = number * groups + count - 1
            tokens = tokens_of(order_at, group, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
            g_tokens = tokens
            if GRAD_BY_STEP:
                g_tokens = tokens_of(order_at, group, first, end, segment, chunk, groups, U, WINDOW, False)
            rows = _rows_ahead(
                tokens, g_tokens, u_at, u_l, d_at, d_l, B_at, B_l, g_at, g_l,
                cs, c_mask, ns, n_mask, U, WIDE,
            )  # fmt: skip
            if N <= 4:
                C_ahead = rows_of(tokens, C_at, C_l, ns, n_mask, U, WIDE)
            for at in range(count):
                h = tl.load(scratch + (count - 1 - at) * N * BLOCK_C)
                later = tokens_of(order_at, group - 1, first, end, segment, chunk, groups, U, WINDOW, HAS_ORDERS)
                if N <= 4:
                    C_rows = C_ahead
                else:  # of many states there are no registers for two groups
                    C_rows = rows_of(tokens, C_at, C_l, ns, n_mask, U, WIDE)
                u_rows, d_rows, B_rows, g_rows = rows
                before = ()
                for j in tl.static_range(U):
                    before = before + (h,)
                    dt, _ = step_size(d_rows[j].to(tl.float32) + shift, SOFTPLUS)
                    dt_u = dt * u_rows[j].to(tl.float32)
                    if WINDOW:
                        _, valid = step_of(group, j, first, end, segment, chunk, groups, U, WINDOW)
                        dt = tl.where(valid, dt, 0.0)
                        dt_u = tl.where(valid, dt_u, 0.0)
                    h = tl.exp2((dt * LOG2_E)[None, :] * A_tile) * h
                    h += dt_u[None, :] * B_rows[j].to(tl.float32)[:, None]
                g_tokens = later
                if GRAD_BY_STEP:
                    g_tokens = tokens_of(order_at, group - 1, first, end, segment, chunk, groups, U, WINDOW, False)
                next_rows = _rows_ahead(
                    later, g_tokens, u_at, u_l, d_at, d_l, B_at, B_l, g_at, g_l,
                    cs, c_mask, ns, n_mask, U, WIDE,
                )  # fmt: skip
                if N <= 4:
                    C_ahead = rows_of(later, C_at, C_l, ns, n_mask, U, WIDE)
                for i_j in tl.static_range(U):
                    step, valid = step_of(group, U - 1 - i_j, first, end, segment, chunk, groups, U, WINDOW)
                    dt, slope = step_size(d_rows[U - 1 - i_j].to(tl.float32) + shift, SOFTPLUS)
                    dt = tl.where(valid, dt, 0.0)
                    u_t = tl.where(valid, u_rows[U - 1 - i_j].to(tl.float32), 0.0)
                    g_t = tl.where(valid, g_rows[U - 1 - i_j].to(tl.float32), 0.0)
                    B_t = B_rows[U - 1 - i_j].to(tl.float32)[:, None]
                    decay = tl.exp2((dt * LOG2_E)[None, :] * A_tile)
                    e = decay * before[U - 1 - i_j]
                    shown = e
                    if not WINDOW:
                        shown = e + (dt * u_t)[None, :] * B_t
                    q = received + g_t[None, :] * C_rows[U - 1 - i_j].to(tl.float32)[:, None]
                    q_b = received if WINDOW else q  # the gradient of b_t
                    dB_t = tl.sum(q_b * (dt * u_t)[None, :], axis=1)
                    dC_t = tl.sum(shown * g_t[None, :], axis=1)
                    q_B = tl.sum(q_b * B_t, axis=0)
                    q_e = q * e
                    dA_sum += q_e * dt[None, :]
                    dd_t = (u_t * q_B + tl.sum(q_e * A_tile, axis=0)) * slope
                    dd_t = tl.where(valid, dd_t, 0.0)
                    du_t = dt * q_B
                    if HAS_D:
                        du_t += skip * g_t
                        dD_sum += g_t * u_t
                    dbias_sum += dd_t
                    received = decay * q

                    row = step if BY_STEP else tokens[U - 1 - i_j]
                    du_row = du_at + offset_of(row, du_l, WIDE) + cs
                    dd_row = dd_at + offset_of(row, dd_l, WIDE) + cs
                    dB_row = dB_at + offset_of(row, dB_l, WIDE) + ns
                    dC_row = dC_at + offset_of(row, dB_l, WIDE) + ns
                    keep = c_mask & valid
                    if WINDOW:
                        du_t += tl.load(du_row, mask=keep, other=0.0)
                        dd_t += tl.load(dd_row, mask=keep, other=0.0)
                    tl.store(du_row, du_t.to(du.dtype.element_ty), mask=keep)
                    tl.store(dd_row, dd_t.to(ddelta.dtype.element_ty), mask=keep)
                    if ATOMIC:
                        tl.atomic_add(dB_row, dB_t, mask=n_mask & valid, sem="relaxed")
                        tl.atomic_add(dC_row, dC_t, mask=n_mask & valid, sem="relaxed")
                    else:
                        if WINDOW:
                            dB_t += tl.load(dB_row, mask=n_mask & valid, other=0.0)
                            dC_t += tl.load(dC_row, mask=n_mask & valid, other=0.0)
                        tl.store(dB_row, dB_t.to(dB.dtype.element_ty), mask=n_mask & valid)
                        tl.store(dC_row, dC_t.to(dC.dtype.element_ty), mask=n_mask & valid)
                rows = next_rows
                tokens = later
                group -= 1
            tl.debug_barrier()
        # Per batch item and segment: the gradients of A (k, n, c), D (k, c) and bias (k, c), one behind the other. A
        # store with the states of a channel side by side would give all tiles another layout: at n = 16 a tenth slower.
        part = sums + (batch * segments + s) * k * c * (n + 2)
        tl.store(part + order * n * c + tile, dA_sum, mask=mask)
        part += k * c * n + order * c + cs
        if HAS_D or WINDOW:  # of a window's walk, nothing: its sums are added to those of the other
            tl.store(part, dD_sum, mask=c_mask)
        if HAS_BIAS:
            tl.store(part + k * c, dbias_sum, mask=c_mask)
