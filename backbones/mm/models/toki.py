"""TOKI: features of masked tokens from those of the visible ones before and behind them.

MambaMIM, arXiv:2408.08070. Written from its definition and held to a recording of the original, which turns its result
into a map without transposing tokens and channels; here both keep their place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bounded(A: Tensor, bound: float) -> Tensor:
    """A scaled down to the spectral norm ``bound`` if it has more, so that no power of it exceeds a power of ``bound``.

    The scale counts as a constant in backward.
    """
    norm = torch.linalg.matrix_norm(A.detach().float(), 2)
    return A / (norm / bound).clamp(min=1).to(A.dtype)


def toki(x: Tensor, keep: Tensor, A: Tensor) -> Tensor:
    """Fills in masked tokens; visible ones stay as they are.

    Anchors p_0 < p_1 < ... are the visible tokens, the first and the last. Between two of them, n = p_{i+1} - p_i
    apart, the token j steps behind the left one becomes::

        sum of A^(n - 1 - t) ((1 - a_t) x[p_i] + a_t x[p_{i+1}]) over t = 0..j,  a_t = t / (n - 1)

    and a masked last token A x. With A = 0, where learning starts, the last token of a gap is the anchor behind it, and
    the others are 0.

    Args:
        x: (b, l, c) tokens in raster order; what masked ones hold counts for the first and the last alone.
        keep: (b, l) bool, True where a token is visible.
        A: (c, c). Powers up to the longest gap are taken: see :func:`bounded`.
    """
    length = x.shape[1]
    place = torch.arange(length, device=x.device).expand(x.shape[:2])
    anchor = keep | (place == 0) | (place == length - 1)
    left = place.masked_fill(~anchor, 0).cummax(1).values
    # The next anchor behind each place itself. Two steps behind the last one stand for the power 1 of A.
    behind = place.masked_fill(~anchor, length).flip(1).cummin(1).values.flip(1)
    right = torch.cat([behind[:, 1:], torch.full_like(behind[:, :1], length + 1)], dim=1)
    gap, step = right - left, place - left
    share = (step.to(x.dtype) / (gap - 1).clamp(min=1)).unsqueeze(-1)
    ends = (end.clamp(max=length - 1).unsqueeze(-1).expand_as(x) for end in (left, right))
    before, after = (x.gather(1, end) for end in ends)
    y = (1 - share) * before + share * after
    exponent = gap - 1 - step
    for power in range(int(exponent.max())):
        y = torch.where((exponent > power).unsqueeze(-1), y @ A.transpose(0, 1), y)
    # Sums within a gap: term by term, as differences of running sums would carry one gap's rounding into the next.
    total = y
    for t in range(1, int(step.max()) + 1):
        total = torch.where((step >= t).unsqueeze(-1), total + _shifted(y, t), total)
    return torch.where(keep.unsqueeze(-1), x, total)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Each token that of ``count`` places before."""
    return torch.cat([torch.zeros_like(x[:, :count]), x[:, :-count]], dim=1)


class Toki(nn.Module):
    """:func:`toki` with a learned matrix of at most spectral norm ``bound``, which starts at 0.

    Args:
        dim: width of the tokens.
        bound: 1 keeps all powers of the matrix bounded; the original has none.

    Raises:
        ValueError: ``bound`` is not positive.
    """

    def __init__(self, dim: int, bound: float = 1.0) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"bound: got {bound}, expected a positive spectral norm")
        self.bound = bound
        self.A = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """Tokens (b, l, dim), masked ones filled in."""
        return toki(x, keep, bounded(self.A, self.bound))
