"""The families, one file each; importing this package registers their models in timm."""

from backbones.models import efficientvmamba, groupmamba, lbmamba, msvmamba, spatialmamba, vim, vmamba

__all__ = ["efficientvmamba", "groupmamba", "lbmamba", "msvmamba", "spatialmamba", "vim", "vmamba"]
