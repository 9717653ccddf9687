"""The published U-Nets of state-space blocks: VM-UNet, MHS-VM and MSVM-UNet.

Vision Mamba UNet for medical image segmentation, arXiv:2402.02491, https://github.com/JCruan519/VM-UNet, Apache-2.0.
MHS-VM, multi-head scanning in parallel subspaces, arXiv:2406.05992, https://github.com/PixDeep/MHS-VM, Apache-2.0.
MSVM-UNet, arXiv:2408.13735, https://github.com/gndlwch2w/msvm-unet, without a licence.
Written from the papers and from measurements of the originals, without their code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backbones.base import HierarchicalBackbone
from backbones.layers import ConvDownsample, ConvStem, MultiHeadScan, PatchMerging, PatchStem, set_backend
from backbones.layers.constructor import Constructor
from backbones.layers.key_rules import BLOCKS, PATCH_MERGING, PATCH_STEM, POINTWISE, moved, ss2d_rules
from backbones.layers.multi_head_scan import HEADS
from backbones.patterns import ScanPattern
from backbones.segmentation.decoder import multi_head_block, vanilla_block, vss_block
from backbones.segmentation.unet import UNet
from backbones.weights import KeyRule, files, loading, rules

_DIMS = (96, 192, 384, 768)
# Of a stage: an SS2D layer, and in MHS-VM its heads.
_BLOCKS = (
    *moved(MultiHeadScan.key_rules, "layers.{}.blocks.{}.self_attention.mhs.", "stages.{}.blocks.{}.mixer.scanner."),
    *ss2d_rules(),
    *BLOCKS,
)


_DECODER = {  # the authors' place of blocks and ours
    "layers_up.0.blocks.": "decoder.bottom.",
    **{f"layers_up.{i + 1}.blocks.": f"decoder.levels.{i}.blocks." for i in range(3)},
}


class VMUNet(UNet):
    """VM-UNet and MHS-VM, made by :func:`vm_unet` and :func:`mhs_vm`."""

    key_rules = (
        *moved((*PATCH_STEM, *PATCH_MERGING, *_BLOCKS), "vmunet.", "encoder."),
        *(
            rule
            for theirs, ours in _DECODER.items()
            for rule in moved(_BLOCKS, f"vmunet.{theirs}", ours, "layers.{}.blocks.", "stages.{}.blocks.")
        ),
        *(KeyRule(f"vmunet.layers_up.{i + 1}.upsample.{{*}}", f"decoder.levels.{i}.up.{{*}}") for i in range(3)),
        KeyRule("vmunet.final_up.{*}", "decoder.final_up.{*}"),
        KeyRule("vmunet.final_conv.{}", "head.{}"),
    )

    def load_vmamba(self, checkpoint: str | Path) -> list[str]:
        """Begins with a classifier of VMamba's first generation, as the authors do with VMamba-S.

        Encoder and decoder take the first blocks of each stage, the decoder from the last stage to the first. What
        widens maps, and the classifier of pixels, keep their random weights.

        Args:
            checkpoint: weight file of a ``vanilla_vmamba``, in the authors' layout or in ours.

        Returns:
            The names of the weights that stay random.

        Raises:
            CheckpointError: the file cannot be read, or a weight of a block is missing or misshapen; nothing is loaded.
        """
        source = rules.to_ours(files.read(checkpoint), (*PATCH_STEM, *PATCH_MERGING, *ss2d_rules(), *BLOCKS))
        own = self.state_dict()
        fresh = [name for name in own if name.startswith(("decoder.final_up.", "head.")) or ".up." in name]
        weights = {}
        for name in own.keys() - set(fresh):
            stage = re.fullmatch(r"decoder\.(?:bottom|levels\.(\d)\.blocks)\.(.+)", name)
            theirs = name.removeprefix("encoder.")
            if stage is not None:
                theirs = f"stages.{3 if stage[1] is None else 2 - int(stage[1])}.blocks.{stage[2]}"
            if theirs in source:
                weights[name] = source[theirs]
        return loading.load(self, weights, optional=fresh)


class MSVMUNet(UNet):
    """MSVM-UNet, made by :func:`msvm_unet`."""

    key_rules = (
        KeyRule("encoder.layer0.0.{}", "encoder.stem.conv1.{}"),
        KeyRule("encoder.layer0.2.{}", "encoder.stem.norm1.{}"),
        KeyRule("encoder.layer1.0.{}", "encoder.stem.conv2.{}"),
        KeyRule("encoder.layer1.2.{}", "encoder.stem.norm2.{}"),
        KeyRule("encoder.downsamples.{}.1.{}", "encoder.downsamples.{}.proj.{}"),
        KeyRule("encoder.downsamples.{}.3.{}", "encoder.downsamples.{}.norm.{}"),
        *moved((*ss2d_rules(), *BLOCKS), "encoder.", "encoder."),
        KeyRule(
            "decoder.layers.{}.vss_layer.blocks.{}.mlp.multiscale_conv.dw_convs.{}.{}",
            "decoder.levels.{}.blocks.{}.mlp.convs.{}.{}",
        ),
        *moved(
            (*ss2d_rules(), *BLOCKS),
            "decoder.layers.{}.vss_layer.blocks.",
            "decoder.levels.{}.blocks.",
            "layers.{}.blocks.",
            "stages.{}.blocks.",
        ),
        *(
            KeyRule(f"{theirs}.expand.{number}.{{}}", f"{ours}.{name}.{{}}")
            for theirs, ours in (
                ("decoder.layers.{}.up", "decoder.levels.{}.up"),
                ("decoder.out_layers.0", "decoder.final_up"),
            )
            for number, name in (("0", "expand.conv"), ("1", "expand.bn"), ("3", "conv"))
        ),
        KeyRule("decoder.layers.{}.up.norm.{}", "decoder.levels.{}.up.norm.{}"),
        KeyRule("decoder.layers.{}.concat_layer.weight", "decoder.levels.{}.join.weight", POINTWISE),
        KeyRule("decoder.layers.{}.concat_layer.bias", "decoder.levels.{}.join.bias"),
        KeyRule("decoder.out_layers.0.norm.{}", "decoder.final_up.norm.{}"),
        KeyRule("decoder.out_layers.0.out.{}", "head.{}"),
    )


def vm_unet(
    num_classes: int = 1,
    *,
    in_chans: int = 3,
    depths: Sequence[int] = (2, 2, 2, 2),
    decoder_depths: Sequence[int] = (2, 2, 2, 1),
    drop_path_rate: float = 0.2,
    checkpoint: str | Path | None = None,
    scan_backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VMUNet:
    """VM-UNet, 27.4 M parameters: first-generation VMamba down and up again; it returns logits for one class, too.

    Args:
        num_classes: logits of each pixel; the authors' network of 1 ends in a sigmoid, ours does not.
        in_chans: channels of the image; one is repeated for a network that takes three.
        depths: blocks of the encoder's stages.
        decoder_depths: blocks of the decoder, from the bottom.
        drop_path_rate: stochastic depth of the encoder's last and the decoder's first block.
        checkpoint: weight file in the authors' layout or in ours.
        scan_backend: see :func:`backbones.ops.selective_scan`.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    net = _vm_unet(vanilla_block(), num_classes, in_chans, depths, decoder_depths, drop_path_rate, dd)
    return _finished(net, checkpoint, scan_backend)


