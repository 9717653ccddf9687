"""The mixer of VSSD: state-space duality without a direction, for all cells share one state."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.norm import LayerNorm
from backbones.layers.shapes import check_map, inner_width, input_width
from backbones.layers.ss2d import DepthwiseConv2d
from backbones.layers.tracing import Opaque
from backbones.ops import ssd_noncausal


class NonCausalSSD(Opaque, nn.Module):
    """Linear, depthwise 3 x 3 convolution and SiLU of x, B and C, one state of all tokens, norm, gate, linear
    (VSSD, arXiv:2407.18559).

    The gate is linear. It stands behind the norm, as in the published weights.

    Args:
        dim: width of the map.
        num_heads: heads, each with a step size, a decay rate and a skip weight; they share B and C. None is one for 64
            inner channels, as in the published models but the smallest, whose are 48 wide.
        d_state: states of each channel.
        ssm_ratio: inner width over ``dim``.

    Raises:
        ValueError: ``num_heads`` does not divide the inner width; in ``forward``, another shape.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)
    no_decay = ("A_log",)

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        d_state: int = 64,
        ssm_ratio: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        d_inner = inner_width(dim, ssm_ratio, "ssm_ratio")
        num_heads = max(d_inner // 64, 1) if num_heads is None else num_heads
        if num_heads < 1 or d_inner % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a number that divides the inner width {d_inner}")
        self.dim, self.num_heads, self.d_inner, self.d_state = dim, num_heads, d_inner, d_state
        mixed = d_inner + 2 * d_state
        self.in_proj = nn.Linear(dim, d_inner + mixed + num_heads, bias=False, **dd)
        self.conv2d = DepthwiseConv2d(mixed, silu=True, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.ones(num_heads, **dd))
        self.out_norm = LayerNorm(d_inner, autocast_out=True, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's initialisation: A uniform in -16..-1, D = 1, step sizes log-uniform in 1e-3..0.1."""
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        self.D.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        check_map(x, input_width(self.in_proj, self.dim))
        height, width = x.shape[1:3]
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * self.d_state, self.num_heads], dim=-1)
        # A sum over all tokens overflows float16 on large maps: float32 up to the norm.
        states = torch.promote_types(x.dtype, torch.float32)
        tokens = self.conv2d(xBC).flatten(1, 2).to(states)
        u, B, C = tokens.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        y = ssd_noncausal(
            u.unflatten(-1, (self.num_heads, -1)),
            dt.flatten(1, 2),
            -torch.exp(self.A_log.to(states)),
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            dt_bias=self.dt_bias,
        )
        y = self._normed(y.flatten(2).unflatten(1, (height, width)))
        return self.out_proj(y * z)

    def _normed(self, y: Tensor) -> Tensor:
        norm = self.out_norm
        if y.dtype == norm.weight.dtype:
            return norm(y)
        # A model in half precision: only what is normalised fits into it.
        weight, bias = (p.to(y.dtype) for p in (norm.weight, norm.bias))
        return F.layer_norm(y, norm.normalized_shape, weight, bias, norm.eps).to(norm.weight.dtype)
