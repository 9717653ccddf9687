_base_ = "mmseg_runtime.py"

custom_imports = dict(imports=["backbones", "backbones.mm", "backbones.mm.segmentation"], allow_failed_imports=False)
