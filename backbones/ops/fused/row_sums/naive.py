"""Weighted sums of rows in plain PyTorch: the definition that the kernel is held against."""

from torch import Tensor


def forward(x: Tensor, base: Tensor | None, table: Tensor, weights: Tensor) -> Tensor:
    """:func:`backbones.ops.fused.row_sums.operator.row_sums`, unchecked."""
    y = x.new_zeros(x.shape[0], table.shape[1], x.shape[2]) if base is None else base
    for rows, weight in zip(table.long(), weights.to(x.dtype), strict=True):
        y = y + x.index_select(1, rows.clamp(min=0)) * weight.where(rows >= 0, 0).unsqueeze(1)
    return y
