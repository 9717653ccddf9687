"""Weights into a model: converted, adapted, held against it in full, and only then loaded.

Every way into a model leads through :func:`fit` and :func:`load`: timm's ``pretrained=True``, OpenMMLab's ``init_cfg``
and ``load_from``, a teacher for distillation, and the converter.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbones.weights import sources
from backbones.weights.files import Grid, Weights, grid_in, grids_of, read, refuse_duplicates, select
from backbones.weights.rules import CheckpointError, KeyRule, enumerate_names, to_ours

_logger = logging.getLogger(__name__)

# Around the backbone of a detector: OpenMMLab's name for it, then our DenseBackbone, or the pyramid of detectron2.
_AROUND = ("backbone.", "model.", "net.")
_BESIDE = ("out_norms.", "head.fc.")


def load_pretrained(
    model: Any,
    cfg: Mapping[str, Any],
    variant: str,
    headless: bool = False,
    cache_dir: str | None = None,
    img_size: Grid | None = None,
) -> None:
    """Loads the weights that ``cfg`` points to, in the official layout or in ours; all or nothing.

    A first convolution for another number of channels is adapted as timm does. A classifier of another size
    keeps its fresh initialisation, and that is logged. With ``headless`` the classifier does not matter, and the
    file may lack what else stands behind the features.

    Args:
        model: a :class:`backbones.base.Backbone`.
        cfg: fields of timm's ``PretrainedCfg``.
        variant: registered name, for messages.
        headless: only features are wanted.
        cache_dir: where downloads are kept.
        img_size: height and width of the images that the weights were made for, where known.

    Raises:
        CheckpointError: no source of weights is known, or its weights do not fit; every key is named.
    """
    if cfg.get("state_dict"):
        weights = select(cfg["state_dict"], "state_dict", model.weight_keys)
    else:
        hint = f'timm.create_model("{variant}", pretrained=True, pretrained_cfg_overlay=dict(file=PATH)) loads a file'
        weights = read(sources.fetch(cfg, variant, hint, cache_dir), model.weight_keys)
    weights = fit(weights, model, cfg, img_size)
    _adapt_first_conv(weights, cfg, model.in_chans)
    own = model.state_dict()
    ignore = absent_head(weights, model, cfg) if headless else []
    for name in as_tuple(cfg["classifier"]):
        given, expected = (len(x.get(f"{name}.weight", ())) for x in (weights, own))
        if headless or given not in (0, expected):
            ignore.append(name)
        if not headless and given not in (0, expected) and expected:
            text = "%s: %s starts from random weights: the file has %d classes, the model %d"
            _logger.warning(text, variant, name, given, expected)
    load(model, weights, ignore)


def fit(weights: Weights, model: Any, cfg: Mapping[str, Any], img_size: Grid | None = None) -> Weights:
    """``weights`` with our names and layouts, adapted to the input size of ``model``; nothing is loaded.

    Args:
        weights: in the official layout of the model's family, or in ours.
        model: a :class:`backbones.base.Backbone`.
        cfg: its pretrained configuration, with the size of the images that official files were made for.
        img_size: that of ``weights``, where known.

    Raises:
        CheckpointError: a tensor has another shape than its layout, or the grid of a position embedding is unknown.
    """
    ours = Weights(to_ours(weights, model.key_rules), weights.grids)
    if img_size is None and ours.keys() != weights.keys():
        img_size = (cfg["input_size"][1], cfg["input_size"][2])
    return model.adapt_state_dict(ours, img_size)


def load(
    model: nn.Module, weights: Mapping[str, Tensor], ignore: Sequence[str] = (), optional: Collection[str] = ()
) -> list[str]:
    """Loads ``weights`` into ``model``, or raises and leaves it as it was; arguments as in :func:`check`.

    Returns:
        The names of the weights that keep their present value.
    """
    check(weights, model, ignore, optional)
    own = model.state_dict()
    fitting = {name: x for name, x in weights.items() if name in own and own[name].shape == x.shape}
    model.load_state_dict({**own, **fitting})
    return sorted(own.keys() - fitting.keys())


def check(
    weights: Mapping[str, Tensor], model: nn.Module, ignore: Sequence[str] = (), optional: Collection[str] = ()
) -> None:
    """Raises :class:`CheckpointError` and names every weight that does not fit.

    Weights may be missing, unknown, of another shape, grid or type, or not finite in the type of the model.

    Args:
        weights: in our layout.
        model: the model that is to load them; it is not changed.
        ignore: modules whose weights may be missing, unknown or misshapen, such as a classifier for another number
            of classes.
        optional: names that may be missing.
    """
    own = model.state_dict()

    def names(these: Iterable[str]) -> list[str]:
        return sorted(x for x in these if not x.startswith(tuple(f"{module}." for module in ignore)))

    problems = {
        "missing": names(own.keys() - weights.keys() - set(optional)),
        "unknown": names(weights.keys() - own.keys()),
        "misshapen": [
            f"{name} {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
            for name in names(own.keys() & weights.keys())
            if weights[name].shape != own[name].shape
        ],
        **_unlike(weights, own, getattr(weights, "grids", {})),
    }
    text = "; ".join(f"{what}: {enumerate_names(which)}" for what, which in problems.items() if which)
    if text:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; {text}")


class TakesOfficialLayout(nn.Module):
    """A module into which ``load_state_dict`` loads the authors' layout as strictly as ours, and so does timm."""

    key_rules: ClassVar[Sequence[KeyRule]] = ()  # official names and layouts, see backbones.weights.rules

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        accept(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def accept(model: Any, state_dict: MutableMapping[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """The first step of ``model.load_state_dict``: turns official names and layouts into ours, in place.

    PyTorch's own check of names and shapes follows. Our own names stay untouched.

    Args:
        model: a :class:`backbones.base.Backbone`.
        state_dict: weights of ``model`` under ``prefix``, and of other modules.
        prefix: where ``model`` stands in the module that loads.
        metadata: of ``model``, as its ``state_dict`` saved it.

    Raises:
        CheckpointError: weights of another type or grid, or that are not finite, or one that stands there twice.
    """
    own = model.state_dict()
    given = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
    foreign = {
        name: x
        for name, x in given.items()
        if isinstance(x, Tensor) and (name not in own or getattr(own[name], "shape", x.shape) != x.shape)
    }
    converted = to_ours(foreign, model.key_rules)
    if any(foreign.get(name) is not x for name, x in converted.items()) or len(converted) < len(foreign):
        if twice := sorted(converted.keys() & (given.keys() - foreign.keys()) & own.keys()):
            raise CheckpointError(f"the weights hold these in two layouts: {enumerate_names(twice)}")
        for name in foreign:
            del state_dict[prefix + name]
        state_dict.update({prefix + name: x for name, x in converted.items()})
        given = {name: x for name, x in given.items() if name not in foreign} | converted
    grid = grid_in(metadata)
    grids = {"pos_embed": grid} if grid else {}
    text = "; ".join(f"{what}: {enumerate_names(which)}" for what, which in _unlike(given, own, grids).items() if which)
    if text:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; {text}")


def inside_backbone(names: Iterable[str]) -> dict[str, str]:
    """The names of a detector's or segmentor's backbone without the prefixes around it, and what each is in the file.

    Other files have all their names. The norms of our dense models' outputs stay, and the classifier that OpenMMLab's
    classifiers have beside their backbone.

    Raises:
        CheckpointError: two names stand for one weight.
    """
    inside = {name: name for name in names}
    for prefix in _AROUND:
        part = {name.removeprefix(prefix): whole for name, whole in inside.items() if name.startswith(prefix)}
        if part:
            both = {whole: own for own, whole in part.items()} | {inside[name]: name for name in part if name in inside}
            refuse_duplicates(both)
            inside = part | {name: whole for name, whole in inside.items() if name.startswith(_BESIDE)}
    return inside


def absent_head(weights: Mapping[str, Tensor], model: Any, cfg: Mapping[str, Any]) -> list[str]:
    """The modules of ``model`` behind its features of which ``weights``, in our layout, hold nothing."""
    modules = (*model.head_modules, *as_tuple(cfg["classifier"]))
    return [module for module in modules if not any(name.startswith(f"{module}.") for name in weights)]


def as_tuple(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """The module names in a field of a pretrained configuration."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _unlike(weights: Mapping[str, Any], own: Mapping[str, Any], grids: Mapping[str, Grid]) -> dict[str, list[str]]:
    """Weights that have the right name and shape, and still are not what the model has."""
    expected = grids_of(own)
    pairs = {
        name: (x, own[name])
        for name, x in weights.items()
        if name in own and isinstance(x, Tensor) and isinstance(own[name], Tensor) and x.shape == own[name].shape
    }
    other_type = [name for name, (x, like) in pairs.items() if not _same_kind(x, like)]
    return {
        "of another grid": [
            f"{name} {grid[0]} x {grid[1]}, expected {expected[name][0]} x {expected[name][1]}"
            for name, grid in grids.items()
            if name in pairs and name in expected and grid != expected[name]
        ],
        "of another type": [f"{name} {_type(pairs[name][0])}, expected {_type(pairs[name][1])}" for name in other_type],
        "these are not finite": [
            name
            for name, (x, like) in pairs.items()
            if name not in other_type and like.is_floating_point() and not x.is_meta
            if not x.to(like.dtype).isfinite().all()
        ],
    }


def _same_kind(x: Tensor, like: Tensor) -> bool:
    """Whether values of ``x`` may become those of ``like``: floats of any width, and whole numbers of any type."""
    if like.is_floating_point() or like.is_complex():
        return x.is_floating_point() == like.is_floating_point() and x.is_complex() == like.is_complex()
    return x.dtype == like.dtype or x.is_meta or (not x.is_complex() and bool((x.to(like.dtype) == x).all()))


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _adapt_first_conv(weights: Weights, cfg: Mapping[str, Any], in_chans: int) -> None:
    for name in as_tuple(cfg["first_conv"]):
        weight = weights.get(f"{name}.weight")
        if weight is not None and weight.dim() == 4 and weight.shape[1] == cfg["input_size"][0] != in_chans:
            # timm 1.0.22 knows three channels alone.
            source = {} if weight.shape[1] == 3 else {"base_chans": weight.shape[1]}
            weights[f"{name}.weight"] = adapt_input_conv(in_chans, weight, **source)
            _logger.info("%s adapted from %d to %d channels", name, weight.shape[1], in_chans)
