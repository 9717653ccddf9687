"""The Mamba-2 mixer over image tokens, as Adventurer uses it."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.layers.linear import linear_parts
from backbones.layers.norm import RMSNorm
from backbones.layers.scan import OnBackend, Scan
from backbones.layers.shapes import check_tokens, checked_grid, inner_width, input_width
from backbones.ops import depthwise_conv, selective_scan, silu_gate, ssd
from backbones.patterns import FORWARD, ScanPattern
from backbones.patterns.known import known_tables
from backbones.patterns.subset import Subset, tokens_at
from backbones.patterns.taps import causal_taps

_FORWARD = Scan(FORWARD)


class Mamba2Mixer(OnBackend, nn.Module):
    """Mamba-2 (arXiv:2405.21060, section 7) from the mean of the tokens over the patches to the class token.

    One order is walked, so that tokens know of those before them; the mean, which stands in front, tells of the rest
    (Adventurer, arXiv:2410.07599). The published models walk the patches backwards in two of their blocks.

    Args:
        dim: width of the tokens.
        scan: the order of the patches, window and backend.
        d_state: states of each channel.
        head_dim: channels of a head, whose states decay alike.
        d_conv: taps of the causal convolution.
        expand: inner width over ``dim``.

    Raises:
        ValueError: ``head_dim`` does not divide the inner width, or the pattern has several orders; in ``forward``,
            another shape, a grid of another number of cells, or an order that does not visit each cell once.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)
    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias", "conv_bias")

    def __init__(
        self, dim: int, scan: Scan = _FORWARD, d_state: int = 64, head_dim: int = 64, d_conv: int = 4, expand: int = 2,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        d_inner = inner_width(dim, expand, "expand")
        if head_dim < 1 or d_inner % head_dim:
            raise ValueError(f"head_dim: got {head_dim}, expected a number that divides the inner width {d_inner}")
        self.dim, self.scan, self.backend = dim, scan.of_one_order(), scan.backend
        self.d_inner, self.d_conv = d_inner, d_conv
        self.num_heads, mixed = self.d_inner // head_dim, self.d_inner + 2 * d_state
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, self.d_inner + mixed + self.num_heads, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(1, mixed, d_conv, **dd).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(1, mixed, **dd).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, **dd).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.num_heads, **dd))
        dt = torch.empty(self.num_heads, **dd).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.norm = RMSNorm(self.d_inner, autocast_out=True, **dd)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False, **dd)

    @property
    def directions(self) -> tuple[int, ...] | None:
        """See :attr:`backbones.layers.MambaMixer.directions`."""
        return self.scan.pattern.sequence

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        per_order: bool = False,
        subset: Subset | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b, l, dim) to (b, l, dim).

        Args:
            x: patches in raster order and, behind them, at most one class token.
            grid: rows and columns of the patches; None takes the tokens as one row.
            per_order: also return the gated output, (b, l, 1, d_inner).
            subset: the tokens that x has, where some of the grid's are missing.
        """
        check_tokens(x, input_width(self.in_proj, self.dim))
        grid = checked_grid(grid, x.shape[1])
        if subset is None or self.directions is not None:
            y, gated = self._mixed(x, grid, self.scan.pattern)
        else:  # an order of the grid: tokens change places, and walk as a sequence
            patches, ends = subset.cells.shape[1], torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            ways = Subset(subset.grid, subset.cells).orders(self.scan.pattern)
            way, back = (torch.cat([order[:, 0], ends[:, patches:]], dim=1) for order in ways)
            y, gated = (tokens_at(part, back) for part in self._mixed(tokens_at(x, way), (1, patches), FORWARD))
        return (y, gated.unsqueeze(2)) if per_order else y

    def _mixed(self, x: Tensor, grid: tuple[int, int], pattern: ScanPattern) -> tuple[Tensor, Tensor]:
        """The result, and the gated output in front of the norm."""
        mixed = self.d_inner + 2 * self.d_state
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        z, u, dt = linear_parts(self.in_proj, x, [self.d_inner, mixed, self.num_heads])
        orders, *taps = _tables(pattern, *grid, x.shape[1], self.d_conv, device=x.device)
        u = depthwise_conv(u, self.conv_weight, self.conv_bias, *taps, silu=True, backend=self.backend).squeeze(2)
        u, B, C = u.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        y = self._scanned(u, dt, B.unsqueeze(2), C.unsqueeze(2), None if pattern == FORWARD else orders)
        y = silu_gate(y[:, 1:], z[:, 1:], backend=self.backend)
        return self.out_proj(self.norm(y.to(self.norm.weight.dtype))), y  # in float32 under autocast

    def _scanned(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, orders: Tensor | None) -> Tensor:
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        window = self.scan.window(u.shape[1])
        if window < 2:
            order = None if orders is None else orders[0]
            backend = "naive" if self.backend == "naive" else None
            heads = u.unflatten(-1, (self.num_heads, -1))
            return ssd(heads, dt, A, B, C, self.D, orders=order, dt_bias=self.dt_bias, backend=backend).flatten(2)
        # Windows are the selective scan's: every channel of a head has its decay.
        width = self.d_inner // self.num_heads
        repeat = torch.eye(self.num_heads, dtype=A.dtype, device=A.device).repeat_interleave(width, 0)
        A, D, bias = (parameter.repeat_interleave(width)[None] for parameter in (A, self.D, self.dt_bias))
        return selective_scan(
            u, dt.unsqueeze(2), A[..., None].expand(-1, -1, self.d_state), B, C, D, orders=orders, delta_bias=bias,
            dt_weight=repeat[None], local_window=window, backend=self.backend,
        )  # fmt: skip


@known_tables
def _tables(
    pattern: ScanPattern, height: int, width: int, tokens: int, num_taps: int, *, device: torch.device
) -> tuple[Tensor, ...]:
    """The order (1, l) of the mean, the patches and, where there is one, the class token, and the taps along it."""
    if pattern.padded(height, width) or pattern.visits_each_cell_once(height, width) is False:
        raise ValueError(f"pattern: {pattern.name!r} does not visit each cell of a {height} x {width} grid once")
    order = pattern.orders(height, width, device) + 1
    ends = torch.arange(tokens, device=device, dtype=order.dtype)[None]
    order = torch.cat([ends[:, :1], order, ends[:, height * width + 1 :]], dim=1)
    return order, *causal_taps(order, num_taps)
