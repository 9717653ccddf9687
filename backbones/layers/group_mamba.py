"""The mixer of GroupMamba: groups of channels, each scanned along one order of its own."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.norm import LayerNorm
from backbones.layers.scan import Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import bottleneck_width, check_map
from backbones.layers.ss2d import DepthwiseConv2d, scan_grid
from backbones.layers.tracing import Opaque
from backbones.ops import silu_gate
from backbones.patterns import CROSS

_CROSS = Scan(CROSS)


class GroupedLinear(nn.Module):
    """A linear layer for each group of channels, without bias."""

    autocast_weights: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(..., groups, in_features) to (..., groups, out_features)."""
        return torch.einsum("...ki,koi->...ko", x, self.weight)


class GroupMambaLayer(Opaque, nn.Module):
    """One SS2D for each group of channels and order, and channel weights over all (GroupMamba, section 3.3).

    Args:
        dim: width of the map, a multiple of the number of orders.
        scan: orders, one for each group; window and backend.
        d_state: states of each channel.

    Raises:
        ValueError: ``dim`` does not divide into the groups, or is less than 16; in ``forward``, another shape.
    """

    prunable: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dim: int,
        scan: Scan = _CROSS,
        d_state: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        groups = scan.pattern.num_orders
        if dim % groups:
            raise ValueError(f"dim: got {dim}, expected a multiple of {groups}, the orders of {scan.pattern.name!r}")
        width = dim // groups
        self.dim, self.groups, self.scan = dim, groups, scan
        hidden = bottleneck_width(dim, 16)
        self.norm = LayerNorm(dim, autocast_out=True, **dd)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.in_proj = GroupedLinear(groups, width, 2 * width, **dd)
        self.conv2d = DepthwiseConv2d(dim, silu=True, **dd)
        self.ssm = SelectiveSSM(width, d_state, -(-width // 16), groups, scan.backend, **dd)
        self.out_norm = nn.GroupNorm(groups, dim, **dd)
        self.out_proj = GroupedLinear(groups, width, width, **dd)
        self.skip_scale = nn.Parameter(torch.ones(1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        check_map(x, self.dim)
        return self.of_normed(self.norm(x))

    def of_normed(self, x: Tensor) -> Tensor:
        """The layer, of what its norm gave."""
        weight = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))))
        u, z = self.in_proj(x.unflatten(-1, (self.groups, -1))).chunk(2, dim=-1)
        u = self.conv2d(u.flatten(-2)).unflatten(-1, (self.groups, -1))
        y = scan_grid(self.ssm, u, self.scan, out="per_order")
        tokens = y.flatten(0, 2).flatten(1)  # (b h w, dim), where GroupNorm is a LayerNorm of each group
        y = self.out_proj(silu_gate(self.out_norm(tokens).view_as(y), z, backend=self.ssm.backend)).flatten(-2)
        return self.proj(self.norm(y * self.skip_scale * x * weight))
