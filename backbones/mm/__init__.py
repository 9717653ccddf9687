"""The mmengine side of the library; importing it fills mmengine's root registries.

They get a dense backbone for each of :data:`backbones.models.FAMILIES` and ``GUESTS``, under its class's name, such as
``VMamba``.

They also get ``PlainMambaAdapter``, the necks ``SimpleFeaturePyramid`` and ``FinerFPN``, the models
``ImageClassifier``, ``HardDistillation``, ``SelfDistillation``, ``MaskedImageModelling``, ``ImagePreprocessor`` and
timm's losses, ``WeightedCrossEntropy``, the data sets ``ImageFolder`` and ``ArrayFolder`` with ``collate_images``,
``keep_worker_seed`` and ``RepeatedAugmentationSampler``, ``ClassificationMetric``, ``TimmOptimWrapperConstructor``,
``BFloat16OptimWrapper``, the hooks ``ResumeHook``, ``FiniteLossHook``, ``ProgressHook``, ``ReportHook``,
``ReconstructionHook``, ``CudaGraphsHook`` and ``SelfDistillationHook``, ``ClassifierTTA``, ``DetectorTTA`` and
``SegmentorTTA`` for ``test --tta``, and the ``"atomic"`` storage backend; mmengine's ``get_model_complexity_info``
counts the library's operators, too. Configs say
``custom_imports=dict(imports=["backbones.mm"])``. After the import mmengine finds the package's own configs:
``_base_ = "backbones::imagenet/vim-tiny_8xb128_in1k.py"``, and ``mmengine.hub.get_config`` with the same name.

For U-Nets they get ``BinaryDiceLoss``, ``BatchDiceLoss`` and ``VolumeMetric``; what needs mmseg itself, ``UNetHead``
among it, stands in :mod:`backbones.mm.segmentation`.

Where mmcv was installed without its compiled operators, :mod:`backbones.mm.mmcv_ext` puts torchvision's in their place.
"""

import backbones.mm.engine.complexity  # teaches mmengine's counters
import backbones.mm.engine.external  # noqa: F401  (lets mmengine find the package's configs)
from backbones.mm import mmcv_ext
from backbones.mm.data.datasets import (
    ArrayFolder,
    ImageFolder,
    RepeatedAugmentationSampler,
    collate_images,
    keep_worker_seed,
)
from backbones.mm.engine.checkpoints import AtomicBackend
from backbones.mm.engine.graphs import CudaGraphsHook
from backbones.mm.engine.hooks import FiniteLossHook, ProgressHook, ResumeHook
from backbones.mm.engine.metrics import ClassificationMetric
from backbones.mm.engine.optim import BFloat16OptimWrapper, TimmOptimWrapperConstructor
from backbones.mm.engine.reconstruction import ReconstructionHook
from backbones.mm.engine.report import ReportHook
from backbones.mm.engine.runner import Runner
from backbones.mm.engine.volumes import VolumeMetric
from backbones.mm.errors import UserError
from backbones.mm.models.classifier import ImageClassifier, ImagePreprocessor
from backbones.mm.models.dense import DenseBackbone, PlainDenseBackbone
from backbones.mm.models.dice import BatchDiceLoss, BinaryDiceLoss
from backbones.mm.models.distillation import HardDistillation, SelfDistillation, SelfDistillationHook
from backbones.mm.models.losses import WeightedCrossEntropy
from backbones.mm.models.masked import MaskedImageModelling
from backbones.mm.models.necks import FinerFPN, SimpleFeaturePyramid
from backbones.mm.models.tta import ClassifierTTA, DetectorTTA, SegmentorTTA
from backbones.mm.models.vit_adapter import PlainMambaAdapter

mmcv_ext.install()

__all__ = [
    "ArrayFolder",
    "AtomicBackend",
    "BFloat16OptimWrapper",
    "BatchDiceLoss",
    "BinaryDiceLoss",
    "ClassificationMetric",
    "ClassifierTTA",
    "CudaGraphsHook",
    "DenseBackbone",
    "DetectorTTA",
    "FinerFPN",
    "FiniteLossHook",
    "HardDistillation",
    "ImageClassifier",
    "ImageFolder",
    "ImagePreprocessor",
    "MaskedImageModelling",
    "PlainDenseBackbone",
    "PlainMambaAdapter",
    "ProgressHook",
    "ReconstructionHook",
    "RepeatedAugmentationSampler",
    "ReportHook",
    "ResumeHook",
    "Runner",
    "SegmentorTTA",
    "SelfDistillation",
    "SelfDistillationHook",
    "SimpleFeaturePyramid",
    "TimmOptimWrapperConstructor",
    "UserError",
    "VolumeMetric",
    "WeightedCrossEntropy",
    "collate_images",
    "keep_worker_seed",
]
