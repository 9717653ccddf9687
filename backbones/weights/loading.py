"""Weights into a model: converted, adapted, held against it in full, and only then loaded."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.models import adapt_input_conv
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from backbones.weights.files import read
from backbones.weights.rules import CheckpointError, StateDict, enumerate_names, to_ours

_logger = logging.getLogger(__name__)

# Behind the features: the backbone of a detector has none of these.
_HEAD_MODULES = ("norm", "attn_pool", "head.norm", "head.class_block")


def check(state_dict: Mapping[str, Tensor], model: nn.Module, ignore: Sequence[str] = ()) -> None:
    """Raises :class:`CheckpointError` and names every missing, unknown and misshapen key.

    Args:
        state_dict: weights in our layout.
        model: the model that is to load them; it is not changed.
        ignore: modules whose weights may differ, such as a classifier for another number of classes.
    """
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    given = {name: tuple(x.shape) for name, x in state_dict.items()}

    def names(these: Iterable[str]) -> list[str]:
        return sorted(x for x in these if not x.startswith(tuple(f"{module}." for module in ignore)))

    problems = [
        f"{what}: {enumerate_names(keys)}"
        for what, keys in (
            ("missing", names(expected.keys() - given.keys())),
            ("unknown", names(given.keys() - expected.keys())),
            (
                "misshapen",
                [
                    f"{name} {given[name]}, expected {expected[name]}"
                    for name in names(expected.keys() & given.keys())
                    if given[name] != expected[name]
                ],
            ),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; " + "; ".join(problems))


def load_pretrained(
    model: Any, cfg: dict[str, Any], variant: str, headless: bool = False, cache_dir: str | None = None
) -> None:
    """Loads the weights that ``cfg`` points to, in the official layout or in ours; all or nothing.

    A first convolution for another number of channels is adapted as timm does. A classifier of another size
    keeps its fresh initialisation, and that is logged. With ``headless`` the classifier does not matter, and the
    file may lack what else stands behind the features.

    Raises:
        CheckpointError: no source of weights is known, or its weights do not fit; every key is named.
        FileNotFoundError: ``cfg["file"]`` does not exist.
    """
    state_dict = to_ours(_read(cfg, variant, model.weight_keys, cache_dir), model.key_rules)
    state_dict = model.adapt_state_dict(state_dict)
    _adapt_first_conv(state_dict, cfg, model.in_chans)
    own = model.state_dict()
    ignore = absent_head(state_dict, cfg) if headless else []
    for name in as_tuple(cfg["classifier"]):
        given, expected = (len(x.get(f"{name}.weight", ())) for x in (state_dict, own))
        if headless or given not in (0, expected):
            ignore.append(name)
        if not headless and given not in (0, expected) and expected:
            text = "%s: %s starts from random weights: the file has %d classes, the model %d"
            _logger.warning(text, variant, name, given, expected)
    check(state_dict, model, ignore)
    dropped = tuple(f"{name}." for name in ignore)
    kept = {name: x for name, x in state_dict.items() if not name.startswith(dropped)}
    model.load_state_dict(kept | {name: x for name, x in own.items() if name.startswith(dropped)})


def absent_head(state_dict: StateDict, cfg: dict[str, Any]) -> list[str]:
    """The modules behind the features of which ``state_dict``, in our layout, holds nothing."""
    modules = (*_HEAD_MODULES, *as_tuple(cfg["classifier"]))
    return [module for module in modules if not any(name.startswith(f"{module}.") for name in state_dict)]


def _read(cfg: dict[str, Any], variant: str, keys: Sequence[str], cache_dir: str | None) -> StateDict:
    if cfg.get("state_dict"):
        return cfg["state_dict"]
    return read(cfg.get("file") or _download(cfg, variant, cache_dir), keys)


def _download(cfg: dict[str, Any], variant: str, cache_dir: str | None) -> str:
    if cfg.get("hf_hub_id"):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(cfg["hf_hub_id"], cfg["hf_hub_filename"], cache_dir=cache_dir)
    url = cfg.get("url")
    call = f'timm.create_model("{variant}", pretrained=True, pretrained_cfg_overlay=dict(file=PATH))'
    if not url:
        origin = cfg.get("origin_url")
        raise CheckpointError(f"{variant}: its authors released no weights ({origin}); {call} loads a file")
    if "drive.google.com" in url:
        raise CheckpointError(f"{variant}: download its weights by hand from {url}; {call} loads the file")
    return download_cached_file(url, cache_dir=cache_dir)


def _adapt_first_conv(state_dict: StateDict, cfg: dict[str, Any], in_chans: int) -> None:
    for name in as_tuple(cfg["first_conv"]):
        weight = state_dict.get(f"{name}.weight")
        if weight is not None and weight.dim() == 4 and weight.shape[1] == cfg["input_size"][0] != in_chans:
            state_dict[f"{name}.weight"] = adapt_input_conv(in_chans, weight)
            _logger.info("%s adapted from %d to %d channels", name, weight.shape[1], in_chans)


def as_tuple(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """The module names in a field of a pretrained configuration."""
    return (names,) if isinstance(names, str) else tuple(names or ())
