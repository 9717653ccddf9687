"""Rotary position embedding of a grid of tokens, applied to the tokens themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turns pairs of channels by angles that grow with a token's row (first half) or column (second half).

    Pair m of either half turns by t theta^(-4 m / dim), where t counts rows or columns as if there were
    ``pretrained_side`` of them (EVA-02, arXiv:2303.11331). Other grids than the built one resample the tables, as the
    authors of Vim and LocalMamba do.

    Args:
        dim: width of the tokens, a multiple of 4.
        grid_size: rows and columns that the tables are made for.
        pretrained_side: side of the grid whose angles these are.
        theta: base of the wavelengths.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int],
        pretrained_side: int = 14,
        theta: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim: got {dim}, expected a multiple of 4")
        self.grid_size = grid_size
        double: dict[str, Any] = {"device": device, "dtype": torch.float64}
        frequencies = theta ** (-torch.arange(0, dim // 2, 2, **double) / (dim // 2))
        rows, columns = (
            torch.outer(torch.arange(side, **double) / side * pretrained_side, frequencies.repeat_interleave(2))
            for side in grid_size
        )
        angles = torch.cat(
            [rows[:, None].expand(*grid_size, -1), columns[None].expand(*grid_size, -1)], dim=-1
        ).flatten(0, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("freqs_cos", angles.cos().to(dtype))
        self.register_buffer("freqs_sin", angles.sin().to(dtype))

    def tables(self, grid: tuple[int, int], same: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines (height * width, dim) for the tokens of ``grid``; ``same`` says it is the built one."""
        if same:
            return self.freqs_cos, self.freqs_sin
        return resampled(self.freqs_cos, self.grid_size, grid), resampled(self.freqs_sin, self.grid_size, grid)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channels (2 m, 2 m + 1) of x (b, l, dim) by the angles of tables (l, dim)."""
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def resampled(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table over the tokens of a grid (..., height * width, c), bicubic at the places of another grid."""
    maps = table.float().unflatten(-2, old).movedim(-1, -3)
    maps = F.interpolate(maps.reshape(-1, *maps.shape[-3:]), size=new, mode="bicubic", align_corners=False)
    return maps.to(table.dtype).flatten(2).transpose(1, 2).reshape(*table.shape[:-2], -1, table.shape[-1])
