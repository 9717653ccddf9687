"""From a registered name to a model: timm's ``build_model_with_cfg`` with our own, strict way of loading weights."""

from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from backbones.base.contract import Backbone
from backbones.layers.scan import Scan, set_backend
from backbones.weights.loading import load_pretrained


def build_model(
    model_cls: type[Backbone],
    variant: str,
    pretrained: bool,
    *,
    scan: Scan,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model as timm does, ``features_only`` included.

    Weights are read by :mod:`backbones.weights`: timm would prefer averaged weights where the published
    ones are the plain ones, and would stop checking names as soon as the number of classes differs.

    Args:
        model_cls: class of the model, called with its ``defaults`` and ``kwargs``.
        variant: registered name.
        pretrained: load the weights that the pretrained configuration points to.
        scan: how the mixers scan; every other operator of the model runs on its backend, too.
        pretrained_cfg: as in timm.
        pretrained_cfg_overlay: as in timm; ``dict(file=path)`` loads a local file in the official layout or
            in ours.
        cache_dir: where downloads are kept.
        kwargs: arguments of the model, and timm's ``features_only``, ``out_indices`` and ``feature_cls``.

    Raises:
        ValueError: ``num_classes`` is negative.
    """
    if (classes := kwargs.get("num_classes")) is not None and classes < 0:
        raise ValueError(f"num_classes: got {classes}, expected at least 1, or 0 for no classifier")
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    features_only = kwargs.get("features_only", False)
    # The registered size is that of the published weights, which a file need not be.
    stated = cfg.source in ("hf-hub", "local-dir") or "input_size" in (pretrained_cfg_overlay or {})
    saved = kwargs.get("pretrained_model_args") or {}  # of a model that timm saved
    img_size = to_2tuple(saved.get("img_size") or cfg.input_size[-2:]) if stated else None

    def construct(**model_kwargs: Any) -> Backbone:
        model = model_cls(**model_kwargs)
        set_backend(model, scan.backend)
        if pretrained:
            # to_dict() copies a state dict without the grids that it tells.
            fields = {**cfg.to_dict(), "state_dict": cfg.state_dict}
            load_pretrained(model, fields, variant, features_only, cache_dir, img_size)
        return model

    return build_model_with_cfg(
        construct,
        variant,
        pretrained=False,
        pretrained_cfg=cfg.to_dict(),
        feature_cfg={"out_indices": model_cls.feature_indices, "feature_cls": "getter"},
        **{**model_cls.defaults, **kwargs},
    )
