"""The mmengine side of the library; importing it fills mmengine's root registries.

They get the dense backbones ``Vim``, ``LBVim``, ``VMamba``, ``MSVMamba``, ``EfficientVMamba``, ``GroupMamba`` and
``SpatialMamba``, the neck ``SimpleFeaturePyramid``, the models ``ImageClassifier``, ``HardDistillation``,
``SelfDistillation``, ``ImagePreprocessor`` and timm's losses, the dataset ``ImageFolder`` with ``collate_images``,
``keep_worker_seed`` and ``RepeatedAugmentationSampler``, ``ClassificationMetric``, ``TimmOptimWrapperConstructor``,
``BFloat16OptimWrapper``, the hooks ``ResumeHook``, ``FiniteLossHook``, ``ProgressHook``, ``ReportHook`` and
``SelfDistillationHook``, and the ``"atomic"`` storage backend. Configs say
``custom_imports=dict(imports=["backbones.mm"])``.
"""

from .backbones import DenseBackbone, PlainDenseBackbone
from .checkpoints import AtomicBackend
from .classifier import ImageClassifier, ImagePreprocessor
from .datasets import ImageFolder, RepeatedAugmentationSampler, collate_images, keep_worker_seed
from .distillation import HardDistillation, SelfDistillation, SelfDistillationHook
from .errors import UserError
from .hooks import FiniteLossHook, ProgressHook, ResumeHook
from .metrics import ClassificationMetric
from .necks import SimpleFeaturePyramid
from .optim import BFloat16OptimWrapper, TimmOptimWrapperConstructor
from .report import ReportHook
from .runner import Runner

__all__ = [
    "AtomicBackend",
    "BFloat16OptimWrapper",
    "ClassificationMetric",
    "DenseBackbone",
    "FiniteLossHook",
    "HardDistillation",
    "ImageClassifier",
    "ImageFolder",
    "ImagePreprocessor",
    "PlainDenseBackbone",
    "ProgressHook",
    "RepeatedAugmentationSampler",
    "ReportHook",
    "ResumeHook",
    "Runner",
    "SelfDistillation",
    "SelfDistillationHook",
    "SimpleFeaturePyramid",
    "TimmOptimWrapperConstructor",
    "UserError",
    "collate_images",
    "keep_worker_seed",
]
