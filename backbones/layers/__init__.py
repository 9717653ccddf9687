"""Mixers and blocks for this library's models and for other networks, and other parts that families share."""

from backbones.layers.adapters import ChannelsFirst, OnMap, OnTokens
from backbones.layers.bi_attn import BiAttn
from backbones.layers.feed_forward import ConvFFN, MultiScaleConvFFN
from backbones.layers.group_mamba import GroupMambaLayer
from backbones.layers.mamba import MambaBlock, MambaMixer
from backbones.layers.mamba2 import Mamba2Mixer
from backbones.layers.multi_head_scan import MultiHeadScan
from backbones.layers.multi_scale_ss2d import MultiScaleSS2D
from backbones.layers.noncausal_ssd import NonCausalSSD
from backbones.layers.norm import LayerNorm
from backbones.layers.patch_embed import PatchEmbed, StemPatchEmbed
from backbones.layers.patch_expand import BilinearExpand, LargeKernelPatchExpand, PatchExpand
from backbones.layers.positional_block import PositionalBlock
from backbones.layers.pruning import unprunable
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
from backbones.layers.structure_aware import StateFusion, StructureAwareSSM
from backbones.layers.vss_block import VSSBlock, branch_norm
from backbones.layers.weight_decay import no_weight_decay

__all__ = [
    "SS2D",
    "BiAttn",
    "BilinearExpand",
    "ChannelsFirst",
    "ConvDownsample",
    "ConvFFN",
    "ConvStem",
    "DepthwiseConv2d",
    "GroupMambaLayer",
    "LargeKernelPatchExpand",
    "LayerNorm",
    "Mamba2Mixer",
    "MambaBlock",
    "MambaMixer",
    "MultiHeadScan",
    "MultiScaleConvFFN",
    "MultiScaleSS2D",
    "NonCausalSSD",
    "OnMap",
    "OnTokens",
    "PatchEmbed",
    "PatchExpand",
    "PatchMerging",
    "PatchStem",
    "PositionalBlock",
    "ResidualConvStem",
    "RotaryEmbedding",
    "Scan",
    "SelectiveSSM",
    "StateFusion",
    "StemPatchEmbed",
    "StructureAwareSSM",
    "VSSBlock",
    "WideDownsample",
    "branch_norm",
    "channels_first",
    "channels_last",
    "no_weight_decay",
    "scan_grid",
    "set_backend",
    "unprunable",
]
