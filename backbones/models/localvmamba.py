"""LocalVMamba: four stages whose blocks scan along four directions each of their own, some inside small windows.

LocalMamba: Visual State Space Model with Windowed Selective Scan, arXiv:2403.09338.
Original: https://github.com/hunto/LocalMamba, Apache-2.0. Written from the paper and from measurements of the
original, without its code.

The blocks are those of VMamba's first generation: a projection, a depthwise convolution, scans of the map, a norm, a
gate; no feed-forward layer. A search chose four of eight directions for every block: rows ("h"), columns ("v") and
windows ("w2", "w7"), forwards or backwards ("_flip"). Their outputs pass a channel gate (BiAttn) before they are added.
A map that windows do not divide is padded to whole ones; padded slots read zeros, so the state only decays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.base import HierarchicalBackbone, build_model
from backbones.layers import SS2D, BiAttn, PatchMerging, PatchStem, Scan
from backbones.layers.key_rules import BLOCKS, CLASSIFIER, PATCH_MERGING, PATCH_STEM, ss2d_rules
from backbones.layers.vss_block import VSSBlock
from backbones.patterns import directions as directions_pattern
from backbones.weights import KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

Directions = Sequence[Sequence[str]]

# What the search chose for the blocks, numbered through the stages, and the position of each in a block's list, which
# its parameters go by.
TINY: Directions = [
    row.split()
    for row in (
        "h h_flip w7 w7_flip",
        "h_flip v_flip w2 w2_flip",
        "h_flip v_flip w2_flip w7",
        "h_flip v v_flip w2",
        "h h_flip v_flip w2_flip",
        "h_flip v_flip w2 w2_flip",
        "h w2_flip w7 w7_flip",
        "h h_flip v v_flip",
        "h v_flip w7 w7_flip",
        "h_flip v w2 w7_flip",
        "v v_flip w2 w7_flip",
        "h h_flip v_flip w2_flip",
        "v_flip w2_flip w7 w7_flip",
        "h_flip v_flip w2_flip w7_flip",
        "h_flip v w7 w7_flip",
    )
]
SMALL: Directions = [
    row.split()
    for row in (
        "h v v_flip w7_flip",
        "h h_flip v w7",
        "h_flip v v_flip w7",
        "h_flip v w2_flip w7",
        "h_flip v w2_flip w7",
        "h_flip v_flip w2 w7_flip",
        "h_flip v v_flip w7",
        "h v v_flip w7",
        "h v v_flip w7",
        "h v v_flip w7_flip",
        "h h_flip v v_flip",
        "h v v_flip w2",
        "v v_flip w2_flip w7",
        "h h_flip v w2",
        "h_flip v v_flip w7_flip",
        "h h_flip v v_flip",
        "h v v_flip w7_flip",
        "h v v_flip w7_flip",
        "h h_flip v_flip w7",
        "h_flip v_flip w2_flip w7",
        "h_flip v v_flip w7_flip",
        "v v_flip w7 w7_flip",
        "h v v_flip w7_flip",
        "h_flip v v_flip w2",
        "h v v_flip w2_flip",
        "h h_flip v w7",
        "h h_flip w7 w7_flip",
        "h v_flip w2 w2_flip",
        "h v_flip w2 w7",
        "h v v_flip w7_flip",
        "h_flip v w2_flip w7",
        "h_flip v_flip w7 w7_flip",
        "h v w7 w7_flip",
    )
]


class LocalVMamba(HierarchicalBackbone):
    """LocalVMamba. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": PatchStem, "downsample": PatchMerging}
    key_rules = (
        KeyRule("layers.{}.blocks.{}.op.multi_scan.attn.{*}", "stages.{}.blocks.{}.mixer.merge.{*}"),
        *PATCH_STEM,
        *PATCH_MERGING,
        *ss2d_rules(),
        *BLOCKS,
        *CLASSIFIER,
    )


def _create_localvmamba(
    variant: str, pretrained: bool, *, directions: Directions, depths: Sequence[int], d_state: int = 16,
    ssm_ratio: float = 2.0, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """``directions`` lists the directions of each block, see :func:`backbones.patterns.directions`; blocks, numbered
    through the stages, use the lists in turn.
    """
    scans = Scan.pop_each(kwargs, [directions_pattern(*names) for names in directions])
    in_turn = cycle(partial(SS2D, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio, merge=BiAttn) for scan in scans)
    blocks = [[partial(VSSBlock, mixer=mixer) for mixer in islice(in_turn, depth)] for depth in depths]
    return build_model(LocalVMamba, variant, pretrained, scan=scans[0], block=blocks, depths=depths, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("localvmamba"))


@register_model
def localvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVMamba-T, 26 M parameters."""
    args = {"depths": (2, 2, 9, 2), "directions": TINY}
    return _create_localvmamba("localvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def localvmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVMamba-S, 50 M parameters."""
    args = {"depths": (2, 2, 27, 2), "directions": SMALL}
    return _create_localvmamba("localvmamba_small", pretrained, **dict(args, **kwargs))
