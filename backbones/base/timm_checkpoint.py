"""The way into a model through timm's ``load_checkpoint``, which ``create_model(checkpoint_path=)`` calls.

Before a model sees the weights, timm drops a second name for the same weight, and the grid of a position embedding.
No method of a model could tell. So importing this package puts the functions below in the place of timm's of the same
names. Models of others still reach timm's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import _factory, _features, _helpers
from torch import nn

from backbones.base.contract import Backbone
from backbones.weights import loading
from backbones.weights.files import load as load_file
from backbones.weights.files import select
from backbones.weights.rules import CheckpointError

_timms, _timms_resume = _helpers.load_checkpoint, _helpers.resume_checkpoint
_AVERAGED = ("state_dict_ema", "model_ema")  # what timm takes first


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | Path,
    use_ema: bool = True,
    device: str | torch.device = "cpu",
    strict: bool = True,
    remap: bool = False,
    filter_fn: Callable[..., Any] | None = None,
    weights_only: bool = True,
) -> Any:
    """timm's function; a file for a model of ours, in its official layout or in ours, is read and checked in full.

    Position embeddings of another grid are resampled, as with ``pretrained=True``. The classifier must fit.

    Args:
        model: any model.
        checkpoint_path: a ``.safetensors`` file or a PyTorch checkpoint.
        use_ema: take averaged weights where the file has some.
        device: where the weights are read to.
        strict: as in timm; every weight must be there, and none besides.
        remap: timm's loading by position instead of names.
        filter_fn: timm's function from weights and model to weights.
        weights_only: False has timm run what code the file holds.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit a model of ours; they are named.
    """
    path = Path(checkpoint_path)
    as_timm = partial(
        _timms, model, str(path), use_ema, device, strict, remap=remap, filter_fn=filter_fn, weights_only=weights_only
    )
    left_to_timm = remap or filter_fn is not None or not weights_only or path.suffix in (".npz", ".npy")
    if isinstance(model, _features.FeatureGetterNet) and isinstance(model.model, Backbone):
        try:
            return as_timm()
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: expected the weights of this part of a model, which features_only=True built; "
                "pretrained=True with pretrained_cfg_overlay=dict(file=PATH) loads those of a whole model into it"
            ) from error
    if left_to_timm or not isinstance(model, Backbone):
        return as_timm()
    plain = [key for key in model.weight_keys if key not in _AVERAGED]
    keys = (*_AVERAGED, *plain) if use_ema else (*plain, *_AVERAGED)
    weights = loading.fit(select(load_file(path, device), path, keys), model, model.pretrained_cfg)
    if strict:
        loading.check(weights, model)
    return model.load_state_dict(weights, strict=strict)


@wraps(_timms_resume)
def resume_checkpoint(model: nn.Module, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
    """timm's function; of a model of ours, a weight that the file holds twice is refused before anything is loaded."""
    if isinstance(model, Backbone):
        select(load_file(checkpoint_path), checkpoint_path, ("state_dict",))
    return _timms_resume(model, str(checkpoint_path), *args, **kwargs)


def install() -> None:
    """Puts these functions where timm's programs and ``create_model`` look for them."""
    for module in (timm.models, _factory, _helpers):
        for function in (load_checkpoint, resume_checkpoint):
            if function.__name__ in vars(module):
                vars(module)[function.__name__] = function
