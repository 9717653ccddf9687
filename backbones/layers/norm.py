"""Norms that are fast on the narrow rows of channels-last maps and tokens."""

import torch
from torch import Tensor, nn

from backbones.layers.autocast import autocast_dtype
from backbones.layers.scan import OnBackend
from backbones.layers.shapes import check_width
from backbones.ops import layer_norm, rms_norm
from backbones.ops.dispatch import choose_for
from backbones.ops.fused.layer_norm import cpu
from backbones.ops.fused.layer_norm.operator import residual_normalise
from backbones.ops.tracing import is_hooked, is_replaced, runs_eagerly


class LayerNorm(OnBackend, nn.LayerNorm):
    """PyTorch's LayerNorm over the last axis, in one kernel that passes through memory once.

    Args:
        dim: length of the last axis.
        eps: added to the variance.
        autocast_out: under autocast, return autocast's dtype instead of writing float32 that the next layer reads
            once and rounds. For norms in front of a linear layer and within residual branches.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        autocast_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.autocast_out = autocast_out

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        check_width(x, self.normalized_shape[0])
        dtype = autocast_dtype(x) if self.autocast_out else None
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype, backend=self.backend)


class RMSNorm(OnBackend, nn.RMSNorm):
    """PyTorch's RMSNorm over the last axis, in one kernel that passes through memory once.

    Args:
        dim: length of the last axis.
        eps: added to the mean of squares.
        autocast_out: see :class:`LayerNorm`.
    """

    eps: float

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        autocast_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.autocast_out = autocast_out

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        check_width(x, self.weight.shape[0])  # pruners know no RMSNorm, and leave its normalized_shape
        dtype = autocast_dtype(x) if self.autocast_out else None
        return rms_norm(x, self.weight, self.eps, dtype=dtype, backend=self.backend)


def residual_norm(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + branch, or x where that is None, and ``norm`` of it; by a kernel in one pass each way.

    Args:
        x: (..., dim).
        branch: as x, or None.
        norm: any module; one pass where it is one of this module's, as it is written.
    """
    known = type(norm) in (LayerNorm, RMSNorm) and isinstance(x, Tensor)  # and not a symbol of torch.fx
    if known and runs_eagerly(x) and not is_hooked(norm) and not is_replaced(norm):
        assert isinstance(norm, LayerNorm | RMSNorm)
        centred = isinstance(norm, LayerNorm)
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        weight = norm.weight
        fits = branch is None or (x.shape == branch.shape and torch.promote_types(x.dtype, branch.dtype) == x.dtype)
        chosen = choose_for("layer_norm" if centred else "rms_norm", norm.backend, x, branch, weight, bias)
        if fits and chosen in (("triton", False), ("cpu", False)):
            check_width(x, norm.normalized_shape[0])
            dtype = autocast_dtype(x) if norm.autocast_out else None
            if dtype is None and centred:
                dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
            elif dtype is None:
                dtype = torch.promote_types(x.dtype, weight.dtype)
            if x.is_cuda:
                return residual_normalise(x, branch, weight, bias, norm.eps, dtype, centred)
            if branch is not None and cpu.reads(x, dtype, branch, weight, bias):
                return cpu.normalise(x, branch, weight, bias, norm.eps, centred, dtype)
    x = x if branch is None else x + branch
    return x, norm(x)
