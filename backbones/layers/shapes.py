"""Checks of what a layer is given; they name the argument, what came and what was expected."""

from torch import Tensor, nn


def check_map(x: Tensor, dim: int) -> None:
    """Raises a ValueError unless ``x`` is a channels-last map (b, h, w, dim)."""
    if x.dim() != 4 or x.shape[-1:] != (dim,):
        hint = ""
        if x.shape[1:2] == (dim,):
            hint = "; ChannelsFirst wraps a layer for (b, c, h, w)"
        elif x.dim() == 3:
            hint = "; OnTokens wraps a layer for (b, l, c)"
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (b, h, w, {dim}){hint}")


def check_tokens(x: Tensor, dim: int) -> None:
    """Raises a ValueError unless ``x`` is a sequence of tokens (b, l, dim)."""
    if x.dim() != 3 or x.shape[-1:] != (dim,):
        hint = "; OnMap wraps a layer for (b, h, w, c)" if x.dim() == 4 else ""
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (b, l, {dim}){hint}")


def input_width(linear: nn.Module, dim: int) -> int:
    """Channels that a linear layer reads; ``dim``, as it was made, where what stands in its place does not tell."""
    return getattr(linear, "in_features", dim)


def check_width(x: Tensor, dim: int) -> None:
    """Raises a ValueError unless the last axis of ``x`` is ``dim`` long."""
    if x.shape[-1:] != (dim,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {dim})")


def inner_width(dim: int, ratio: float, argument: str) -> int:
    """``ratio`` times ``dim``, rounded down.

    Raises:
        ValueError: that is less than one channel; it names ``argument``, which the ratio was given as.
    """
    if dim < 1:
        raise ValueError(f"dim: got {dim}, expected at least 1")
    if (inner := int(ratio * dim)) < 1:
        raise ValueError(f"{argument}: got {ratio}, which leaves no channel of {dim}")
    return inner


def bottleneck_width(dim: int, reduction: int) -> int:
    """``dim`` over ``reduction``, rounded down.

    Raises:
        ValueError: that is less than one channel.
    """
    if dim < reduction:
        raise ValueError(f"dim: got {dim} channels, expected at least {reduction}, by which a bottleneck is narrower")
    return dim // reduction


def checked_grid(grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    """``grid``, or (1, tokens) for None.

    Raises:
        ValueError: it has neither as many cells as there are tokens nor one less, for a class token.
    """
    if grid is None:
        return 1, tokens
    if tokens - grid[0] * grid[1] not in (0, 1):
        raise ValueError(f"grid: got {grid[0]} x {grid[1]}, expected one of {tokens} cells, or {tokens - 1} of them")
    return grid
