"""The mmengine side of the library; importing it fills mmengine's root registries.

They get the dense backbones ``Vim``, ``LBVim``, ``VMamba``, ``MSVMamba``, ``EfficientVMamba``, ``GroupMamba`` and
``SpatialMamba``, the models ``ImageClassifier``, ``ImagePreprocessor`` and timm's losses, the dataset ``ImageFolder``
with ``collate_images`` and ``keep_worker_seed``, ``ClassificationMetric``, ``TimmOptimWrapperConstructor``,
``BFloat16OptimWrapper``, the hooks ``ResumeHook``, ``FiniteLossHook``, ``ProgressHook`` and ``ReportHook``,
and the ``"atomic"`` storage backend. Configs say ``custom_imports=dict(imports=["backbones.mm"])``.
"""

from .backbones import DenseBackbone, PlainDenseBackbone
from .checkpoints import AtomicBackend
from .classifier import ImageClassifier, ImagePreprocessor
from .datasets import ImageFolder, collate_images, keep_worker_seed
from .errors import UserError
from .hooks import FiniteLossHook, ProgressHook, ResumeHook
from .metrics import ClassificationMetric
from .optim import BFloat16OptimWrapper, TimmOptimWrapperConstructor
from .report import ReportHook
from .runner import Runner

__all__ = [
    "AtomicBackend",
    "BFloat16OptimWrapper",
    "ClassificationMetric",
    "DenseBackbone",
    "FiniteLossHook",
    "ImageClassifier",
    "ImageFolder",
    "ImagePreprocessor",
    "PlainDenseBackbone",
    "ProgressHook",
    "ReportHook",
    "ResumeHook",
    "Runner",
    "TimmOptimWrapperConstructor",
    "UserError",
    "collate_images",
    "keep_worker_seed",
]
