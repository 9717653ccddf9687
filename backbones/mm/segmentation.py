"""The parts that need mmseg itself: the head of U-Nets with its weights, and a data set of lesions.

Configs say ``custom_imports=dict(imports=["backbones", "backbones.mm", "backbones.mm.segmentation"])``.
"""

from backbones.mm.data.lesions import ISICDataset, LoadMask
from backbones.mm.models.unet_head import UNetHead, UNetWeights

__all__ = ["ISICDataset", "LoadMask", "UNetHead", "UNetWeights"]
