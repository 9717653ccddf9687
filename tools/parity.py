"""Which model each recording of an original belongs to, and how it is replayed: for the tests and for certify.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS as BACKBONES
from torch import Tensor, nn

import backbones.mm  # noqa: F401  (registers the backbones)
from backbones import segmentation
from tools.recordings import Recording

MODELS = {
    "vim_tiny_224": "vim_tiny",
    "vim_small_224": "vim_small",
    "vim_tiny_stride8_224": "vim_tiny_stride8",
    "lbvim_tiny_224": "lbvim_tiny",
    "lbvim_300_224": "lbvim_300",
    "lbvim_528_atthead_224": "lbvim_528",
    "vanilla_vmamba_tiny_cls_1x3x224x224": "vanilla_vmamba_tiny",
    "vmamba_tiny_s1l8_cls_2x3x224x224": "vmamba_tiny_s1l8",
    "vmamba_base_s2l15_cls_1x3x224x224": "vmamba_base_s2l15",
    "msvmamba_nano_cls_2x3x224x224": "msvmamba_nano",
    "msvmamba_tiny_cls_1x3x224x224": "msvmamba_tiny",
    "msvmambav3_tiny_cls_1x3x224x224": "msvmambav3_tiny",
    "efficientvmamba_tiny_224x224": "efficientvmamba_tiny",
    "efficientvmamba_tiny_230x225": "efficientvmamba_tiny",
    "efficientvmamba_small_224x224": "efficientvmamba_small",
    "groupmamba_tiny_224x224": "groupmamba_tiny",
    "groupmamba_tiny_192x256": "groupmamba_tiny",
    "groupmamba_base_224x224": "groupmamba_base",
    "spatialmamba_tiny_224": "spatialmamba_tiny",
    "spatialmamba_base_224": "spatialmamba_base",
    "adventurer_tiny_224x224": "adventurer_tiny",
    "adventurer_tiny_2x3x128x128": "adventurer_tiny",
    "plainmamba_l1_224x224": "plainmamba_l1",
    "plainmamba_l1_192x256": "plainmamba_l1",
    "vssd_micro_224": "vssd_micro",
    "vssd_tiny_224": "vssd_tiny",
    "localvim_tiny_224x224": "localvim_tiny",
    "localvim_tiny_midcls_224x224": "localvim_tiny_midcls",
    "localvim_tiny_nosearch_192x256": "localvim_tiny_unsearched",
    "localvmamba_tiny_224x224": "localvmamba_tiny",
}
# Of models that timm registers, through the same route.
GUESTS = {
    "efficientvim_m1_224": "efficientvim_m1",
    "efficientvim_m1_dist_224": "efficientvim_m1_dist",
    "efficientvim_m4_256": "efficientvim_m4",
}
# Arguments of the models of recordings at another size than the registered one.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "localvim_tiny_nosearch_192x256": {"dynamic_img_size": True},
    "adventurer_tiny_2x3x128x128": {"img_size": 128},
    "plainmamba_l1_192x256": {"dynamic_img_size": True},
}
# Segmentation networks: how they are built. MHS-VM's gate is a ratio of small differences: it is held in float64.
UNETS: dict[str, Callable[..., nn.Module]] = {
    "vmunet_isic_128x160": partial(segmentation.vm_unet, num_classes=1),
    "msvmunet_tiny_synapse_128x160": partial(segmentation.msvm_unet, num_classes=9),
    "mhsvm_4head_t05_128": partial(segmentation.mhs_vm, num_classes=1, heads=4, threshold=0.5),
}
# Images whose gradient sits on the kink of a ReLU, where float32 may take either side: exact float64 differs from
# the record by 5e-3 there. A pre-activation in downsamples.0 (tiny) or downsamples.1 (base) is as good as zero.
KINKS = {"spatialmamba_tiny_224": 1, "spatialmamba_base_224": 1}


def official_file(folder: Path, recording: Recording, dtype: torch.dtype = torch.float32) -> Path:
    """A training state as the authors' scripts write it."""
    path = folder / "checkpoint.pth"
    state = {"model": recording.weights(dtype), "epoch": 299, "args": argparse.Namespace(lr=1e-3)}
    torch.save(state, path)
    return path


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


RECORDED: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8_backbone_1x3x225x230": {"type": "VMamba", "arch": "vmamba_tiny_s1l8"},
    "msvmamba_nano_backbone_1x3x225x230": {"type": "MSVMamba", "arch": "msvmamba_nano"},
    "efficientvmamba_tiny_backbone_200x273": {"type": "EfficientVMamba", "arch": "efficientvmamba_tiny"},
    "groupmamba_tiny_backbone_192x256": {"type": "GroupMamba", "arch": "groupmamba_tiny"},
    "spatialmamba_tiny_backbone_230x226": {"type": "SpatialMamba", "arch": "spatialmamba_tiny"},
    "vssd_tiny_backbone_230x226": {"type": "VSSD", "arch": "vssd_tiny"},
    "efficientvim_m1_backbone_200x273": {"type": "EfficientViM", "arch": "efficientvim_m1"},
    "lbvim_tiny_seg_256x320": {
        "type": "LBVim",
        "arch": "lbvim_tiny",
        "out_indices": (5, 11, 17, 23),
        "model_args": {"norm_layer": nn.LayerNorm},
    },
    "localvmamba_tiny_backbone_200x200": {"type": "LocalVMamba", "arch": "localvmamba_tiny"},
    "plainmamba_l1_adapter_2x3x192x256": {"type": "PlainMambaAdapter", "arch": "plainmamba_l1"},
    "plainmamba_l1_backbone_192x256": {"type": "PlainMamba", "arch": "plainmamba_l1"},
    "localvim_tiny_backbone_256x256": {
        "type": "LocalVim",
        "arch": "localvim_tiny",
        "out_indices": (4, 9, 14, 19),
        "norm_layer": "layernorm",
        "model_args": {"img_size": 256},
    },
}


def build(config: dict[str, Any], path: Path | None = None, **kwargs: object) -> nn.Module:
    """A dense backbone by its config, with the weights of a file in the official layout."""
    init = {} if path is None else {"init_cfg": {"type": "Pretrained", "checkpoint": str(path)}}
    backbone = BACKBONES.build({**config, **init, **kwargs})
    backbone.init_weights()
    return backbone
