"""Stems and downsampling: where the resolution of a channels-last map changes."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import ConvNormAct
from torch import Tensor, nn

from backbones.layers.norm import LayerNorm
from backbones.layers.ss2d import DepthwiseConv2d
from backbones.layers.tracing import Opaque


def channels_last(x: Tensor) -> Tensor:
    """(b, c, h, w) to (b, h, w, c)."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """(b, h, w, c) to (b, c, h, w)."""
    return x.permute(0, 3, 1, 2)


class PatchStem(nn.Module):
    """One 4 x 4 convolution of stride 4 and a norm; a remainder of the image at the bottom or right is dropped."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, 4, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) to (b, h // 4, w // 4, dim)."""
        return self.norm(channels_last(self.proj(x)))


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with a norm, and a GELU between them."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, device=device, dtype=dtype)
        self.norm1 = LayerNorm(dim // 2, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, device=device, dtype=dtype)
        self.norm2 = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) to (b, ceil(h / 4), ceil(w / 4), dim)."""
        x = F.gelu(self.norm1(channels_last(self.conv1(x))))
        return self.norm2(channels_last(self.conv2(channels_first(x))))


class PatchMerging(Opaque, nn.Module):
    """Four neighbours side by side, a norm, a linear layer (Swin, section 3.1); odd sides are padded with zeros."""

    prunable: ClassVar[tuple[str, ...]] = ("reduction",)

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, autocast_out=True, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, ceil(h / 2), ceil(w / 2), out_dim)."""
        rows, columns = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
        right, bottom = 2 * columns - x.shape[2], 2 * rows - x.shape[1]
        traced = torch.compiler.is_compiling() or not isinstance(right, int) or not isinstance(bottom, int)
        if traced or right > 0 or bottom > 0:  # `pad` copies where it adds nothing, too
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = rearrange(x, "b (h row) (w column) c -> b h w (column row c)", row=2, column=2)
        return self.reduction(self.norm(x))


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution of stride 2 and a norm."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, 2, 1, device=device, dtype=dtype)
        self.norm = LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, ceil(h / 2), ceil(w / 2), out_dim)."""
        return self.norm(channels_last(self.proj(channels_first(x))))


class ResidualConvStem(nn.Module):
    """Three steps of convolutions, each with a batch norm, the middle one residual."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv = partial(ConvNormAct, device=device, dtype=dtype)
        self.conv1 = conv(in_chans, dim // 2, 3, stride=2)
        self.conv2 = nn.Sequential(conv(dim // 2, dim // 2, 3), conv(dim // 2, dim // 2, 3, apply_act=False))
        self.conv3 = nn.Sequential(conv(dim // 2, 4 * dim, 3, stride=2), conv(4 * dim, dim, apply_act=False))

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) to (b, ceil(h / 4), ceil(w / 4), dim)."""
        x = self.conv1(x)
        # With channels last, for PyTorch's gradient of a batch norm on a CPU is wrong at batch 1 where the map has them
        # first and the gradient from behind has them last.
        x = (x + self.conv2(x)).contiguous(memory_format=torch.channels_last)
        return channels_last(self.conv3(x)).contiguous()


class WideDownsample(nn.Module):
    """To four times the output's width, depthwise 3 x 3 of stride 2, and back; one batch norm, at the end."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, 4 * out_dim, 1, device=device, dtype=dtype)
        self.conv = DepthwiseConv2d(4 * out_dim, stride=2, device=device, dtype=dtype)
        self.reduce = ConvNormAct(4 * out_dim, out_dim, bias=True, apply_act=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, ceil(h / 2), ceil(w / 2), out_dim)."""
        x = F.relu(channels_last(self.expand(channels_first(x))))
        return channels_last(self.reduce(channels_first(F.relu(self.conv(x)))))
