"""Wrappers that put a layer where another layout is spoken: (b, c, h, w), (b, h, w, c) or (b, l, c)."""

import math

from torch import Tensor, nn

from backbones.layers.resolution import channels_first, channels_last
from backbones.layers.tracing import Opaque


class ChannelsFirst(nn.Module):
    """A layer on maps (b, h, w, c), for convolutional networks, whose maps are (b, c, h, w).

    Args:
        layer: what takes and returns channels-last maps; an ``nn.Sequential`` of several transposes once.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c', h', w'), as the layer changes it."""
        return channels_first(self.layer(channels_last(x)))


class OnMap(Opaque, nn.Module):
    """A layer on tokens (b, l, c), for maps (b, h, w, c): their cells are the tokens, in raster order.

    Args:
        layer: called as ``layer(tokens, grid)`` with the rows and columns of the map, such as
            :class:`backbones.layers.MambaMixer` and :class:`backbones.layers.MambaBlock`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) to (b, h, w, c)."""
        if x.dim() != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (b, h, w, c)")
        height, width = x.shape[1:3]
        return self.layer(x.flatten(1, 2), (height, width)).unflatten(1, (height, width))


class OnTokens(Opaque, nn.Module):
    """A layer on maps (b, h, w, c), for the tokens (b, l, c) of a transformer without a class token.

    Args:
        layer: what takes and returns channels-last maps of one size.
        grid: rows and columns of the tokens; None is a square.

    Raises:
        ValueError: in ``forward``, the tokens do not fill the grid.
    """

    def __init__(self, layer: nn.Module, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.layer, self.grid = layer, grid

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, c) to (b, l, c); tokens are in raster order."""
        if x.dim() != 3:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (b, l, c)")
        tokens = x.shape[1]
        grid = self.grid or (math.isqrt(tokens),) * 2
        if grid[0] * grid[1] != tokens:
            wanted = f"{grid[0]} x {grid[1]}" if self.grid else "a square number, or a grid= for OnTokens"
            raise ValueError(f"x: got {tokens} tokens, expected {wanted}; a class token has no place on a map")
        return self.layer(x.unflatten(1, grid)).flatten(1, 2)
