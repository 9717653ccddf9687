"""Tables of weighted sums: which rows each cell of a map is made of, and how much of each.

`backbones.ops.fused.row_sums` takes four tables. ``table`` (j, m) holds the rows that output m sums, or -1, and
``weights`` (j, m) their weights in float32; the other two, (i, l), are those of the transposed sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.patterns.known import known_tables
from backbones.patterns.pattern import ScanPattern

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def upsampling(
    size: tuple[int, int],
    new_size: tuple[int, int],
    mode: str,
    pattern: ScanPattern | None = None,
    joined: bool = False,
    device: torch.device | str | None = None,
) -> Tables:
    """All four tables of ``F.interpolate(map, new_size, mode=mode)`` on flattened channels-last maps of ``size``.

    With a ``pattern`` of one order, which walks over all cells several times in turn, the rows are its steps: those
    that visit a cell are summed to it. The tables are cached and shared: never modify them in place.

    Args:
        size: height and width.
        new_size: the same of the result.
        mode: "bilinear" or "nearest".
        pattern: of the steps; None where the rows are cells.
        joined: add to a map of ``new_size``, whose cells are the first rows.
        device: of the tables.
    """
    return _upsampling(*size, *new_size, mode, pattern, joined, device=device)


@known_tables
def _upsampling(
    height: int, width: int, new_height: int, new_width: int, mode: str, pattern: ScanPattern | None, joined: bool,
    *, device: torch.device | str | None,
) -> Tables:  # fmt: skip
    rows, of_rows = _line(height, new_height, mode, device)
    columns, of_columns = _line(width, new_width, mode, device)
    table = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    weights = (of_rows[:, None, :, None] * of_columns[None, :, None, :]).flatten(2).flatten(0, 1)
    length = height * width
    if pattern is not None:
        walks = pattern.orders(height, width, device).view(-1, length)
        steps = walks.argsort(1) + length * torch.arange(len(walks), device=device).unsqueeze(1)
        table, weights = steps[:, table].flatten(0, 1), weights.repeat(len(walks), 1)
        length *= len(walks)
    if joined:
        cells = torch.arange(table.shape[1], device=device).unsqueeze(0)
        table, weights = torch.cat([cells, table + cells.numel()]), torch.cat([torch.ones_like(weights[:1]), weights])
        length += cells.numel()
    return table.int(), weights, *_transposed(table, weights, length)


def _line(length: int, outputs: int, mode: str, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """The places along one side that each output reads, and their weights, both (j, outputs)."""
    if mode == "nearest":
        places = torch.arange(length, dtype=torch.float32, device=device).view(1, 1, length)
        return F.interpolate(places, outputs, mode=mode).view(1, outputs).long(), torch.ones(1, outputs, device=device)
    at = (torch.arange(outputs, dtype=torch.float64, device=device) + 0.5) * (length / outputs) - 0.5
    at = at.clamp(min=0)
    low = at.floor().long().clamp(max=length - 1)
    share = (at - low).float()
    return torch.stack([low, (low + 1).clamp(max=length - 1)]), torch.stack([1 - share, share])


def _transposed(table: Tensor, weights: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Both tables of the transposed sum, over the outputs that read a row."""
    outputs = torch.arange(table.shape[1], device=table.device).expand_as(table)
    read = weights > 0
    rows, order = table[read].sort(stable=True)
    outputs, weights = outputs[read][order], weights[read][order]
    counts = rows.bincount(minlength=length)
    place = torch.arange(len(rows), device=table.device) - (counts.cumsum(0) - counts)[rows]
    shape = int(counts.max()), length
    into = outputs.new_full(shape, -1), weights.new_zeros(shape)
    for of_all, of_each in zip(into, (outputs, weights), strict=True):
        of_all[place, rows] = of_each
    return into[0].int(), into[1]
