"""The mixer of Spatial-Mamba: one raster scan, whose states are mixed with their neighbours in the plane."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.norm import LayerNorm
from backbones.layers.resolution import channels_first, channels_last
from backbones.layers.scan import OnBackend, Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import check_map, inner_width, input_width
from backbones.layers.ss2d import DepthwiseConv2d, scan_grid
from backbones.layers.tracing import Opaque
from backbones.ops import Visits, silu_gate
from backbones.ops.depthwise.replicated import has_replicated_conv, replicated_conv
from backbones.ops.fused.state_output.operator import state_output
from backbones.patterns import FORWARD
from backbones.patterns.taps import replicated_taps

_FORWARD = Scan(FORWARD)


class StateScan(SelectiveSSM):
    """A selective state-space layer that gives its states, one a channel, and C; its product and D are left to the
    caller.
    """

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        orders: Tensor | None = None,
        out: str = "sum",
        local_window: int = 0,
        visits: Visits | None = None,
    ) -> tuple[Tensor, Tensor]:
        """u (b, l, c) to states (b, l, c), in float32 at least, and C (b, l, 1)."""
        delta, dt_weight, B, C = self.project(u)
        dtype = torch.promote_types(u.dtype, torch.float32)
        # With n = 1, C = 1 and no D the scan's output is its state.
        operands = u.to(dtype), delta, dt_weight, B, torch.ones_like(B, dtype=dtype), None
        return self._scan_of(operands, orders, out, local_window, visits), C.flatten(2)


class StateFusion(OnBackend, nn.Module):
    """Weighted sum of depthwise 3 x 3 convolutions of dilation 1, 3 and 5 that repeat the border (SASF).

    The sum stays in the states' dtype under autocast: half precision overflows on 27 taps that start at 1.
    """

    dilations = (1, 3, 5)

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(self.dilations), dim, 3, 3, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.ones(len(self.dilations), device=device, dtype=dtype))
        self.fused: Tensor | None
        self.register_buffer("fused", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            if self.fused is not None:
                return _convolve(x, self.fused, dilation=1)
            kernels = self.alpha.view(-1, 1, 1, 1) * self.weight
            if has_replicated_conv(x, kernels, self.backend):
                tables = replicated_taps(x.shape[1], x.shape[2], 3, self.dilations, device=x.device)
                return replicated_conv(x.flatten(1, 2), kernels.flatten(2), tables).view(x.shape)
            one, three, five = (_convolve(x, k, d) for k, d in zip(kernels.unsqueeze(2), self.dilations, strict=True))
            return one + three + five

    @torch.no_grad()
    def fuse(self) -> None:
        """Merges the kernels into one of 11 x 11, until ``train()`` or weights that are loaded."""
        if self.training:
            raise RuntimeError("fuse: the model is in training mode, call eval() first")
        reach = self.dilations[-1]
        fused = self.weight.new_zeros(self.weight.shape[1], 1, 2 * reach + 1, 2 * reach + 1)
        for alpha, kernel, d in zip(self.alpha, self.weight, self.dilations, strict=True):
            taps = slice(reach - d, reach + d + 1, d)
            fused[:, 0, taps, taps] += alpha * kernel
        self.fused = fused

    def train(self, mode: bool = True) -> StateFusion:
        """Training mode takes the merged kernel apart."""
        if mode:
            self.fused = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.fused = None
        super()._load_from_state_dict(*args)


def _convolve(x: Tensor, kernel: Tensor, dilation: int) -> Tensor:
    """Depthwise on (b, h, w, c); outside of the map its border repeats."""
    reach = dilation * (kernel.shape[-1] // 2)
    x = F.pad(channels_first(x), (reach,) * 4, mode="replicate")
    return channels_last(F.conv2d(x, kernel.to(x.dtype), dilation=dilation, groups=x.shape[1]))


class StructureAwareSSM(Opaque, nn.Module):
    """Linear, depthwise 3 x 3 convolution, SiLU, scan, state fusion, C and D, norm, gate, linear
    (Spatial-Mamba, arXiv:2410.15091).

    Args:
        dim: width of the map.
        scan: the one order to scan, window and backend.
        ssm_ratio: inner width over ``dim``.

    Raises:
        ValueError: the pattern has several orders; in ``forward``, another shape.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)

    def __init__(
        self,
        dim: int,
        scan: Scan = _FORWARD,
        ssm_ratio: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = inner_width(dim, ssm_ratio, "ssm_ratio")
        self.dim, self.scan = dim, scan.of_one_order()
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, device=device, dtype=dtype)
        self.conv2d = DepthwiseConv2d(d_inner, silu=True, device=device, dtype=dtype)
        self.ssm = StateScan(d_inner, 1, -(-dim // 16), 1, scan.backend, device, dtype)
        self.fusion = StateFusion(d_inner, device, dtype)
        self.out_norm = LayerNorm(d_inner, autocast_out=True, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        check_map(x, input_width(self.in_proj, self.dim))
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv2d(x)
        states, C = self._scanned(x)
        dtype, backend = self.out_norm.weight.dtype, self.ssm.backend  # float32 under autocast, as the states
        y = self.out_norm(state_output(self.fusion(states), C, x, self.ssm.D, dtype, backend=backend))
        return self.out_proj(silu_gate(y, z, backend=backend))

    def _scanned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States (b, h, w, c), and C (b, h, w, 1)."""
        found: list[Tensor] = []

        def scan(*args: Any) -> Tensor:
            states, C = self.ssm(*args)
            found.append(C)
            return states

        states = scan_grid(scan, x, self.scan)
        height, width = x.shape[1:3]
        return states, found[0][:, : height * width].unflatten(1, (height, width))
