"""The channel gate that LocalMamba puts on the outputs of its directions before it adds them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.norm import LayerNorm
from backbones.layers.shapes import bottleneck_width


class BiAttn(nn.Module):
    """Gates every order's channels by what its tokens hold on average, then adds the orders (LocalMamba, section 3.3).

    One gate serves all orders. The paper's SCAttn gates places, too; the published models have no such part.

    Args:
        dim: channels c.
        reduction: c over the width of the bottleneck.

    Raises:
        ValueError: ``dim`` is less than ``reduction``.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, device=device, dtype=dtype)
        hidden = bottleneck_width(dim, reduction)
        self.global_reduce = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.channel_select = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        """(b, l, k, c) to (b, l, c)."""
        mean = self.norm(y).mean(1)
        gate = torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(mean))))
        return (y * gate.unsqueeze(1)).sum(2)
