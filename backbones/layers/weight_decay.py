"""Which parameters take no weight decay."""

from torch import nn


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that take no weight decay besides the 1-D ones.

    Modules declare their own as ``no_decay``. A_log is among them as in Mamba; the official vision repositories
    mark it but their optimizers never read the mark.
    """
    modules = ((f"{prefix}." if prefix else "", module) for prefix, module in model.named_modules())
    return {
        prefix + name
        for prefix, module in modules
        for name in getattr(module, "no_decay", ())
        if getattr(module, name) is not None
    }
