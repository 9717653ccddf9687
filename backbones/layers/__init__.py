"""Building blocks that two families or more share."""

from backbones.layers.bi_attn import BiAttn
from backbones.layers.feed_forward import ConvFFN, MultiScaleConvFFN
from backbones.layers.mamba import MambaBlock, MambaMixer
from backbones.layers.multi_head_scan import MultiHeadScan
from backbones.layers.norm import LayerNorm
from backbones.layers.patch_embed import PatchEmbed, StemPatchEmbed
from backbones.layers.patch_expand import BilinearExpand, LargeKernelPatchExpand, PatchExpand
from backbones.layers.positional_block import PositionalBlock
from backbones.layers.resolution import (
    ConvDownsample,
    ConvStem,
    PatchMerging,
    PatchStem,
    ResidualConvStem,
    WideDownsample,
    channels_first,
    channels_last,
)
from backbones.layers.rotary import RotaryEmbedding
from backbones.layers.scan import Scan, set_backend
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.ss2d import SS2D, DepthwiseConv2d, scan_grid
from backbones.layers.vss_block import branch_norm

__all__ = [
    "SS2D",
    "BiAttn",
    "BilinearExpand",
    "ConvDownsample",
    "ConvFFN",
    "ConvStem",
    "DepthwiseConv2d",
    "LargeKernelPatchExpand",
    "LayerNorm",
    "MambaBlock",
    "MambaMixer",
    "MultiHeadScan",
    "MultiScaleConvFFN",
    "PatchEmbed",
    "PatchExpand",
    "PatchMerging",
    "PatchStem",
    "PositionalBlock",
    "ResidualConvStem",
    "RotaryEmbedding",
    "Scan",
    "SelectiveSSM",
    "StemPatchEmbed",
    "WideDownsample",
    "branch_norm",
    "channels_first",
    "channels_last",
    "scan_grid",
    "set_backend",
]
