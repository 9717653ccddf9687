"""Weights of unknown origin into ours: which model they belong to, and which of them it takes.

A file may hold a classifier in the official layout or in ours, or a detector or segmentor with a backbone of ours or of
the authors inside. Nothing but names and shapes decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import timm
from torch import Tensor, nn

from backbones.models import family_names
from backbones.weights import CheckpointError, StateDict, loading, rules

# Around the backbone of a detector: OpenMMLab's name for it, then our DenseBackbone, or the pyramid of detectron2.
_OF_BACKBONE = ("backbone.", "model.", "net.")
_OUTPUT_NORM = re.compile(r"(?:outnorm_?|out_norms\.|out_map_)(\d+)\.(.+)")


@dataclass(frozen=True)
class Converted:
    """Weights in our layout, with what ``timm.create_model`` must be told to load them."""

    model: str
    arguments: dict[str, Any]
    weights: StateDict
    dropped: tuple[str, ...]


def model_names() -> list[str]:
    """The registered models, without second names."""
    names = [name for module in family_names() for name in timm.list_models(module=module)]
    return [name for name in names if _on_meta(name).pretrained_cfg["architecture"] == name]


def identify(weights: Mapping[str, Tensor]) -> str:
    """The registered model that ``weights`` (see :func:`backbones.weights.files.read`) belong to.

    Raises:
        CheckpointError: they resemble no model, or several alike.
    """
    weights = {name: weights[whole].to("meta") for name, whole in _of_backbone(weights).items()}
    distances: dict[str, int] = {}
    for name in model_names():
        try:
            given = _shapes(rules.convert(weights, _on_meta(name).key_rules)[0])
        except CheckpointError:  # tensors that stand for another layout's
            continue
        expected = _expected(name)
        if 2 * len(given & expected) > len(expected):
            distances[name] = len(given ^ expected)
    if not distances:
        first = ", ".join(list(weights)[:4])
        raise CheckpointError(f"belongs to no model of this library; its {len(weights)} names begin with {first}")
    nearest = [name for name, distance in distances.items() if distance == min(distances.values())]
    if len(nearest) > 1:
        raise CheckpointError(f"fits {' and '.join(nearest)} alike; say which")
    return nearest[0]


def convert(weights: Mapping[str, Tensor], model: str | None = None) -> Converted:
    """``weights`` (see :func:`backbones.weights.files.read`) in our layout, held against the architecture in full.

    Another number of classes or channels, another image size of a plain model, a missing class token, classifier or
    second classifier become arguments of the model. Of a detector the backbone stays; the norm of its last output is
    the final norm of a hierarchical model.

    Args:
        weights: names and tensors, in the official layout or in ours.
        model: registered name; None finds it.

    Raises:
        CheckpointError: no model is recognised, or names or shapes do not fit; every one is named.
    """
    name = model or identify(weights)
    inside, reference = _of_backbone(weights), _on_meta(name)
    ours, by_rule = rules.convert({own: weights[whole] for own, whole in inside.items()}, reference.key_rules)
    ours, norms = _without_output_norms(ours, reference)
    arguments = _arguments(ours, reference)
    built = timm.create_model(name, device="meta", **{k: v for k, v in arguments.items() if k != "features_only"})
    try:
        loading.check(
            ours, built, loading.absent_head(ours, reference.pretrained_cfg) if "features_only" in arguments else ()
        )
    except CheckpointError as error:
        raise CheckpointError(f"held against {name}, {error}") from None
    around = sorted(weights.keys() - set(inside.values()))
    return Converted(name, arguments, ours, (*(inside[x] for x in (*by_rule, *norms)), *around))


@cache
def _on_meta(name: str) -> Any:
    return timm.create_model(name, device="meta")


@cache
def _expected(name: str) -> set[tuple[str, tuple[int, ...]]]:
    return _shapes(_on_meta(name).state_dict())


def _shapes(weights: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(x.shape)) for name, x in weights.items()}


def _of_backbone(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of a detector's backbone without the detector's prefixes, and what each is in the file."""
    inside = {name: name for name in weights}
    for prefix in _OF_BACKBONE:
        part = {name.removeprefix(prefix): whole for name, whole in inside.items() if name.startswith(prefix)}
        if part:
            inside = part | {name: whole for name, whole in inside.items() if _OUTPUT_NORM.fullmatch(name)}
    return inside


def _without_output_norms(weights: StateDict, model: nn.Module) -> tuple[StateDict, list[str]]:
    """Leaves out the norms of a dense backbone's outputs, but for the one that is the model's own final norm."""
    expected = model.state_dict()
    last = str(len(cast(Any, model).feature_info) - 1)
    hierarchical = hasattr(model, "stages")
    kept: StateDict = {}
    dropped = []
    for name, x in weights.items():
        match = _OUTPUT_NORM.fullmatch(name)
        if match is None:
            kept[name] = x
            continue
        final = next((own for own in (f"norm.{match[2]}", f"head.norm.{match[2]}") if own in expected), "")
        if hierarchical and match[1] == last and final and final not in weights:
            kept[final] = x
        else:
            dropped.append(name)
    return kept, dropped


def _arguments(weights: StateDict, model: Any) -> dict[str, Any]:
    """What a model that takes these weights has to be told."""
    cfg, own = model.pretrained_cfg, model.state_dict()
    arguments: dict[str, Any] = {}
    first, *more = loading.as_tuple(cfg["classifier"])
    classifier = f"{first}.weight"
    if classifier not in weights:
        lacking = {*loading.absent_head(weights, cfg)} - {*loading.absent_head(own, cfg), first, *more}
        arguments |= {"features_only": True} if lacking else {"num_classes": 0}
    elif weights[classifier].dim() == 2 and len(weights[classifier]) != len(own[classifier]):
        arguments["num_classes"] = len(weights[classifier])
    if classifier in weights and more and f"{more[0]}.weight" not in weights:
        arguments["distillation"] = False
    stem = f"{loading.as_tuple(cfg['first_conv'])[0]}.weight"
    if stem in weights and weights[stem].dim() == 4 and weights[stem].shape[1] != own[stem].shape[1]:
        arguments["in_chans"] = weights[stem].shape[1]
    if "cls_token" in own and "cls_token" not in weights:
        arguments |= {"class_token": False, "global_pool": "avg"}
    if "pos_embed" in own and "pos_embed" in weights and weights["pos_embed"].dim() == 3:
        cells = weights["pos_embed"].shape[1] - ("cls_token" in weights)
        side = math.isqrt(max(cells, 0))
        size = (side - 1) * model.patch_embed.stride + model.patch_embed.patch_size
        if side * side == cells and size != model.img_size[0]:
            arguments["img_size"] = size
    return arguments


def load_call(converted: Converted, path: str) -> str:
    """The Python expression that loads the converted file."""
    more: Sequence[str] = [f", {name}={value!r}" for name, value in converted.arguments.items()]
    return (
        f'timm.create_model("{converted.model}", pretrained=True, pretrained_cfg_overlay=dict(file="{path}")'
        f"{''.join(more)})"
    )
