"""Multi-head scanning (MHS-VM, arXiv:2406.05992): narrow heads, each with a pattern of its own, gated by their orders'
agreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.layers.norm import LayerNorm
from backbones.layers.scan import Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import check_map
from backbones.layers.ss2d import scan_grid
from backbones.layers.tracing import Opaque
from backbones.patterns import CROSS, DIAGONAL, SNAKE, SPIRAL_CORNERS, ScanPattern, get_pattern
from backbones.weights import SAME, KeyRule, Layout
from backbones.weights.loading import TakesOfficialLayout

HEADS = (SNAKE, DIAGONAL, SPIRAL_CORNERS, CROSS)
"""Patterns of the authors' heads C, X, S and Z."""

# The authors' orders are followed by their reverses; of ours, only those of SNAKE are. Its own inverse.
_PAIRS = [0, 2, 1, 3]


def _head_rules(index: int, letter: str) -> tuple[KeyRule, ...]:
    swapped = HEADS[index] is not SNAKE
    same = Layout(lambda x: x[_PAIRS], lambda x: x[_PAIRS]) if swapped else SAME
    by_order = Layout(
        lambda x: same.to_ours(x.unflatten(0, (4, -1))),
        lambda x: same.to_official(x).flatten(0, 1),
    )
    official, ours = f"scanhead_{letter}.scanning.seq2seq_engine.", f"heads.{index}."
    return (
        KeyRule(official + "x_proj_weight", ours + "x_proj_weight", same),
        KeyRule(official + "dt_projs_weight", ours + "dt_proj_weight", same),
        KeyRule(official + "dt_projs_bias", ours + "dt_proj_bias", same),
        KeyRule(official + "A_logs", ours + "A_log", by_order),
        KeyRule(official + "Ds", ours + "D", by_order),
    )


class MultiHeadScan(Opaque, TakesOfficialLayout):
    """Projects a map to narrow heads, scans each along the orders of its pattern, and gates, joins and mixes them.

    Where y_k are a head's outputs at one cell and channel along its k orders, the head gives

        sum_k(y_k) * ReLU(std_k(y_k) / (mean_k(y_k) - min_k(y_k) + 1e-5) - threshold)

    with the standard deviation of n - 1. It is a ratio of small differences: two correct float32 implementations of a
    network with it differ by some 1e-3 of the largest output.

    Args:
        dim: width of the map.
        patterns: of the heads, by name or as patterns of two orders or more. A head is dim // len(patterns) wide.
        threshold: the gate is closed up to it; a constant of the model that no weight file tells.
        d_state: states of each channel.
        backend: see :func:`backbones.ops.selective_scan`.

    Raises:
        ValueError: there is no pattern, there are more than channels, one is unknown, or one has a single order; in
            ``forward``, another shape.
    """

    prunable: ClassVar[tuple[str, ...]] = ()

    key_rules = (  # of the authors' heads C, X, S and Z
        # Two names of one tensor each: what is loaded last is what the authors' model computes with.
        KeyRule("x_ssproj_W", None),
        KeyRule("scanhead_{}.mambaeng.{}", None),
        KeyRule("x_ssproj.weight", "in_proj.weight"),
        *(rule for index, letter in enumerate("CXSZ") for rule in _head_rules(index, letter)),
        KeyRule("cat_norm.{}", "norm.{}"),
        KeyRule("y_proj.weight", "out_proj.weight"),
    )

    def __init__(
        self,
        dim: int,
        patterns: Sequence[ScanPattern | str] = HEADS,
        threshold: float = 0.0,
        d_state: int = 16,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(patterns, str) or not 1 <= len(patterns) <= dim:
            raise ValueError(f"patterns: got {patterns!r}, expected a sequence of 1..{dim} patterns")
        self.dim, self.threshold = dim, threshold
        self.scans = [Scan(get_pattern(pattern), backend=backend) for pattern in patterns]
        width = dim // len(self.scans)
        for pattern in (scan.pattern for scan in self.scans):
            if pattern.num_orders < 2:
                raise ValueError(f"patterns: got {pattern.name!r} with one order, expected two at least, to compare")
        self.in_proj = nn.Linear(dim, len(self.scans) * width, bias=False, device=device, dtype=dtype)
        self.heads: Any = nn.ModuleList(
            SelectiveSSM(width, d_state, -(-width // 16), scan.pattern.num_orders, backend, device, dtype)
            for scan in self.scans
        )
        self.norm = LayerNorm(len(self.scans) * width, device=device, dtype=dtype)
        self.out_proj = nn.Linear(len(self.scans) * width, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        check_map(x, self.dim)
        parts = self.in_proj(x).chunk(len(self.scans), dim=-1)
        heads = [
            self.gate(scan_grid(head, part.contiguous(), scan, "per_order"))
            for head, part, scan in zip(self.heads, parts, self.scans, strict=True)
        ]
        return self.out_proj(self.norm(torch.cat(heads, dim=-1)))

    def gate(self, y: Tensor) -> Tensor:
        """Outputs along k orders (..., k, c) to the gated sum (..., c)."""
        spread = y.std(-2) / (y.mean(-2) - y.amin(-2) + 1e-5)
        return y.sum(-2) * torch.relu(spread - self.threshold)
