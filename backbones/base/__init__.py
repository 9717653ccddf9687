"""What every backbone shares: timm's model contract, for plain (one resolution) and hierarchical (four
stages) models."""

from backbones.base.contract import Backbone, Constructor, layer_norm, rms_norm
from backbones.base.hierarchical import HierarchicalBackbone, Stage
from backbones.base.plain import PlainBackbone

__all__ = [
    "Backbone",
    "Constructor",
    "HierarchicalBackbone",
    "PlainBackbone",
    "Stage",
    "layer_norm",
    "rms_norm",
]
