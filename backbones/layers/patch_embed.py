"""Image to patch tokens, possibly overlapping."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.linear import patch_products
from backbones.layers.tracing import Opaque


class PatchEmbed(Opaque, nn.Module):
    """One convolution whose outputs, in raster order, are the tokens; drops a remainder of the image or pads it.

    Args:
        patch_size: side of a patch, in pixels.
        stride: distance between patches, in pixels; less than ``patch_size`` makes them overlap.
        in_chans: channels of the image.
        embed_dim: width of a token.
        pad: append zeros at the bottom and right so that every pixel is in a patch.
    """

    def __init__(
        self,
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.pad = patch_size, stride, pad
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, device=device, dtype=dtype)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of ``height`` x ``width`` pixels gives."""
        extra = self.stride - 1 if self.pad else 0
        rows = (max(height - self.patch_size, -extra) + extra) // self.stride + 1
        columns = (max(width - self.patch_size, -extra) + extra) // self.stride + 1
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, height, width) to (b, rows * columns, embed_dim)."""
        height, width = x.shape[-2:]
        if self.pad:
            rows, columns = self.grid_size(height, width)
            bottom = (rows - 1) * self.stride + self.patch_size - height
            right = (columns - 1) * self.stride + self.patch_size - width
            known = isinstance(right, int) and isinstance(bottom, int)  # not while sizes are traced
            if not known or right > 0 or bottom > 0:  # `pad` copies where it adds nothing, too
                x = F.pad(x, (0, max(right, 0), 0, max(bottom, 0)))
        tokens = patch_products(self.proj, x)
        return self.proj(x).flatten(2).transpose(1, 2) if tokens is None else tokens


class StemPatchEmbed(Opaque, nn.Module):
    """A 7 x 7 convolution of stride 2, 3 x 3 convolutions, each with batch norm and ReLU, and patches of the result.

    Args:
        patch_size: side of a patch in pixels of the image, even.
        stride: distance between patches in pixels of the image, even.
        in_chans: channels of the image.
        embed_dim: width of a token.
        pad: append zeros at the bottom and right of the stem's map so that all of it is in a patch.
        num_convs: 3 x 3 convolutions.
        width: channels of the stem.
    """

    def __init__(
        self,
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        pad: bool = True,
        num_convs: int = 1,
        width: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size % 2 or stride % 2:
            raise ValueError(f"patch_size, stride: got {patch_size}, {stride}, expected even numbers of pixels")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size, self.stride, self.pad = patch_size, stride, pad
        layers: list[nn.Module] = []
        for i in range(1 + num_convs):
            size, chans = (3, width) if i else (7, in_chans)
            conv = nn.Conv2d(chans, width, size, 1 if i else 2, size // 2, bias=False, **dd)
            layers += [conv, nn.BatchNorm2d(width, **dd), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)
        self.patches = PatchEmbed(patch_size // 2, stride // 2, width, embed_dim, pad, **dd)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of ``height`` x ``width`` pixels gives."""
        return self.patches.grid_size((height + 1) // 2, (width + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, height, width) to (b, rows * columns, embed_dim)."""
        # On a CPU, so that the patches of the stem's map are one product.
        x = x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
        return self.patches(self.stem(x))
