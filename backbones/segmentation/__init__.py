"""U-shaped segmentation: one decoder for every hierarchical encoder, and the published networks that it makes."""

from backbones.segmentation.decoder import UNetDecoder
from backbones.segmentation.networks import MSVMUNet, VMUNet, mhs_vm, msvm_unet, vm_unet
from backbones.segmentation.unet import TimmEncoder, UNet, unet

__all__ = ["MSVMUNet", "TimmEncoder", "UNet", "UNetDecoder", "VMUNet", "mhs_vm", "msvm_unet", "unet", "vm_unet"]
