"""The residual block of VMamba and MSVMamba: a mixer, then, where there is one, a feed-forward layer."""

from functools import partial

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.layers.constructor import Constructor
from backbones.layers.line import Line
from backbones.layers.norm import LayerNorm, residual_norm
from backbones.layers.ss2d import SS2D

branch_norm = partial(LayerNorm, autocast_out=True)


class VSSBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), on channels-last maps (b, h, w, dim).

    The defaults are the block of VMamba's first generation. That of the second has
    ``mixer=partial(SS2D, d_state=1, gated=False, conv_bias=False)`` and timm's ``Mlp`` as ``mlp``.

    Args:
        dim: width of the map.
        mixer: constructor called as ``mixer(dim, device=, dtype=)``.
        mlp: constructor called as ``mlp(dim, int(mlp_ratio * dim), device=, dtype=)``, or None for a block
            without one.
        mlp_ratio: inner width of the feed-forward layer over ``dim``.
        mlp_post_norm: x + norm(mlp(x)) instead.
        norm_layer: constructor of the norms.
        drop_path: rate of stochastic depth, on both branches.
    """

    def __init__(
        self,
        dim: int,
        mixer: Constructor = SS2D,
        mlp: Constructor | None = None,
        mlp_ratio: float = 4.0,
        mlp_post_norm: bool = False,
        norm_layer: Constructor = branch_norm,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.mixer = mixer(dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp_post_norm = mlp_post_norm
        self.norm2 = None if mlp is None else norm_layer(dim, device=device, dtype=dtype)
        self.mlp = None if mlp is None else mlp(dim, int(mlp_ratio * dim), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x, y = self.chained(x, None)
        return x + y

    def chained(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block of x + pending, its last sum left to what comes behind: see `backbones.base.chain.run_chain`."""
        x, y = residual_norm(x, pending, self.norm1)
        y = self.drop_path(self.mixer(y))
        if self.mlp is None or self.norm2 is None:
            return x, y
        if self.mlp_post_norm:
            x = x + y
            return x, self.drop_path(self.norm2(self.mlp(x)))
        x, y = residual_norm(x, y, self.norm2)
        return x, self.drop_path(self.mlp(y))

    def line(self, x: Tensor, pending: Tensor | None) -> Line | None:
        """What `chained` does as steps behind one another; None where it cannot be."""
        backend = getattr(self.norm1, "backend", None)
        line = None if self.mlp_post_norm else Line.of(x, pending, backend)
        if line is None:
            return None
        line.norm(self.norm1)
        line.layer(self.mixer, x)
        line.drop_path(self.drop_path)
        if self.mlp is not None and self.norm2 is not None:
            line.norm(self.norm2)
            line.layer(self.mlp, x)
            line.drop_path(self.drop_path)
        return line
