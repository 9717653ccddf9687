"""What every backbone shares: timm's model contract, for plain models and for hierarchical ones of four stages."""

from backbones.base.contract import Backbone, Constructor
from backbones.base.hierarchical import HierarchicalBackbone, Stage
from backbones.base.plain import PlainBackbone

__all__ = [
    "Backbone",
    "Constructor",
    "HierarchicalBackbone",
    "PlainBackbone",
    "Stage",
]
