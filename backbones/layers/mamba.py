"""The Mamba mixer over image tokens, as Vim and LBVim use it, and its residual block."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.layers.constructor import Constructor
from backbones.layers.line import Line
from backbones.layers.linear import linear_parts
from backbones.layers.norm import RMSNorm, residual_norm
from backbones.layers.scan import Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import check_tokens, checked_grid, inner_width, input_width
from backbones.layers.tracing import Opaque
from backbones.ops import Visits, depthwise_conv, silu_gate
from backbones.patterns import BIDIRECTIONAL, FORWARD, ScanPattern
from backbones.patterns.subset import Subset, in_step_order, in_token_order
from backbones.patterns.tokens import token_tables

token_norm = partial(RMSNorm, autocast_out=True)
_BIDIRECTIONAL = Scan(BIDIRECTIONAL)


class MambaMixer(Opaque, nn.Module):
    """Mamba over image tokens, each order with its own convolution and state-space parameters (Vim, section 3.2).

    Tokens are a height x width grid in raster order, possibly with one class token in the middle. Orders of
    the grid visit the class token at their middle step. Padded slots of an order are steps of their own: the
    convolution runs over them, so each has an input, a step size and weights, and drives the state.

    Args:
        dim: width of the tokens.
        scan: orders to scan (bidirectional in the published Vim), window and backend.
        d_state: states of each channel.
        d_conv: taps of the causal convolution along an order.
        expand: inner width over ``dim``.
        dt_rank: rank of the step size's projection; None is ceil(dim / 16).
        merge: constructor called as ``merge(d_inner, device=, dtype=)``, of what takes the gated outputs of k orders
            (b, l, k, d_inner) to one (b, l, d_inner); None is their mean.

    Raises:
        ValueError: in ``forward``, another shape, a grid of another number of cells, or an order that does not visit
            each cell once.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)
    no_decay: ClassVar[tuple[str, ...]] = ("conv_bias",)  # 2-D, as it is stacked over orders

    def __init__(
        self,
        dim: int,
        scan: Scan = _BIDIRECTIONAL,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        merge: Constructor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner, num_orders = inner_width(dim, expand, "expand"), scan.pattern.num_orders
        self.dim, self.d_inner, self.d_conv, self.scan = dim, d_inner, d_conv, scan
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, device=device, dtype=dtype)
        self.conv_weight = nn.Parameter(torch.empty(num_orders, d_inner, d_conv, device=device, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(num_orders, d_inner, device=device, dtype=dtype))
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.ssm = SelectiveSSM(d_inner, d_state, dt_rank, num_orders, scan.backend, device, dtype)
        self.merge = None if merge is None else merge(d_inner, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, device=device, dtype=dtype)
        nn.init.uniform_(
            self.conv_weight, -(d_conv**-0.5), d_conv**-0.5
        )  # PyTorch's default for a depthwise convolution
        nn.init.uniform_(self.conv_bias, -(d_conv**-0.5), d_conv**-0.5)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        per_order: bool = False,
        gaps: Tensor | None = None,
        subset: Subset | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b, l, dim) to (b, l, dim).

        Args:
            x: l is height * width of ``grid``, or one more with a class token.
            grid: rows and columns of the patches; None takes the tokens as one row.
            per_order: also return the gated output of each order before they are merged, (b, l, k, d_inner).
            gaps: with ``per_order``, see :meth:`backbones.layers.SelectiveSSM.per_order_over_gaps`.
            subset: the tokens that x has, where some of the grid's are missing; orders of a grid go by it.
        """
        check_tokens(x, input_width(self.in_proj, self.dim))
        grid = checked_grid(grid, x.shape[1])
        along = subset is not None and self.directions is None
        if self.merge is None and not per_order and not along:
            y, z = self._scanned(x, grid, "sum")
            return self.out_proj(silu_gate(y, z, 1 / self.scan.pattern.num_orders, backend=self.ssm.backend))
        y, z = self._along(x, subset) if along and subset else self._scanned(x, grid, "per_order", gaps)
        gated = y * F.silu(z).unsqueeze(2)
        merged = self.out_proj(gated.mean(2) if self.merge is None else self.merge(gated))
        return (merged, gated) if per_order else merged

    def add_to(self, line: Line, x: Tensor, grid: tuple[int, int] | None) -> None:
        """The layer, of tokens like ``x``, as steps of a block's line."""
        check_tokens(x, input_width(self.in_proj, self.dim))
        tokens, pattern = x.shape[1], self.scan.pattern
        if self.merge is not None:
            line.fails = True
            return
        grid = checked_grid(grid, tokens)
        orders, *taps = token_tables(pattern, *grid, tokens, self.d_conv, device=x.device)
        if orders.shape[1] != tokens:
            line.fails = True
            return
        line.linear(self.in_proj)
        line.split()
        conv = line.weights(self, MambaMixer, "conv_weight", "conv_bias")
        line.scan(conv, taps, self.ssm, orders, self.scan.window(tokens), _visits(pattern, grid))
        line.gate(1 / pattern.num_orders)
        line.linear(self.out_proj)

    @property
    def directions(self) -> tuple[int, ...] | None:
        """Of orders along a sequence of any length, 1 for each that walks it and -1 for each that walks it back.

        None: the orders are those of a grid.
        """
        return self.scan.pattern.sequence

    def _scanned(self, x: Tensor, grid: tuple[int, int], out: str, gaps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The outputs of the scans, and the gate."""
        pattern, window = self.scan.pattern, self.scan.window(x.shape[1])
        visits = _visits(pattern, grid)
        tokens = x.shape[1]
        x, z = linear_parts(self.in_proj, x, [self.d_inner] * 2)
        orders, *taps = token_tables(pattern, *grid, tokens, self.d_conv, device=x.device)
        u = depthwise_conv(x, self.conv_weight, self.conv_bias, *taps, silu=True, backend=self.ssm.backend)
        if gaps is not None:
            return self.ssm.per_order_over_gaps(u, gaps, orders, visits), z
        return self.ssm(u, orders, out, window, visits)[:, :tokens], z

    def _along(self, x: Tensor, subset: Subset) -> tuple[Tensor, Tensor]:
        """As `_scanned`, order by order, along the ways of the tokens that are left, which differ from image to image.

        Tokens are put in the order of their steps, so that operators run from the first to the last.
        """
        k = self.scan.pattern.num_orders
        x, z = linear_parts(self.in_proj, x, [self.d_inner] * 2)
        orders, steps = subset.orders(self.scan.pattern)
        u, tokens = in_step_order(x, orders).flatten(2), x.shape[1]
        _, *taps = token_tables(FORWARD, 1, tokens, tokens, self.d_conv, device=x.device)
        weight, bias = self.conv_weight.flatten(0, 1).unsqueeze(0), self.conv_bias.flatten().unsqueeze(0)
        u = depthwise_conv(u, weight, bias, *taps, silu=True, backend=self.ssm.backend)
        y = self.ssm(u.squeeze(2).unflatten(-1, (k, -1)), out="per_order", local_window=self.scan.window(tokens))
        return in_token_order(y, steps), z


def _visits(pattern: ScanPattern, grid: tuple[int, int]) -> Visits | None:
    """Facts for the scan: with class token and padded slots, every order visits every step's token once."""
    known = pattern.visits_each_cell_once(*grid)
    if known is False:
        raise ValueError(
            f"pattern: {pattern.name!r} does not visit each cell of a {grid[0]} x {grid[1]} grid once, which "
            "a causal convolution along its orders needs"
        )
    return known and Visits(repeats=False, complete=True, disjoint=pattern.num_orders == 1, covers=True)


class MambaBlock(nn.Module):
    """x + drop_path(mixer(norm(x))): the stream stays in the dtype of x, float32 under autocast.

    Args:
        dim: width of the tokens.
        mixer: constructor called as ``mixer(dim, device=, dtype=)``, of a layer called as ``mixer(tokens, grid)``.
        norm_layer: constructor of the norm.
        drop_path: rate of stochastic depth.
        after: constructor called as ``after(dim, device=, dtype=)``, of a layer on the stream behind the block that is
            called as ``after(tokens, grid)``, with ``subset=`` where tokens are missing.
    """

    def __init__(
        self,
        dim: int,
        mixer: Constructor = MambaMixer,
        norm_layer: Constructor = token_norm,
        drop_path: float = 0.0,
        after: Constructor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = norm_layer(dim, **dd)
        self.mixer = mixer(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.after = None if after is None else after(dim, **dd)

    def branch(self, x: Tensor, grid: tuple[int, int] | None, subset: Subset | None = None) -> Tensor:
        """The residual branch of the block, before stochastic depth."""
        x = self.norm(x)
        return self.mixer(x, grid) if subset is None else self.mixer(x, grid, subset=subset)

    def join(self, x: Tensor, branch: Tensor, grid: tuple[int, int] | None, subset: Subset | None = None) -> Tensor:
        """The block's output, from its input and what it adds to it."""
        x = x + self.drop_path(branch)
        if self.after is None:
            return x
        return self.after(x, grid) if subset is None else self.after(x, grid, subset=subset)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        subset: Subset | None = None,
        instead: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """(b, l, dim) to (b, l, dim).

        Args:
            x: tokens of the grid.
            grid: as the mixer takes it.
            subset: the tokens that x has, where some of the grid's are missing.
            instead: called as ``instead(block, x, grid, subset)`` to do what the block does, by a caller that also
                wants what is between :meth:`branch` and :meth:`join`; hooks of the block see its result.
        """
        if instead is not None:
            return instead(self, x, grid, subset)
        return self.join(x, self.branch(x, grid, subset), grid, subset)

    def chained(
        self, x: Tensor, pending: Tensor | None, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block of x + pending, its last sum left to what comes behind: see `backbones.base.chain.run_chain`."""
        x, y = residual_norm(x, pending, self.norm)
        y = self.mixer(y, grid)
        return (x, self.drop_path(y)) if self.after is None else (self.join(x, y, grid), None)

    def line(self, x: Tensor, pending: Tensor | None, grid: tuple[int, int] | None = None) -> Line | None:
        """What `chained` does as steps behind one another; None where it cannot be."""
        line = Line.of(x, pending, getattr(self.norm, "backend", None)) if self.after is None else None
        if line is None:
            return None
        line.norm(self.norm)
        line.layer(self.mixer, x, grid)
        line.drop_path(self.drop_path)
        return line
