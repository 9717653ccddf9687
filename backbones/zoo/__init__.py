"""The one source of every published or measured fact about a model, a YAML file for each family.

What the authors *reported* and what we *measured* are separate fields. A fact that is not known is absent.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

# Fields of a family's file and of each of its models: name, then whether it must be there.
_FAMILY = {
    "family": True,
    "title": True,
    "paper": True,
    "repository": True,
    "license": True,
    "input": True,
    "first_conv": True,
    "classifier": True,
    "notes": False,
    "recipe": False,
    "models": True,
}
_MODEL = {
    "parameters": True,
    "weights": False,
    "reported": False,
    "measured": False,
    "input": False,
    "first_conv": False,
    "notes": False,
}
_WEIGHTS = {"url", "hf_hub_id", "hf_hub_filename", "page", "notes"}


@lru_cache
def load_family(name: str) -> dict[str, Any]:
    """The checked content of ``<name>.yml``; do not modify it.

    Raises:
        ValueError: a field is unknown or missing; the message names it.
    """
    content = yaml.safe_load(files(__package__).joinpath(f"{name}.yml").read_text(encoding="utf-8"))
    _check(f"{name}.yml", content, _FAMILY)
    for model, facts in content["models"].items():
        _check(f"{name}.yml, {model}", facts, _MODEL)
        _check(f"{name}.yml, weights of {model}", facts.get("weights", {}), dict.fromkeys(_WEIGHTS, False))
    return content


def default_cfgs(name: str) -> dict[str, Any]:
    """timm's pretrained configurations of a family's models, for ``generate_default_cfgs``."""
    family = load_family(name)
    return {model: _cfg(family, facts) for model, facts in family["models"].items()}


def _cfg(family: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    source = family["input"] | facts.get("input", {})
    weights = facts.get("weights", {})
    size = source["size"]
    cfg = {
        "url": weights.get("url") or weights.get("page"),
        "hf_hub_id": weights.get("hf_hub_id"),
        "hf_hub_filename": weights.get("hf_hub_filename"),
        "input_size": (3, size, size),
        "fixed_input_size": source.get("fixed", False),
        "mean": tuple(source["mean"]),
        "std": tuple(source["std"]),
        "interpolation": source["interpolation"],
        "crop_pct": source["crop_pct"],
        "num_classes": 1000,
        "first_conv": facts.get("first_conv", family["first_conv"]),
        "classifier": family["classifier"],
        "license": family["license"]["weights"],
        "origin_url": family["repository"]["url"],
        "paper_name": family["paper"]["title"],
        "paper_ids": f"arXiv:{family['paper']['arxiv']}" if "arxiv" in family["paper"] else None,
    }
    return {field: value for field, value in cfg.items() if value is not None or field in ("first_conv", "classifier")}


def _check(where: str, content: dict[str, Any], fields: dict[str, bool]) -> None:
    unknown = sorted(content.keys() - fields.keys())
    missing = sorted(field for field, needed in fields.items() if needed and field not in content)
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}")
