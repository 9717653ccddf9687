"""State-space duality in matrix products: attention within chunks, a recurrence of states between them.

Mamba-2 (arXiv:2405.21060), section 6. All of it is PyTorch's own operations, so every device, every order of
derivatives, compilers and FLOP counters are served by what they know already. The cost is linear in the number of
tokens: the recurrence between chunks is solved in chunks, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 64  # chunks whose states one matrix product passes on


def ssd_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """:func:`backbones.ops.ssd.naive.ssd_naive` in chunks of ``chunk`` steps; arguments and shapes as there."""
    length, width, groups = x.shape[1], x.shape[3], B.shape[2]
    size = length if isinstance(length, int) and length < chunk else chunk
    padding = (length + size - 1) // size * size - length
    # A step of size 0 keeps the state and adds nothing to it.
    x, B, C = (_chunks(F.pad(y, (0, 0, 0, 0, 0, padding)), size) for y in (dt.unsqueeze(-1) * x, B, C))
    log_decay = _chunks(F.pad(dt * A, (0, 0, 0, padding)), size).transpose(2, 3)  # (b, c, h, q)

    # Within a chunk, every head is masked attention.
    scores = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # (b, c, g, q, q)
    attention = segment_decays(log_decay).unflatten(2, (groups, -1)) * scores.unsqueeze(3)
    y = (attention.flatten(2, 3) @ x.transpose(2, 3)).transpose(2, 3)  # (b, c, q, h, p)

    # What a chunk leaves behind, the heads of a group side by side; and what it finds.
    to_start = _running_sums(log_decay)  # (b, c, h, q)
    total = to_start[..., -1]
    left = x * _of_tokens(torch.exp((total.unsqueeze(-1) - to_start).to(x.dtype)))
    states = B.permute(0, 1, 3, 4, 2) @ _side_by_side(left, groups)  # (b, c, g, n, h / g * p)
    states = states.unflatten(-1, (-1, width)).transpose(3, 4).flatten(2, 3)  # (b, c, h, n, p)
    found = _states_before(states, total)
    found = found.unflatten(2, (groups, -1)).transpose(3, 4).flatten(4)
    carried = (C.transpose(2, 3) @ found).transpose(2, 3).reshape(y.shape)
    y = y + carried * _of_tokens(torch.exp(to_start.to(x.dtype)))
    return y.flatten(1, 2)[:, :length]


def segment_decays(log_decay: Tensor, before: bool = False) -> Tensor:
    """The decay from step j to step i, exp(sum of log_decay over j+1..i), 0 for j > i.

    Args:
        log_decay: (..., q).
        before: to the front of step i instead, which does not decay then: over j+1..i-1, 0 for j >= i.

    Returns:
        (..., q, q), i before j.
    """
    sums = _running_sums(log_decay)
    ends = sums - log_decay if before else sums
    segments = (ends.unsqueeze(-1) - sums.unsqueeze(-2)).to(log_decay.dtype)
    later = torch.ones(segments.shape[-2:], dtype=torch.bool, device=segments.device).triu(0 if before else 1)
    # Masked before the exponential, which overflows there: infinity times a gradient of 0 is no number.
    return segments.masked_fill(later, -torch.inf).exp()


def _running_sums(log_decay: Tensor) -> Tensor:
    """In float64: the decay of two near steps is a small difference of sums that may be large."""
    return log_decay.double().cumsum(-1)


def _states_before(states: Tensor, log_decay: Tensor) -> Tensor:
    """The state in front of every chunk, from what each chunk adds (b, c, h, n, p) and its decay (b, c, h)."""
    count = states.shape[1]
    if count > _BLOCK:
        padding = -count % _BLOCK
        added = F.pad(states, (0, 0) * 3 + (0, padding)).unflatten(1, (-1, _BLOCK))
        log_decay = F.pad(log_decay, (0, 0, 0, padding)).unflatten(1, (-1, _BLOCK))
        within = _prefix(added.flatten(0, 1), log_decay.flatten(0, 1)).unflatten(0, added.shape[:2])
        sums = log_decay.cumsum(2)  # (b, blocks, chunk, h)
        last = within[:, :, -1] * torch.exp(log_decay[:, :, -1].to(states.dtype))[..., None, None] + added[:, :, -1]
        before = _states_before(last, sums[:, :, -1])
        decays = torch.exp((sums - log_decay).to(states.dtype))[..., None, None]
        return (within + decays * before.unsqueeze(2)).flatten(1, 2)[:, :count]
    return _prefix(states, log_decay)


def _prefix(states: Tensor, log_decay: Tensor) -> Tensor:
    """:func:`_states_before` in one matrix product, quadratic in the number of chunks."""
    # What stands in front of a chunk has not decayed through it. No slice of one chunk less: that would fix a dynamic
    # number of chunks that is 2 in the example.
    decays = segment_decays(log_decay.transpose(1, 2), before=True).to(states.dtype)  # (b, h, c, c)
    rows = states.transpose(1, 2).flatten(3)  # (b, h, c, n p)
    return (decays @ rows).transpose(1, 2).unflatten(3, states.shape[3:])


def _chunks(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, size))


def _of_tokens(x: Tensor) -> Tensor:
    """(b, c, h, q) to (b, c, q, h, 1)."""
    return x.transpose(2, 3).unsqueeze(-1)


def _side_by_side(x: Tensor, groups: int) -> Tensor:
    """(b, c, q, h, p) to (b, c, g, q, h / g * p)."""
    return x.unflatten(3, (groups, -1)).flatten(4).transpose(2, 3)