def mhs_vm(
    num_classes: int = 1,
    *,
    heads: int | None = None,
    patterns: Sequence[ScanPattern | str] | None = None,
    threshold: float = 0.5,
    in_chans: int = 3,
    depths: Sequence[int] = (2, 2, 2, 2),
    decoder_depths: Sequence[int] = (2, 2, 2, 1),
    drop_path_rate: float = 0.2,
    checkpoint: str | Path | None = None,
    scan_backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VMUNet:
    """MHS-VM, 17.3 M parameters with four heads: VM-UNet with multi-head scanning in every block.

    Args:
        num_classes, in_chans, depths, decoder_depths, drop_path_rate, checkpoint, scan_backend: see `vm_unet`.
        heads: 1 to 4, the first of the authors' heads C, X, S and Z; None is 4.
        patterns: of the heads, instead of ``heads``.
        threshold: of the gates, see :class:`backbones.layers.MultiHeadScan`; the authors take 0 for ISIC 2017 and 0.5
            for ISIC 2018.

    Raises:
        ValueError: both ``heads`` and ``patterns``, or another number of heads.
    """
    if heads is not None and patterns is not None:
        raise ValueError(f"heads, patterns: got {heads} and {patterns}, expected one of them")
    if heads is not None and not 1 <= heads <= len(HEADS):
        raise ValueError(f"heads: got {heads}, expected 1..{len(HEADS)}")
    block = multi_head_block(HEADS[:heads] if patterns is None else patterns, threshold)
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    net = _vm_unet(block, num_classes, in_chans, depths, decoder_depths, drop_path_rate, dd)
    return _finished(net, checkpoint, scan_backend)


def msvm_unet(
    num_classes: int = 9,
    *,
    in_chans: int = 3,
    depths: Sequence[int] = (2, 2, 8, 2),
    decoder_depths: Sequence[int] = (2, 2, 2),
    drop_path_rate: float = 0.2,
    checkpoint: str | Path | None = None,
    scan_backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MSVMUNet:
    """MSVM-UNet, 35.9 M parameters: VMamba-T (s1l8), and a decoder of large-kernel expansions and multi-scale blocks.

    Args:
        num_classes, in_chans, drop_path_rate, checkpoint, scan_backend: see `vm_unet`.
        depths: blocks of the encoder's stages.
        decoder_depths: blocks of the decoder's three levels, from the coarsest.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    encoder = HierarchicalBackbone(
        ConvStem, vss_block(), ConvDownsample, depths, _DIMS, in_chans=in_chans,
        num_classes=0, drop_path_rate=drop_path_rate, **dd,
    )  # fmt: skip
    net = MSVMUNet(
        encoder,
        num_classes,
        up="lkpe",
        block="multi_scale",
        depths=(0, *decoder_depths),
        drop_path_rate=drop_path_rate,
        **dd,
    )
    return _finished(net, checkpoint, scan_backend)


def _vm_unet(
    block: Constructor,
    num_classes: int,
    in_chans: int,
    depths: Sequence[int],
    decoder_depths: Sequence[int],
    drop_path_rate: float,
    dd: dict[str, Any],
) -> VMUNet:
    encoder = HierarchicalBackbone(
        PatchStem, block, PatchMerging, depths, _DIMS, in_chans=in_chans, num_classes=0,
        drop_path_rate=drop_path_rate, **dd,
    )  # fmt: skip
    return VMUNet(
        encoder,
        num_classes,
        "input",
        merge="add_before",
        block=block,
        depths=decoder_depths,
        out_dim=_DIMS[0] // 4,
        drop_path_rate=drop_path_rate,
        **dd,
    )


def _finished(net: Any, checkpoint: str | Path | None, scan_backend: str | None) -> Any:
    set_backend(net, scan_backend)
    if checkpoint is not None:
        net.load_weights(checkpoint)
    return net
