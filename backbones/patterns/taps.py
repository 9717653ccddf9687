"""Tap tables: which token each tap of a depthwise convolution reads.

`backbones.ops.depthwise_conv` takes two tables. ``taps`` (k, j, m) holds the token that tap j reads for output m, or
-1 outside of the sequence or grid, where zeros are read. ``inverse_taps`` (k, j, l) holds the output that reads token l
with tap j, or -1; the backward pass goes by it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from backbones.patterns.known import known_tables

Tables = tuple[Tensor, Tensor]


def causal_taps(orders: Tensor, num_taps: int) -> Tables:
    """Both tables, int32, of a causal convolution along k orders that visit each of l tokens once.

    The last tap reads the output's own token, the one before it the token visited one step earlier, and so on: the
    layout of ``conv1d``'s weights.

    Args:
        orders: (k, l) integers, each row a permutation of 0..l-1.
        num_taps: j.
    """
    orders = orders.long()
    step_of = orders.argsort(1).unsqueeze(1)
    back = torch.arange(num_taps - 1, -1, -1, device=orders.device).unsqueeze(1)
    return _tokens_at(orders, step_of - back), _tokens_at(orders, step_of + back)


def _tokens_at(orders: Tensor, steps: Tensor) -> Tensor:
    """The tokens at steps (k, j, l) of their orders, -1 before the first and after the last one."""
    length = orders.shape[1]
    tokens = orders.unsqueeze(1).expand(steps.shape).gather(2, steps.clamp(0, length - 1))
    return torch.where((steps >= 0) & (steps < length), tokens, -1).int()


def window_taps(
    height: int,
    width: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    device: torch.device | str | None = None,
) -> Tables:
    """Both tables, int32 with k = 1, of a square window over a grid padded by ``dilation * (kernel_size // 2)``.

    Taps are in raster order, as ``conv2d``'s weights, tokens and outputs too. The tables are cached and shared: never
    modify them in place.
    """
    return _window_taps(height, width, kernel_size, stride, dilation, device=device)


def window_outputs(length: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> int:
    """How many outputs a side of the grid has."""
    return (length + 2 * (dilation * (kernel_size // 2)) - dilation * (kernel_size - 1) - 1) // stride + 1


@known_tables
def _window_taps(
    height: int, width: int, kernel_size: int, stride: int, dilation: int, *, device: torch.device | str | None
) -> Tables:
    line = partial(_line_taps, kernel_size=kernel_size, stride=stride, dilation=dilation, device=device)
    (rows, output_rows), (columns, output_columns) = line(height), line(width)
    return _on_grid(rows, columns, width), _on_grid(output_rows, output_columns, columns.shape[1])


def _line_taps(length: int, kernel_size: int, stride: int, dilation: int, device: torch.device | str | None) -> Tables:
    """Both tables of one side of the window, (kernel_size, outputs) and (kernel_size, length)."""
    padding, outputs = dilation * (kernel_size // 2), window_outputs(length, kernel_size, stride, dilation)
    offset = torch.arange(kernel_size, device=device).unsqueeze(1) * dilation - padding
    reads = torch.arange(outputs, device=device) * stride + offset
    moved = torch.arange(length, device=device) - offset  # stride times the output that reads the place
    read_by = (moved >= 0) & (moved < outputs * stride) & (moved % stride == 0)
    return torch.where((reads >= 0) & (reads < length), reads, -1), torch.where(read_by, moved // stride, -1)


def replicated_taps(
    height: int, width: int, kernel_size: int, dilations: Sequence[int], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables, int32, of square windows of one size and several dilations over a grid whose border repeats.

    The gradient of the grid takes two steps, because a tap reads a cell of the border for several outputs: from the
    outputs to the grid with a frame around it, which holds the repetitions, and from there to the cells.

    Returns:
        ``taps`` (k, j, l), the token that tap j of the k-th dilation reads for an output; ``frame_taps`` (k, j, f), the
        output that reads a cell of the frame, or -1; ``folds`` (1, s, l), the cells of the frame that repeat a token,
        or -1. Taps, tokens and cells are in raster order. The tables are cached and shared: never modify them in place.
    """
    return _replicated_taps(height, width, kernel_size, tuple(dilations), device=device)


@known_tables
def _replicated_taps(
    height: int, width: int, kernel_size: int, dilations: tuple[int, ...], *, device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor]:
    reach = max(dilations) * (kernel_size // 2)
    line = partial(_replicated_line, kernel_size=kernel_size, reach=reach, device=device)
    taps, frame_taps = [], []
    for dilation in dilations:
        (rows, framed_rows), (columns, framed_columns) = line(height, dilation), line(width, dilation)
        taps.append(_on_grid(rows, columns, width))
        frame_taps.append(_on_grid(framed_rows, framed_columns, width))
    folds = _on_grid(_folds(height, reach, device), _folds(width, reach, device), width + 2 * reach)
    return torch.cat(taps), torch.cat(frame_taps), folds


def _replicated_line(
    length: int, dilation: int, kernel_size: int, reach: int, device: torch.device | str | None
) -> Tables:  # fmt: skip
    """Of one side: what each tap reads (kernel_size, length), and who reads (kernel_size, length + 2 reach)."""
    offset = (torch.arange(kernel_size, device=device).unsqueeze(1) - kernel_size // 2) * dilation
    reads = torch.arange(length, device=device) + offset
    read_by = torch.arange(-reach, length + reach, device=device) - offset
    return reads.clamp(0, length - 1), torch.where((read_by >= 0) & (read_by < length), read_by, -1)


def _folds(length: int, reach: int, device: torch.device | str | None) -> Tensor:
    """Of one side, (s, length): the places of the frame that repeat each of its own, or -1."""
    repeats = torch.arange(-reach, length + reach, device=device).clamp(0, length - 1).bincount()
    each = torch.arange(int(repeats.max()), device=device).unsqueeze(1)
    return torch.where(each < repeats, repeats.cumsum(0) - repeats + each, -1)


def _on_grid(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(1, j, cells) raster indices of all rows by all columns, -1 where either is."""
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    return torch.where((rows >= 0) & (columns >= 0), rows * width + columns, -1).int().flatten(2).flatten(0, 1)[None]
