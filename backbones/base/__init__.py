"""timm's model contract, which every backbone shares: plain models and hierarchies of four stages."""

from backbones.base.build import build_model
from backbones.base.contract import Backbone
from backbones.base.hierarchical import HierarchicalBackbone, Stage
from backbones.base.plain import PlainBackbone
from backbones.base.reduction import TokenReduction, reduce_tokens
from backbones.layers.constructor import Constructor

__all__ = [
    "Backbone",
    "Constructor",
    "HierarchicalBackbone",
    "PlainBackbone",
    "Stage",
    "TokenReduction",
    "build_model",
    "reduce_tokens",
]
