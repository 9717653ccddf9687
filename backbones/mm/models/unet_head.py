"""A U-Net's decoder as a head of mmseg, for any backbone with maps of a hierarchy; weights of published networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.registry import WEIGHT_INITIALIZERS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from backbones.layers import channels_first, channels_last
from backbones.mm.errors import UserError
from backbones.segmentation import MSVMUNet, UNetDecoder, VMUNet
from backbones.weights import files, loading, rules

_NETWORKS = {"vm_unet": VMUNet, "mhs_vm": VMUNet, "msvm_unet": MSVMUNet}
_PLACES = {"encoder.": "backbone.model.", "decoder.": "decode_head.decoder.", "head.": "decode_head.conv_seg."}


@MODELS.register_module()
class UNetHead(BaseDecodeHead):
    """:class:`backbones.segmentation.UNetDecoder` and a linear classifier, at the full resolution of the image.

    For a binary task say ``num_classes=2, out_channels=1, threshold=0.5`` and a loss of one logit.

    Args:
        in_channels: widths of the backbone's maps, finest first. With ``merge`` "add_before" that of the bottom comes
            last and once more, as a backbone with ``taps="input"`` gives it.
        up, merge, block, block_args, depths, out_dim, drop_path_rate: see the decoder.
        scale: stride of the finest map.
        in_index: which of the backbone's maps; None takes as many as ``in_channels``.
        dropout_ratio: before the classifier.
        kwargs: further arguments of mmseg's ``BaseDecodeHead``: ``num_classes``, ``loss_decode`` and so on.

    Raises:
        ValueError: a choice is unknown, or the numbers of maps and depths disagree.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        up: str = "expand",
        merge: str = "concat",
        block: str = "vss",
        block_args: dict[str, Any] | None = None,
        depths: Sequence[int] = (0, 2, 2, 2),
        out_dim: int | None = None,
        scale: int = 4,
        drop_path_rate: float = 0.0,
        in_index: Sequence[int] | None = None,
        dropout_ratio: float = 0.0,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        dims = list(in_channels[:-1] if merge == "add_before" else in_channels)
        super().__init__(
            in_channels=list(in_channels),
            in_index=list(range(len(in_channels)) if in_index is None else in_index),
            channels=dims[0] if out_dim is None else out_dim,
            input_transform="multiple_select",
            dropout_ratio=dropout_ratio,
            init_cfg=init_cfg,
            **kwargs,
        )
        self.scale = scale
        self.decoder = UNetDecoder(dims, depths, block, up, merge, scale, out_dim, drop_path_rate, block_args)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps (b, c, h, w), finest first, to logits (b, out_channels, scale h, scale w)."""
        maps = [channels_last(x).contiguous() for x in self._transform_inputs(inputs)]
        y = self.decoder(maps[-1], maps[: len(self.decoder.levels) + 1])
        return self.cls_seg(channels_first(y))

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Any) -> dict[str, Tensor]:
        """Losses of logits cropped to the labels."""
        height, width = batch_data_samples[0].gt_sem_seg.shape[-2:]
        return super().loss_by_feat(self._cropped(seg_logits, height, width), batch_data_samples)

    def predict_by_feat(self, seg_logits: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Logits cropped to the image that the backbone saw."""
        meta = batch_img_metas[0]
        height, width = (meta.get("pad_shape") or meta["img_shape"])[:2]
        return super().predict_by_feat(self._cropped(seg_logits, height, width), batch_img_metas)

    def _cropped(self, x: Tensor, height: int, width: int) -> Tensor:
        """Without what the backbone's rounding up of odd sides added; mmseg would squeeze it into the image."""
        if 0 <= x.shape[2] - height < self.scale and 0 <= x.shape[3] - width < self.scale:
            return x[:, :, :height, :width]
        return x


@WEIGHT_INITIALIZERS.register_module()
class UNetWeights:
    """Loads a file of a published network into an ``EncoderDecoder`` of mmseg, strictly.

    ``init_cfg=dict(type="UNetWeights", network="vm_unet", checkpoint=FILE)`` of the segmentor; its backbone and head
    are those of the network's config.

    Args:
        network: "vm_unet", "mhs_vm" or "msvm_unet".
        checkpoint: the file, in the authors' layout or in that of :mod:`backbones.segmentation`.

    Raises:
        UserError: there is no such network.
    """

    def __init__(self, network: str, checkpoint: str) -> None:
        if network not in _NETWORKS:
            raise UserError(f"network: got {network!r}, expected one of {tuple(_NETWORKS)}")
        self.network, self.checkpoint = network, checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Loads the file, or raises CheckpointError and names every weight that does not fit."""
        ours = rules.to_ours(files.read(self.checkpoint), _NETWORKS[self.network].key_rules)
        weights = {
            next((new + name.removeprefix(old) for old, new in _PLACES.items() if name.startswith(old)), name): x
            for name, x in ours.items()
        }
        loading.load(module, weights)
