"""Visual state-space backbones for timm and OpenMMLab: one scan-pattern module, one selective-scan operator.

Importing this package registers its models in timm: ``timm.create_model("vim_tiny")``.
"""

from backbones.base import reduce_tokens, timm_checkpoint
from backbones.graphs import cuda_graphs
from backbones.layers import unprunable
from backbones.models import FAMILIES
from backbones.segmentation import mhs_vm, msvm_unet, unet, vm_unet

timm_checkpoint.install()

__version__ = "0.1.0"
__all__ = ["FAMILIES", "cuda_graphs", "mhs_vm", "msvm_unet", "reduce_tokens", "unet", "unprunable", "vm_unet"]
