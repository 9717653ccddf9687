"""A state-space layer for paths over a map, whose steps know their direction, as PlainMamba scans."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from backbones.layers.scan import Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.ops import selective_scan
from backbones.ops.scan.projection import per_order_linear
from backbones.patterns.subset import Subset, in_step_order, in_token_order
from backbones.patterns.walks import subset_codes, walks


class PathSSM(SelectiveSSM):
    """One set of state-space parameters for k paths, with a vector of B for the direction of each step.

    With p the token visited at step t of path k, and c the direction from the token visited before::

        h = exp(delta[t] A) h + delta[t] (B[t] + direction_B[c]) u[p];  y[p] += <C[t], h> + D u[p]

    delta, B and C are those of the token with raster index t, not p: the released weights were trained so.
    Arguments as :class:`backbones.layers.SelectiveSSM`; ``num_orders`` is k.
    """

    no_decay: ClassVar[tuple[str, ...]] = (*SelectiveSSM.no_decay, "direction_B")

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        num_orders: int,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(d_inner, d_state, dt_rank, 1, backend, device, dtype)
        self.num_orders = num_orders
        self.direction_B = nn.Parameter(torch.empty(5, d_state, device=device, dtype=dtype))
        trunc_normal_(self.direction_B, std=0.02)

    def forward(  # type: ignore[override]
        self, u: Tensor, grid: tuple[int, int], scan: Scan, subset: Subset | None = None
    ) -> Tensor:
        """u (b, l, c) along the paths of ``scan``, whose outputs are added: (b, l, c).

        Of a ``subset`` of the grid's tokens, delta, B and C at step t are those of the t-th token that is left.
        """
        if subset is not None:
            return self._along(u, scan, subset)
        k, pattern = self.num_orders, scan.pattern
        if pattern.visits_each_cell_once(*grid) is False or pattern.padded(*grid):
            raise ValueError(
                f"pattern: {pattern.name!r} does not visit each cell of a {grid[0]} x {grid[1]} grid once, which "
                "PlainMamba's scans need"
            )
        orders, steps, codes = walks(pattern, *grid, u.device)
        # The kernel reads all operands of a step at the visited token, so there they are put: few numbers per path. On
        # CPUs it sees that the paths have the same decays at every step, and computes them once.
        x = F.linear(u, self.x_proj_weight[0]).index_select(1, steps).unflatten(1, (-1, k))
        direction_B = self.direction_B.index_select(0, codes).unflatten(0, (-1, k))
        return self._scanned(
            u, x, direction_B, orders=orders, local_window=scan.window(u.shape[1]), visits=pattern.visits(*grid)
        )

    def _along(self, u: Tensor, scan: Scan, subset: Subset) -> Tensor:
        orders, steps = subset.orders(scan.pattern)
        x = F.linear(u, self.x_proj_weight[0]).unsqueeze(2).expand(-1, -1, self.num_orders, -1)
        direction_B = F.embedding(subset_codes(subset, orders).transpose(1, 2), self.direction_B)
        # Tokens in the order of their steps, which then are those of delta, B and C as they are.
        u, window = in_step_order(u, orders), scan.window(u.shape[1])
        y = self._scanned(u, x, direction_B, out="per_order", local_window=window)
        return in_token_order(y, steps).sum(2)

    def _scanned(self, u: Tensor, x: Tensor, direction_B: Tensor, **options: Any) -> Tensor:
        """Scans u with the projections x (b, l, k, r + 2n) and the directions' part of B, of each token and path."""
        k = self.num_orders
        delta, B, C = x.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        B = B + direction_B.to(B.dtype)
        dt_weight: Tensor | None = self.dt_proj_weight.expand(k, -1, -1)
        if not self._scan_projects(u):
            delta, dt_weight = per_order_linear(delta, self.dt_proj_weight.expand(k, -1, -1)), None
        A, D, bias = (x.expand(k, *x.shape[1:]) for x in (self.A, self.D, self.dt_proj_bias))
        return selective_scan(
            u, delta, A, B, C, D, delta_bias=bias, dt_weight=dt_weight, backend=self.backend, **options
        )
