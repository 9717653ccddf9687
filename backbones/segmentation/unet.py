"""U-Nets on any hierarchical encoder, without OpenMMLab: an image to the logits of every pixel's classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.base import Backbone, HierarchicalBackbone
from backbones.layers import LayerNorm, channels_first, channels_last, set_backend
from backbones.layers.constructor import Constructor
from backbones.segmentation.decoder import UNetDecoder, fitted
from backbones.suggest import did_you_mean
from backbones.weights import files, loading, rules

_STRIDES = [4, 8, 16, 32]


class TimmEncoder(nn.Module):
    """A model of timm's as an encoder: its maps of strides 4, 8, 16 and 32, channels-last.

    Args:
        name: registered name.
        pretrained: load timm's weights.
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: the model has no map of one of these strides.
    """

    def __init__(self, name: str, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__()
        info = cast(Any, timm.create_model(name, features_only=True, **kwargs)).feature_info
        reductions = info.reduction()
        if not set(_STRIDES) <= set(reductions):
            raise ValueError(f"encoder: {name!r} has maps of strides {reductions}, expected {_STRIDES} among them")
        indices = [info.out_indices[reductions.index(stride)] for stride in _STRIDES]
        self.model = cast(
            Any, timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=indices, **kwargs)
        )
        self.dims = tuple(self.model.feature_info.channels())
        self.channels_last = "NHWC" in str(self.model.output_fmt)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (b, c, h, w) to four maps (b, h, w, c)."""
        return [x if self.channels_last else channels_last(x) for x in self.model(x)]


