"""A pyramid around a plain backbone, as PlainMamba's detectors use it: ViT-Adapter, arXiv:2205.08534, section 3.

Convolutions on the image give maps of strides 4 to 32. Those of strides 8 to 32 exchange features with the backbone's
tokens four times, by deformable attention: into the tokens before a quarter of the blocks, and out of them behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from backbones.base.contract import run_block
from backbones.mm.errors import UserError
from backbones.mm.models.dense import PlainDenseBackbone
from backbones.models.plainmamba import PlainMamba

Shape = tuple[int, int]


class DeformableAttention(nn.Module):
    """Every query reads a few points of each map, at learned offsets from its own place (arXiv:2010.04159, equation 3).

    Args:
        dim: width of queries and maps.
        num_heads: heads, which divide ``dim``.
        num_levels: maps.
        num_points: points of each map for each head.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of the width {dim}")
        self.split = (num_heads, num_levels, num_points)
        self.sampling_offsets = nn.Linear(dim, math.prod(self.split) * 2)
        self.attention_weights = nn.Linear(dim, math.prod(self.split))
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Points on a star around the query, one ray for each head, all of the same weight."""
        heads, levels, points = self.split
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        rays = torch.stack([angle.cos(), angle.sin()], -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        star = rays[:, None, None] * torch.arange(1, points + 1)[:, None]
        self.sampling_offsets.bias.copy_(star.expand(-1, levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, places: Tensor, values: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """query (b, q, dim) at ``places`` (q, 2), x and y in 0..1, and maps of ``shapes``, one after the other, in
        values (b, l, dim), to (b, q, dim).
        """
        heads, levels, points = self.split
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2)).transpose(1, 2).flatten(0, 1)
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
        weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (b heads, 1, q, levels points)
        maps = self.value_proj(values).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        sampled = []
        for level, (height, width) in enumerate(shapes):
            size = offsets.new_tensor([width, height])
            where = 2 * (places[:, None] + offsets[:, :, level] / size) - 1
            begin = sum(h * w for h, w in shapes[:level])
            image = maps[:, :, begin : begin + height * width].unflatten(2, (height, width))
            sampled.append(F.grid_sample(image, where.to(image.dtype), align_corners=False))
        y = (torch.cat(sampled, -1) * weights).sum(-1)  # (b heads, dim / heads, q)
        return self.output_proj(y.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2))


class MapsConv(nn.Module):
    """One depthwise 3 x 3 convolution of several maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Maps of ``shapes``, one after the other, in x (b, l, dim), to (b, l, dim)."""
        maps = (x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(_split(x, shapes), shapes, strict=True))
        return torch.cat([self.dwconv(x).flatten(2).transpose(1, 2) for x in maps], dim=1)


class MapsFFN(nn.Module):
    """Linear, depthwise 3 x 3 convolution, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = MapsConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """(b, l, dim) to (b, l, dim)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), shapes)))


class Injector(nn.Module):
    """Tokens + gamma attention(tokens to maps)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, num_heads, num_levels=3)

    def forward(self, x: Tensor, places: Tensor, maps: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Tokens (b, l, dim) and maps (b, m, dim) to tokens."""
        return x + self.gamma * self.attn(self.query_norm(x), places, self.feat_norm(maps), shapes)


class Extractor(nn.Module):
    """Maps + attention(maps to tokens), then maps + ffn(maps)."""

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, num_heads, num_levels=1)
        self.ffn = MapsFFN(dim, int(dim * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop_path = DropPath(drop_path)

    def forward(self, maps: Tensor, places: Tensor, shapes: Sequence[Shape], x: Tensor, grid: Shape) -> Tensor:
        """Maps (b, m, dim) and tokens (b, l, dim) to maps."""
        maps = maps + self.attn(self.query_norm(maps), places, self.feat_norm(x), [grid])
        return maps + self.drop_path(self.ffn(self.ffn_norm(maps), shapes))


class Interaction(nn.Module):
    """The modules around a quarter of the blocks."""

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float, drop_path: float, extra: int) -> None:
        super().__init__()
        self.injector = Injector(dim, num_heads)
        self.extractor = Extractor(dim, num_heads, ffn_ratio, drop_path)
        self.extra_extractors = nn.ModuleList(Extractor(dim, num_heads, ffn_ratio, drop_path) for _ in range(extra))


class SpatialPrior(nn.Module):
    """Convolutions on the image: maps of strides 4, 8, 16 and 32, all of width ``dim``."""

    def __init__(self, in_chans: int, width: int, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(in_chans, width, 2), *_conv(width, width), *_conv(width, width), nn.MaxPool2d(3, 2, 1)
        )
        self.conv2 = nn.Sequential(*_conv(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*_conv(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*_conv(4 * width, 4 * width, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(factor * width, dim, 1) for factor in (1, 2, 4, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_chans, h, w) to four maps (b, dim, ., .)."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)]


@MODELS.register_module()
class PlainMambaAdapter(PlainDenseBackbone):
    """PlainMamba with maps of strides 4, 8, 16 and 32 for detectors, all as wide as its tokens.

    Takes images of any size; the original takes multiples of 32 pixels.

    Args:
        arch: registered name, such as "plainmamba_l1".
        out_indices: the last block of each of the four interactions; (8, 17, 26, 35) in L3.
        num_heads: heads of the deformable attention, 6 in L1 and L2 and 8 in L3.
        conv_width: channels of the convolutions at stride 4.
        ffn_ratio: inner width of the adapter's feed-forward layers over that of the tokens.
        drop_path_rate: stochastic depth of the last block, and of all feed-forward layers of the adapter.
        frozen_stages: as in :class:`DenseBackbone`, and all others. The adapter is never frozen.

    Raises:
        UserError: ``out_indices`` are not four blocks in their order.
    """

    family = PlainMamba
    own_parts: ClassVar[tuple[str, ...]] = ("spm.", "level_embed", "interactions.", "up.", "ad_norm")

    def __init__(
        self,
        arch: str,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        num_heads: int = 6,
        conv_width: int = 64,
        ffn_ratio: float = 0.25,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        model_args: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            arch, out_indices, drop_path_rate, frozen_stages, norm_eval, with_cp, out_norm=False,
            model_args=model_args, init_cfg=init_cfg,
        )  # fmt: skip
        if len(self.out_indices) != 4 or list(self.out_indices) != sorted(self.out_indices):
            raise UserError(f"out_indices: got {out_indices}, expected four blocks in their order")
        dim = self.model.embed_dim
        self.spm = SpatialPrior(self.model.in_chans, conv_width, dim)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.interactions = nn.ModuleList(
            Interaction(dim, num_heads, ffn_ratio, drop_path_rate, extra) for extra in (0, 0, 0, 2)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.ad_norm1, self.ad_norm2, self.ad_norm3, self.ad_norm4 = (nn.SyncBatchNorm(dim) for _ in range(4))
        self._init_adapter()
        self.train()

    def _init_adapter(self) -> None:
        for part in (self.spm, self.interactions, self.up):
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                    nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Linear):
                    trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        for module in self.interactions.modules():
            if isinstance(module, DeformableAttention):
                module.init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (b, in_chans, h, w) to maps (b, dim, ., .) of strides 4, 8, 16 and 32."""
        c1, *pyramid = self.spm(x)
        shapes = [(level.shape[2], level.shape[3]) for level in pyramid]
        levels = [level.flatten(2).transpose(1, 2) for level in pyramid]
        maps = torch.cat([level + embed for level, embed in zip(levels, self.level_embed, strict=True)], dim=1)
        tokens, grid, _ = self.model._embed(x)
        places = _centres([grid], tokens)
        map_places = _centres(shapes, tokens)
        begin = 0
        for last, module in zip(self.out_indices, self.interactions, strict=True):
            interaction = cast(Interaction, module)
            tokens = interaction.injector(tokens, places, maps, shapes)
            for block in self.model.blocks[begin : last + 1]:
                tokens = run_block(block, tokens, grid, checkpointed=self.model.grad_checkpointing)
            begin = last + 1
            for extractor in (interaction.extractor, *interaction.extra_extractors):
                maps = extractor(maps, map_places, shapes, tokens, grid)
        c2, c3, c4 = (y.transpose(1, 2).unflatten(2, s) for y, s in zip(_split(maps, shapes), shapes, strict=True))
        c1 = c1 + self.up(c2)[:, :, : c1.shape[2], : c1.shape[3]]
        image = tokens.transpose(1, 2).unflatten(2, grid)
        norms = (self.ad_norm1, self.ad_norm2, self.ad_norm3, self.ad_norm4)
        return tuple(
            norm(level + F.interpolate(image, size=level.shape[2:], mode="bilinear", align_corners=False))
            for norm, level in zip(norms, (c1, c2, c3, c4), strict=True)
        )


def _conv(in_chans: int, out_chans: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
    return [conv, nn.SyncBatchNorm(out_chans), nn.ReLU()]


def _split(x: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    return x.split([height * width for height, width in shapes], dim=1)


def _centres(shapes: Sequence[Shape], like: Tensor) -> Tensor:
    """Centres of all cells, (l, 2): x and y in 0..1."""
    points = []
    for height, width in shapes:
        y, x = ((torch.arange(side, device=like.device) + 0.5) / side for side in (height, width))
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(points).to(like.dtype)
