"""Which layers a pruner of channels may not touch."""

from typing import Any

from torch import nn


def unprunable(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model`` whose output channels have to stay, for a pruner such as torch-pruning's.

    A scan's parameters share its channels, heads of attention are equally wide, and patch merging puts four tokens side
    by side: a pruner that follows autograd's graph sees none of it. Such modules declare as ``prunable`` those of their
    layers that it may prune all the same, such as the projection from a scan back to the stream. The rest of them is
    returned here, with the classifiers::

        pruner = torch_pruning.pruner.MagnitudePruner(model, images, importance, ignored_layers=unprunable(model))

    Rotary embeddings turn channels in pairs, so models that have them keep all. A pruned model computes with the
    channels that are left; its ``feature_info`` and ``num_features`` still tell the registered widths.
    """
    kept: dict[nn.Module, None] = {}
    for module in model.modules():
        names = getattr(module, "prunable", None)
        if names is not None:
            free = {part for name in names for part in module.get_submodule(name).modules()}
            # A pruner also leaves alone what is inside of the modules that it is given.
            kept.update((part, None) for part in module.modules() if free.isdisjoint(part.modules()))
    find: Any = getattr(model, "get_classifier", tuple)
    classifiers = find()
    kept.update(dict.fromkeys(classifiers if isinstance(classifiers, tuple) else (classifiers,)))
    return list(kept)