class UNet(loading.TakesOfficialLayout):
    """An encoder, a :class:`backbones.segmentation.UNetDecoder` and a linear classifier of pixels.

    Images have any size: they are padded with zeros at the bottom and right to a multiple of the finest map's stride,
    and the logits cropped. An image with one channel is repeated for an encoder that takes three.

    Args:
        encoder: a :class:`backbones.base.HierarchicalBackbone`, whose head is dropped, or a `TimmEncoder`.
        num_classes: logits of each pixel; 1 for a binary task, with a sigmoid on top.
        taps: "output" joins the maps that the encoder's stages end with, "input" those that they begin with.
        map_norm: put a LayerNorm on every map of the encoder; in some families they grow from block to block.
        decoder: arguments of `UNetDecoder`, but its ``dims`` and ``scale``.

    Raises:
        ValueError: ``taps`` is unknown, or "input" with a model of timm's; or an argument of the decoder is wrong.
    """

    def __init__(
        self,
        encoder: HierarchicalBackbone | TimmEncoder,
        num_classes: int = 1,
        taps: str = "output",
        map_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **decoder: Any,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        if taps not in ("output", "input"):
            raise ValueError(f"taps: got {taps!r}, expected 'output' or 'input'")
        if isinstance(encoder, HierarchicalBackbone):
            encoder.prune_intermediate_layers(len(encoder.stages), prune_norm=True)
            dims = [info["num_chs"] for info in encoder.feature_info]
            scale = encoder.feature_info[0]["reduction"]
        else:
            if taps == "input":
                raise ValueError("taps: got 'input', but a model of timm's gives the outputs of its stages alone")
            dims, scale = list(encoder.dims), _STRIDES[0]
        if taps == "output" and decoder.get("merge") == "add_before":
            raise ValueError("merge: got 'add_before' with taps 'output': the bottom would be added to itself")
        self.taps, self.num_classes, self.scale = taps, num_classes, scale
        self.encoder: Any = encoder
        # One for each joined map; that of the bottom comes last, and with taps "input" once more.
        norms = (*dims, *dims[-1:]) if taps == "input" else dims
        self.norms = nn.ModuleList(LayerNorm(dim, device=device, dtype=dtype) for dim in norms if map_norm)
        self.decoder = UNetDecoder(dims, scale=scale, device=device, dtype=dtype, **decoder)
        self.head = nn.Conv2d(self.decoder.out_dim, num_classes, 1, device=device, dtype=dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks are computed again in backward instead of keeping their activations."""
        if isinstance(self.encoder, HierarchicalBackbone):
            self.encoder.set_grad_checkpointing(enable)
        else:
            self.encoder.model.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The bottom map and those that the decoder joins, finest first; all (b, h, w, c).

        The image's sides are multiples of the finest map's stride.
        """
        if isinstance(self.encoder, TimmEncoder):
            maps = self.encoder(x)
        elif self.taps == "output":
            maps = self.encoder.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        else:
            bottom, maps = self.encoder.forward_intermediates(x, output_fmt="NHWC", tap="input")
            maps = [*maps, bottom]
        if len(self.norms):
            maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        return maps[-1], maps[: len(self.decoder.levels) + 1]

    def forward(self, x: Tensor) -> Tensor:
        """Image (b, in_chans, h, w) to logits (b, num_classes, h, w)."""
        height, width = x.shape[-2:]
        if x.shape[1] == 1 and self._in_chans() == 3:
            x = x.expand(-1, 3, -1, -1)
        x = F.pad(x, (0, -width % self.scale, 0, -height % self.scale))
        y = self.decoder(*self.encode(x))
        return self.head(channels_first(fitted(y, height, width)))

    def load_weights(self, checkpoint: str | Path) -> None:
        """Loads a weight file in the authors' layout or in ours; all or nothing.

        Raises:
            CheckpointError: the file cannot be read, or weights are missing, unknown or misshapen; all are named.
        """
        loading.load(self, rules.to_ours(files.read(checkpoint), self.key_rules))

    def _in_chans(self) -> int:
        return self.encoder.in_chans if isinstance(self.encoder, HierarchicalBackbone) else self.encoder.model.in_chans


def unet(
    encoder: str = "vmamba_tiny_s1l8",
    classes: int = 1,
    pretrained: bool = False,
    *,
    up: str | Constructor = "expand",
    merge: str = "concat",
    block: str | Constructor = "vss",
    decoder_depths: Sequence[int] = (0, 2, 2, 2),
    taps: str = "output",
    out_dim: int | None = None,
    decoder_drop_path_rate: float = 0.0,
    **encoder_args: Any,
) -> UNet:
    """A U-Net on a hierarchical model of timm's registry, ours or another.

    Args:
        encoder: registered name; it has maps of strides 4, 8, 16 and 32.
        classes: logits of each pixel; 1 for a binary task, with a sigmoid on top.
        pretrained: load the encoder's weights, as ``timm.create_model`` does.
        up, merge, block, out_dim: see :class:`backbones.segmentation.UNetDecoder`.
        decoder_depths: its ``depths``.
        taps: see `UNet`.
        decoder_drop_path_rate: stochastic depth of the decoder's first block.
        encoder_args: of ``timm.create_model``, such as ``in_chans``, ``depths`` and ``scan_backend``.

    Raises:
        ValueError: there is no such model, it is not a hierarchy, or a choice is unknown.
    """
    if not timm.is_model(encoder):
        raise ValueError(f"encoder: unknown model {encoder!r}{did_you_mean(encoder, timm.list_models())}")
    if _is_ours(encoder):
        model = timm.create_model(encoder, pretrained=pretrained, **encoder_args)
        if not isinstance(model, HierarchicalBackbone):
            raise ValueError(f"encoder: {encoder!r} has all its maps at one stride, expected a hierarchy")
    else:
        model = TimmEncoder(encoder, pretrained, **encoder_args)
    backend = encoder_args.get("scan_backend")
    net = UNet(
        model,
        classes,
        taps,
        True,
        encoder_args.get("device"),
        encoder_args.get("dtype"),
        up=up,
        merge=merge,
        block=block,
        depths=decoder_depths,
        out_dim=out_dim,
        drop_path_rate=decoder_drop_path_rate,
    )
    if backend is not None:
        set_backend(net, backend)
    return net


def _is_ours(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith(f"{Backbone.__module__.partition('.')[0]}.")
