"""The Mamba mixer over image tokens, as Vim and LBVim use it, and its residual block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.selective_ssm import SelectiveSSM
from backbones.scan_patterns import BIDIRECTIONAL, FORWARD, REVERSE, ScanPattern

# Patterns that walk the token sequence itself. Their convolution needs no gather: backwards, it is the
# mirrored kernel.
_SEQUENCE_PATTERNS = {FORWARD: (False,), REVERSE: (True,), BIDIRECTIONAL: (False, True)}


class MambaMixer(nn.Module):
    """Mamba over image tokens, each order with its own convolution and state-space parameters (Vim, section 3.2).

    Tokens are a height x width grid in raster order, possibly with one class token in the middle. Orders of
    the grid visit the class token at their middle step.

    Args:
        dim: width of the tokens.
        pattern: orders to scan; with bidirectional, the published Vim.
        d_state: states of each channel.
        d_conv: taps of the causal convolution along an order.
        expand: inner width over ``dim``.
        dt_rank: rank of the step size's projection; None is ceil(dim / 16).
        local_window: see :func:`backbones.ops.selective_scan`; or a rule that gives it from the number of
            tokens.
        backend: see :func:`backbones.ops.selective_scan`.
    """

    def __init__(
        self,
        dim: int,
        pattern: ScanPattern = BIDIRECTIONAL,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        local_window: int | Callable[[int], int] = 0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = expand * dim
        self.d_inner, self.d_conv, self.pattern, self.local_window = d_inner, d_conv, pattern, local_window
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, device=device, dtype=dtype)
        self.conv_weight = nn.Parameter(torch.empty(pattern.num_orders, d_inner, d_conv, device=device, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(pattern.num_orders, d_inner, device=device, dtype=dtype))
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.ssm = SelectiveSSM(d_inner, d_state, dt_rank, pattern.num_orders, backend, device, dtype)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, device=device, dtype=dtype)
        nn.init.uniform_(
            self.conv_weight, -(d_conv**-0.5), d_conv**-0.5
        )  # PyTorch's default for a depthwise convolution
        nn.init.uniform_(self.conv_bias, -(d_conv**-0.5), d_conv**-0.5)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, l, dim) to (b, l, dim), where l is height * width of ``grid``, or one more with a class
        token.
        """
        in_weight, gate_weight = self.in_proj.weight.chunk(2)  # two products write contiguous rows, one would not
        z = F.linear(x, gate_weight)
        x = F.linear(x, in_weight)
        if self.pattern in _SEQUENCE_PATTERNS:
            orders = self.pattern.orders(1, x.shape[1], x.device)
            x = torch.stack([self._convolve(x, k, back) for k, back in enumerate(_SEQUENCE_PATTERNS[self.pattern])])
        else:
            orders = _token_orders(self.pattern, grid, x)
            x = torch.stack([self._convolve_along(x, k, order) for k, order in enumerate(orders.long())])
        u = F.silu(x).permute(1, 2, 0, 3)  # (b, l, k, c), stored by order
        window = self.local_window(x.shape[2]) if callable(self.local_window) else self.local_window
        y = self.ssm(u, orders, local_window=window) * F.silu(z)
        return self.out_proj(y / self.pattern.num_orders)

    def _convolve(self, x: Tensor, k: int, backwards: bool) -> Tensor:
        weight = self.conv_weight[k].flip(-1) if backwards else self.conv_weight[k]
        y = F.conv1d(
            x.transpose(1, 2),
            weight.unsqueeze(1),
            self.conv_bias[k],
            padding=self.d_conv - 1,
            groups=self.d_inner,
        ).transpose(1, 2)
        return y[:, self.d_conv - 1 :] if backwards else y[:, : x.shape[1]]

    def _convolve_along(self, x: Tensor, k: int, order: Tensor) -> Tensor:
        y = self._convolve(x[:, order], k, backwards=False)
        return torch.zeros_like(x).index_copy(1, order, y)


def _token_orders(pattern: ScanPattern, grid: tuple[int, int], x: Tensor) -> Tensor:
    """Orders of the grid as orders of the tokens, with the class token, if there is one, in the middle."""
    cells = grid[0] * grid[1]
    orders = pattern.orders(*grid, x.device)
    if pattern.padded(*grid) or orders.shape[1] != cells:
        raise ValueError(
            f"pattern: {pattern.name!r} does not visit each cell of a {grid[0]} x {grid[1]} grid once, which "
            "a causal convolution along its orders needs"
        )
    if x.shape[1] == cells:
        return orders
    middle = cells // 2
    orders = orders + (orders >= middle).to(orders.dtype)
    class_token = orders.new_full((orders.shape[0], 1), middle)
    return torch.cat([orders[:, :middle], class_token, orders[:, middle:]], dim=1)


class MambaBlock(nn.Module):
    """x + drop_path(mixer(norm(x))): the stream stays in the dtype of x, float32 under autocast."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = drop_path

    def branch(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the block adds to its input, before stochastic depth."""
        return self.mixer(self.norm(x), grid)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, l, dim) to (b, l, dim)."""
        return x + self.drop_path(self.branch(x, grid))
