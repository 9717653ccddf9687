"""The families, one file each; importing this package registers their models in timm.

A family's class names its OpenMMLab backbone; the class's module names its page in the zoo and its model card.
"""

from backbones.base import Backbone
from backbones.models.adventurer import Adventurer
from backbones.models.efficientvim import EfficientViM
from backbones.models.efficientvmamba import EfficientVMamba
from backbones.models.groupmamba import GroupMamba
from backbones.models.lbmamba import LBVim
from backbones.models.localvim import LocalVim
from backbones.models.localvmamba import LocalVMamba
from backbones.models.msvmamba import MSVMamba
from backbones.models.plainmamba import PlainMamba
from backbones.models.spatialmamba import SpatialMamba
from backbones.models.vim import Vim
from backbones.models.vmamba import VMamba
from backbones.models.vssd import VSSD

# Plain models first, then by age: the order of every table and list.
FAMILIES: tuple[type[Backbone], ...] = (
    Vim,
    LBVim,
    VMamba,
    MSVMamba,
    EfficientVMamba,
    GroupMamba,
    SpatialMamba,
    LocalVim,
    LocalVMamba,
    PlainMamba,
    VSSD,
    Adventurer,
)
# Families that timm registers itself. This library adds their facts, card and OpenMMLab backbone.
GUESTS: tuple[type[Backbone], ...] = (EfficientViM,)

__all__ = ["FAMILIES", "GUESTS", "family_names"]


def family_names(guests: bool = False) -> tuple[str, ...]:
    """The families' names, in order: those of their modules, zoo files and cards. ``guests`` adds ``GUESTS``."""
    return tuple(family.__module__.rpartition(".")[2] for family in (*FAMILIES, *(GUESTS if guests else ())))
