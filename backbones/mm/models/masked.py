"""Pre-training by masked images, for any model of the library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.layers import trunc_normal_
from torch import Tensor, nn

from backbones.base import Backbone
from backbones.mm.errors import UserError
from backbones.mm.models.classifier import create_network, load_network
from backbones.mm.models.toki import Toki

_FILLS = ("token", "toki")


class Pretraining(nn.Module):
    """The parts of pre-training besides the network; weight files of networks leave them out.

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


@MODELS.register_module()
class MaskedImageModelling(BaseModel):
    """A network that learns to paint the masked part of an image (SimMIM, arXiv:2111.09886).

    Cells of the coarsest grid are masked at random; the stem's tokens under them are replaced by a learned vector, all
    scans go on as ever, and a 1 x 1 convolution of the last map predicts the pixels of each cell. The loss is the mean
    absolute error over the masked cells.

    Its checkpoints load into a classifier with ``init_cfg=dict(type="Pretrained", checkpoint=..., headless=True)``, and
    into a dense backbone without ``headless``.

    Args:
        network: arguments of ``timm.create_model``, among them ``name``, of a model of this library. It loses its head.
        ratio: share of the cells that are masked, rounded to whole cells.
        fill: "token", or "toki": masked cells of the last map are filled in from the visible ones before and behind
            them, see :func:`backbones.mm.models.toki.toki`, as in MambaMIM (arXiv:2408.08070).
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
        built.reset_classifier(0, "")  # type: ignore[operator]
        self.network, self.name = built, network["name"]
        self.ratio, self.norm_cells = ratio, norm_cells
        first, last = built.feature_info[0], built.feature_info[-1]
        self.pretraining = Pretraining(first["num_chs"], last["num_chs"], last["reduction"], built.in_chans, fill)

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
        network: Any = self.network
        features = network.forward_intermediates(
            inputs, indices=1, norm=True, intermediates_only=True,
            replace=lambda tokens: self.pretraining.replace(tokens, mask),
        )[-1]  # fmt: skip
        if features.shape[2:] != mask.shape[1:]:
            raise ValueError(
                f"network: {self.name} makes {features.shape[2]} x {features.shape[3]} cells of {inputs.shape[2]} x "
                f"{inputs.shape[3]} pixels, expected {mask.shape[1]} x {mask.shape[2]}, one for each patch"
            )
        return self.pretraining.decode(features, mask)

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
