"""Pre-training by masked images, for any model of the library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.base import Backbone, PlainBackbone
from backbones.mm.errors import UserError
from backbones.mm.models.classifier import create_network, load_network
from backbones.mm.models.toki import Toki

_FILLS = ("token", "toki")
_DECODER = ("dim", "depth", "num_heads")


class ReplacedTokens(nn.Module):
    """What SimMIM trains besides the network; weight files of networks leave it out.

    Args:
        stem_dim: width of the stem's tokens.
        dim: width of the last map.
        stride: pixels to a cell of the last map, either way.
        in_chans: channels of the image.
        fill: see :class:`MaskedImageModelling`.
    """

    def __init__(self, stem_dim: int, dim: int, stride: int, in_chans: int, fill: str) -> None:
        super().__init__()
        self.stride = stride
        self.mask_token = nn.Parameter(torch.empty(stem_dim))
        trunc_normal_(self.mask_token, std=0.02)
        self.toki = Toki(dim) if fill == "toki" else None
        self.decoder = nn.Conv2d(dim, stride**2 * in_chans, 1)

    def rebuild(self, network: Any, inputs: Tensor, mask: Tensor) -> Tensor:
        """Pixels, from the network's last map, whose stem does not see the cells of ``mask``."""
        features = network.forward_intermediates(
            inputs, indices=1, norm=True, intermediates_only=True, replace=lambda tokens: self.replace(tokens, mask)
        )[-1]
        _check_grid(tuple(features.shape[2:]), inputs, mask)
        return self.decode(features, mask)

    def replace(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (b, rows, columns, c) of the stem, those under the cells of ``mask`` replaced."""
        # Their rows and columns are whole multiples of the cells'.
        mask = F.interpolate(mask[:, None].float(), size=tokens.shape[1:3], mode="nearest")[:, 0, ..., None] > 0
        return torch.where(mask, self.mask_token.to(tokens.dtype), tokens)

    def decode(self, features: Tensor, mask: Tensor) -> Tensor:
        """The last map (b, c, rows, columns) to pixels."""
        if self.toki is not None:
            tokens = self.toki(features.flatten(2).transpose(1, 2), ~mask.flatten(1))
            features = tokens.transpose(1, 2).unflatten(2, mask.shape[1:])
        return F.pixel_shuffle(self.decoder(features), self.stride)


class VisibleTokens(nn.Module):
    """What a masked autoencoder trains besides the network: a decoder of transformer blocks over the whole grid.

    Args:
        network_dim: width of the network's tokens.
        stride: pixels to a patch, either way.
        in_chans: channels of the image.
        fill: see :class:`MaskedImageModelling`.
        dim: width of the decoder; None is the network's.
        depth: blocks of the decoder.
        num_heads: of its attention; None is one for 32 channels.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        network_dim: int,
        stride: int,
        in_chans: int,
        fill: str,
        dim: int | None = None,
        depth: int = 2,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        dim = network_dim if dim is None else dim
        num_heads = max(dim // 32, 1) if num_heads is None else num_heads
        if dim < 4 or dim % 4:
            raise UserError(f"decoder: got dim={dim}, expected a multiple of 4")
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"decoder: got num_heads={num_heads}, expected a divisor of its width, {dim}")
        if depth < 1:
            raise UserError(f"decoder: got depth={depth}, expected at least 1")
        self.stride, self.dim = stride, dim
        self.embed = nn.Linear(network_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim)) if fill == "token" else None
        if self.mask_token is not None:
            trunc_normal_(self.mask_token, std=0.02)
        self.toki = Toki(dim) if fill == "toki" else None
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.decoder = nn.Linear(dim, stride**2 * in_chans)

    def rebuild(self, network: Any, inputs: Tensor, mask: Tensor) -> Tensor:
        """Pixels, from the visible cells alone: the network never gets the tokens of those of ``mask``."""
        _check_grid(network.patch_embed.grid_size(*inputs.shape[2:]), inputs, mask)
        cells = (~mask).flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, : int((~mask[0]).sum())]
        # Convolutions of a stem reach over cells.
        pixels = F.interpolate(mask[:, None].float(), scale_factor=self.stride, mode="nearest")
        tokens = self.embed(network.forward_visible(inputs * (1 - pixels).to(inputs.dtype), cells))
        return F.pixel_shuffle(self.decode(tokens, cells, mask), self.stride)

    def decode(self, tokens: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        """Tokens (b, m, dim) of ``cells`` to the pixels of every cell, (b, stride**2 * in_chans, rows, columns)."""
        place = cells.unsqueeze(-1).expand_as(tokens)
        hidden = mask.flatten(1).unsqueeze(-1)
        whole = tokens.new_zeros(len(tokens), hidden.shape[1], self.dim).scatter(1, place, tokens)
        if self.toki is not None:
            whole = self.toki(whole, ~hidden.squeeze(-1))
        else:
            assert self.mask_token is not None
            whole = torch.where(hidden, self.mask_token.to(whole.dtype), whole)
        positions = build_sincos2d_pos_embed(list(mask.shape[1:]), self.dim, device=whole.device, dtype=whole.dtype)
        x = self.norm(self.blocks(whole + positions))
        return self.decoder(x).transpose(1, 2).unflatten(2, mask.shape[1:])


def _check_grid(grid: tuple[int, ...], inputs: Tensor, mask: Tensor) -> None:
    if grid != tuple(mask.shape[1:]):
        raise ValueError(
            f"network: it makes {grid[0]} x {grid[1]} cells of {inputs.shape[2]} x {inputs.shape[3]} pixels, expected "
            f"{mask.shape[1]} x {mask.shape[2]}, one for each patch"
        )


@MODELS.register_module()
class MaskedImageModelling(BaseModel):
    """A network that learns to paint the masked part of an image (SimMIM, arXiv:2111.09886).

    Cells of the coarsest grid are masked at random; the stem's tokens under them are replaced by a learned vector, all
    scans go on as ever, and a 1 x 1 convolution of the last map predicts the pixels of each cell. The loss is the mean
    absolute error over the masked cells.

    With ``visible_only`` it is a masked autoencoder (MAE, arXiv:2111.06377): a plain network gets the visible patches
    alone, and a small transformer, which is thrown away afterwards, paints the others.

    Its checkpoints load into a classifier with ``init_cfg=dict(type="Pretrained", checkpoint=..., headless=True)``, and
    into a dense backbone without ``headless``.

    Args:
        network: arguments of ``timm.create_model``, among them ``name``, of a model of this library. It loses its head.
        ratio: share of the cells that are masked, rounded to whole cells.
        fill: "token", or "toki": masked cells of the last map are filled in from the visible ones before and behind
            them, see :func:`backbones.mm.models.toki.toki`, as in MambaMIM (arXiv:2408.08070).
        visible_only: the network gets the visible patches alone. It has to be a plain one (Vim, LBVim, LocalVim,
            PlainMamba, Adventurer), whose time then falls with ``ratio``. Orders of a grid skip what is masked.
        decoder: with ``visible_only``, ``dim``, ``depth`` and ``num_heads`` of the transformer, see
            :class:`VisibleTokens`.
        norm_cells: normalise the pixels of each cell to mean 0 and variance 1 before they are compared (MAE,
            arXiv:2111.06377, as MambaMIM does). What is rebuilt then lacks brightness and contrast.
        data_preprocessor: see :class:`ImagePreprocessor`; labels are not used.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` loads weights of the network to start from.

    Raises:
        UserError: the network is not of this library, or an argument is out of range.
    """

    def __init__(
        self,
        network: dict[str, Any],
        ratio: float = 0.6,
        fill: str = "token",
        visible_only: bool = False,
        decoder: dict[str, Any] | None = None,
        norm_cells: bool = False,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__({"type": "ImagePreprocessor", **(data_preprocessor or {})}, init_cfg)
        if not 0 < ratio < 1:
            raise UserError(f"ratio: got {ratio}, expected a share of masked cells within 0 and 1")
        if fill not in _FILLS:
            raise UserError(f"fill: got {fill!r}, expected one of {_FILLS}")
        built = create_network(**network)
        if not isinstance(built, Backbone):
            raise UserError(
                f"network: {network['name']} is not of this library, whose models know a place for the mask"
            )
        if visible_only and not isinstance(built, PlainBackbone):
            raise UserError(
                f"visible_only: got True for {network['name']}, whose stages need whole maps, expected a plain network"
            )
        if visible_only and getattr(built, "token_reduction", None) is not None:
            raise UserError("visible_only: got True for a network with token_reduction, expected one of the two")
        if decoder and not visible_only:
            raise UserError("decoder: got one without visible_only=True, which it is for")
        if unknown := set(decoder or {}) - set(_DECODER):
            raise UserError(f"decoder: got {sorted(unknown)[0]!r}, expected some of {', '.join(_DECODER)}")
        built.reset_classifier(0, "")  # type: ignore[operator]
        self.network, self.name = built, network["name"]
        self.ratio, self.norm_cells = ratio, norm_cells
        first, last = built.feature_info[0], built.feature_info[-1]
        dim, stride = last["num_chs"], last["reduction"]
        self.pretraining: ReplacedTokens | VisibleTokens
        if visible_only:
            self.pretraining = VisibleTokens(dim, stride, built.in_chans, fill, **(decoder or {}))
        else:
            self.pretraining = ReplacedTokens(first["num_chs"], dim, stride, built.in_chans, fill)

    def init_weights(self) -> None:
        """Loads the weights of ``init_cfg`` into the network; without it, keeps those that it has.

        Raises:
            CheckpointError: the weights do not fit the network; all that differ are named.
            UserError: there is no such file.
        """
        self._is_init = True
        if self.init_cfg is not None:
            load_network(self.network, {**self.init_cfg, "headless": True}, self.name)

    def draw_mask(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Masked cells (b, rows, columns) for images (b, in_chans, height, width), equally many in each.

        Raises:
            ValueError: the sides of the images are no multiples of a cell.
        """
        (batch, _, height, width), stride = inputs.shape, self.pretraining.stride
        if height % stride or width % stride:
            raise ValueError(f"inputs: got {height} x {width} pixels, expected multiples of a cell's side, {stride}")
        rows, columns = height // stride, width // stride
        noise = torch.rand(batch, rows * columns, generator=generator, device="cpu" if generator else inputs.device)
        count = min(max(round(self.ratio * rows * columns), 1), rows * columns)
        chosen = noise.argsort(dim=1)[:, :count].to(inputs.device)
        mask = torch.zeros(batch, rows * columns, dtype=torch.bool, device=inputs.device).scatter(1, chosen, True)
        return mask.unflatten(1, (rows, columns))

    def rebuild(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """The network's reconstruction, (b, in_chans, height, width), of images whose masked cells it does not see."""
        return self.pretraining.rebuild(self.network, inputs, mask)

    def target(self, inputs: Tensor) -> Tensor:
        """The pixels that are to be painted, (b, in_chans, height, width)."""
        if not self.norm_cells:
            return inputs
        mean, deviation = self.cell_statistics(inputs)
        stride = self.pretraining.stride
        return F.pixel_shuffle((F.pixel_unshuffle(inputs, stride) - mean) / deviation, stride)

    def cell_statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each cell's pixels, (b, 1, rows, columns)."""
        cells = F.pixel_unshuffle(inputs, self.pretraining.stride)
        return cells.mean(1, keepdim=True), (cells.var(1, keepdim=True) + 1e-6).sqrt()

    def forward(
        self, inputs: Tensor, targets: Any = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Mask ``inputs`` (b, in_chans, height, width) and paint them.

        Args:
            targets: labels, which are not used.
            mode: ``"tensor"`` gives what is painted; ``"loss"`` the loss; ``"predict"`` one dict an image with the
                ``mask`` (rows, columns), and ``rebuilt`` (in_chans, height, width).
        """
        mask = self.draw_mask(inputs)
        rebuilt = self.rebuild(inputs, mask)
        if mode == "tensor":
            return rebuilt
        if mode == "loss":
            pixels = F.interpolate(mask[:, None].float(), scale_factor=self.pretraining.stride, mode="nearest")
            error = (rebuilt.float() - self.target(inputs).float()).abs() * pixels
            return {"loss": error.sum() / (pixels.sum() * inputs.shape[1])}
        if mode == "predict":
            return [{"mask": m, "rebuilt": image} for m, image in zip(mask, rebuilt, strict=True)]
        raise ValueError(f"mode is {mode!r}, expected 'tensor', 'loss' or 'predict'")
