"""Operators: selective scan, state-space duality, the depthwise convolution in front of them, gates and norms.

>>> import torch
>>> from backbones.ops import selective_scan
>>> b, l, k, c, n = 2, 6, 2, 4, 3
>>> u, delta = torch.randn(b, l, c), torch.rand(b, l, k, c)
>>> A, B, C = -torch.rand(k, c, n), torch.randn(b, l, k, n), torch.randn(b, l, k, n)
>>> there_and_back = torch.stack([torch.arange(l), torch.arange(l).flip(0)])
>>> selective_scan(u, delta, A, B, C, orders=there_and_back).shape
torch.Size([2, 6, 4])
"""

from backbones.ops import dispatch
from backbones.ops.depthwise.operator import depthwise_conv
from backbones.ops.fused.gate.operator import silu_gate
from backbones.ops.fused.layer_norm.operator import layer_norm
from backbones.ops.fused.rms_norm.operator import rms_norm
from backbones.ops.scan.api import selective_scan
from backbones.ops.scan.visits import Visits
from backbones.ops.ssd.api import ssd, ssd_noncausal

__all__ = [
    "Visits",
    "backends",
    "depthwise_conv",
    "layer_norm",
    "rms_norm",
    "selective_scan",
    "silu_gate",
    "ssd",
    "ssd_noncausal",
]


def backends() -> dict[str, str | None]:
    """Names of all backends, each with the reason why it does not run here, or None if it does."""
    return {name: dispatch.unavailable_reason(name) for name in dispatch.BACKENDS}
