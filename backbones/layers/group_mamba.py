"""The mixer of GroupMamba: groups of channels, each scanned along one order of its own."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.line import Line, are_whole
from backbones.layers.norm import LayerNorm
from backbones.layers.scan import Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import bottleneck_width, check_map
from backbones.layers.ss2d import DepthwiseConv2d, scan_grid
from backbones.layers.tracing import Opaque
from backbones.ops import silu_gate
from backbones.ops.dispatch import kernels
from backbones.ops.group_mixer.operator import HALVES, Plan, Weights, group_mixer, has_group_mixer
from backbones.ops.tracing import is_as_written, is_hooked_everywhere
from backbones.patterns import CROSS
from backbones.patterns.taps import window_taps

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


_BOTH = ("weight", "bias")
# Parts of the mixer and the names of their parameters, in the order of `Weights`, where ``skip`` precedes the norm's.
_PARTS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "fc1": (nn.Linear, _BOTH),
    "fc2": (nn.Linear, _BOTH),
    "in_proj": (GroupedLinear, ("weight",)),
    "out_proj": (GroupedLinear, ("weight",)),
    "ssm": (SelectiveSSM, SelectiveSSM.scanned),
    "conv2d": (DepthwiseConv2d, _BOTH),
    "out_norm": (nn.GroupNorm, _BOTH),
    "norm": (LayerNorm, _BOTH),
}


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
        if (operands := self._served(x)) is not None:
            return self.proj(group_mixer(x.flatten(1, 2), *operands).view_as(x))
        weight = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))))
        u, z = self.in_proj(x.unflatten(-1, (self.groups, -1))).chunk(2, dim=-1)
        u = self.conv2d(u.flatten(-2)).unflatten(-1, (self.groups, -1))
        y = scan_grid(self.ssm, u, self.scan, out="per_order")
        tokens = y.flatten(0, 2).flatten(1)  # (b h w, dim), where GroupNorm is a LayerNorm of each group
        y = self.out_proj(silu_gate(self.out_norm(tokens).view_as(y), z, backend=self.ssm.backend)).flatten(-2)
        return self.proj(self.norm(y * self.skip_scale * x * weight))

    def add_to(self, line: Line, x: Tensor) -> None:
        """The layer, of a map like ``x`` and its residual sum, which it norms itself, as steps of a block's line."""
        check_map(x, self.dim)
        line.norm(self.norm)
        line.add(self._step(line, x))
        line.linear(self.proj)

    def _step(self, line: Line, x: Tensor) -> Any:
        found = [line.weights(getattr(self, part), kind, *names) for part, (kind, names) in _PARTS.items()]
        found.insert(-1, line.weights(self, GroupMambaLayer, "skip_scale"))
        places = [place for places in found for place in places or [None]]
        plan = self._plan(x)
        if None in places or plan.visits is None or not plan.visits.complete or not self._takes(x):
            return None
        if not line.fits(*places[:HALVES]) or not are_whole(*places[HALVES:]):
            return None
        return kernels("group_mixer.step").GroupMixer(places, plan)

    def mixer_operands(self, x: Tensor) -> tuple[Plan, Weights]:
        """What `group_mixer` takes for a map x (b, h, w, dim)."""
        weights: list[Any] = [  # of which some are None where a module has no bias
            getattr(getattr(self, part), name) for part, (_, names) in _PARTS.items() for name in names
        ]
        weights.insert(-2, self.skip_scale)
        return self._plan(x), Weights(*weights)

    def _plan(self, x: Tensor) -> Plan:
        height, width = x.shape[1:3]
        orders, visits, _ = self.scan.pattern.tables(height, width, x.device)
        taps = window_taps(height, width, self.conv2d.kernel_size[0], device=x.device)
        return Plan(orders, visits, *taps, self.out_norm.eps, self.norm.eps)

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels know how a map x is scanned."""
        height, width = x.shape[1:3]
        return self.scan.window(height * width) <= 1 and not self.scan.pattern.padded(height, width)

    def _served(self, x: Tensor) -> tuple[Plan, Weights] | None:
        """`mixer_operands` where `group_mixer` serves x, and these modules as they are; else None."""
        if not x.is_cuda or is_hooked_everywhere():
            return None
        parts = [(getattr(self, part), kind) for part, (kind, _) in _PARTS.items()]
        if not all([type(part) is kind and is_as_written(part) for part, kind in parts]):
            return None
        if len({self.norm.backend, self.conv2d.backend, self.ssm.backend}) > 1 or not self._takes(x):
            return None
        operands = self.mixer_operands(x)
        return operands if has_group_mixer(x, *operands, self.ssm.backend) else None
