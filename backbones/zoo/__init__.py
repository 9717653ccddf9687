"""The one source of every published or measured fact about a model.

``<family>.yml`` holds what the authors *reported*, with its source, and what we know about their files;
``measured.yml`` what this library computes, written by ``tools/certify.py``. A fact that is not known is
absent. README, model cards and OpenMMLab's metafiles are generated from both (``make docs``).
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Fields that no configuration of timm's needs, with the lines below them: four fifths of what there is to parse.
_FOR_CARDS = re.compile(
    r"^( *)(?:summary|layout|scan|diagram|use|notes|recipe|stages|reported):.*\n(?:\1[ -].*\n|\n)*", re.MULTILINE
)
_NUMBER = (int, float)
_WEIGHTS = {"url?": str, "hf_hub_id?": str, "hf_hub_filename?": str, "page?": str, "notes?": str}
_SETTINGS = {
    "epochs?": int,
    "batch_size?": int,
    "optimizer?": str,
    "betas?": [float],
    "learning_rate?": float,
    "warmup_epochs?": int,
    "warmup_learning_rate?": float,
    "minimum_learning_rate?": float,
    "cooldown_epochs?": int,
    "weight_decay?": float,
    "drop_path_rate?": float,
    "clip_grad?": float,
    "label_smoothing?": float,
    "mixup?": float,
    "cutmix?": float,
    "random_erasing?": float,
    "color_jitter?": float,
    "auto_augment?": str,
    "repeated_augmentation?": int,
    "ema_decay?": float,
    "mixed_precision?": bool,
    "distillation?": str,
    "self_distillation?": str,
    "self_distillation_weight?": float,
    "source": str,
}
_STAGE = {"input_size": int} | {field: kind for field, kind in _SETTINGS.items() if field != "source"}
_DENSE = {"method": str, "schedule": str, "params_m?": _NUMBER, "gflops?": _NUMBER, "source": str, "weights?": str}
_COCO = {
    **_DENSE,
    "box_ap": float,
    **{f"{name}?": float for name in ("box_ap50", "box_ap75", "box_aps", "box_apm", "box_apl")},
    **{f"{name}?": float for name in ("mask_ap", "mask_ap50", "mask_ap75")},
}
_REPORTED = {
    "imagenet?": {"top1": float, "top5?": float, "params_m?": _NUMBER, "gflops?": _NUMBER, "source": str},
    "imagenet_log?": {"top1": float, "epoch": int, "source": str},
    "throughput?": {"images_per_second": int, "training": int, "device": str, "batch_size": int, "source": str},
    "training?": _SETTINGS,
    "coco?": [_COCO],
    "ade20k?": [{**_DENSE, "miou": float, "miou_ms?": float, "iteration?": int}],
}
_INPUT = {
    "size": int,
    "fixed?": bool,
    "mean": [float],
    "std": [float],
    "interpolation": str,
    "crop_pct": float,
}
_MODEL = {
    "parameters": int,
    "size?": int,
    "weights?": _WEIGHTS,
    "reported?": _REPORTED,
    "first_conv?": str,
    "notes?": [str],
}
_FAMILY = {
    "family": str,
    "title": str,
    "summary": str,
    "paper": {"title": str, "authors": [str], "arxiv": str, "venue": str, "year": int},
    "repository": {"url": str, "commit": str},
    "implementation?": str,
    "license": {"code": str, "weights": str},
    "input": _INPUT,
    "first_conv": str,
    "classifier": (str, list),
    "layout": str,
    "scan": [{"pattern": str, "caption": str}],
    "diagram": str,
    "use": {"purpose": str, "limits": [str]},
    "notes": [str],
    "recipe": _SETTINGS,
    "stages?": [_STAGE],
    "aliases?": dict,
    "models": dict,
}
_MEASURED = {
    "compute": {"size": int, "flops": int, "scan": int, "activations": int},
    "parity": [
        {
            "recording": str,
            "input": [int],
            "logits_max_error": float,
            "logits_relative_rms": float,
            "gradient_max_error?": float,
            "backend": str,
        }
    ],
}
_RUN = {"command": str, "date": str, "commit": str, "torch": str, "device": str}


@lru_cache
def load_family(name: str) -> dict[str, Any]:
    """The checked content of ``<name>.yml``; do not modify it.

    Raises:
        ValueError: a field is unknown, missing or of another type; the message names it.
    """
    content = _load(f"{name}.yml")
    _check(f"{name}.yml", content, _FAMILY)
    for model, facts in content["models"].items():
        _check(f"{name}.yml, {model}", facts, _MODEL)
    for alias, model in content.get("aliases", {}).items():
        if model not in content["models"]:
            raise ValueError(f"{name}.yml, aliases: {alias!r} stands for {model!r}, which is not among the models")
    return content


@lru_cache
def load_measured() -> dict[str, Any]:
    """The checked content of ``measured.yml``: how each family was measured (``runs``), and ``models`` by name.

    Raises:
        ValueError: a field is unknown, missing or of another type; the message names it.
    """
    content = _load("measured.yml")
    _check("measured.yml", content, {"runs": dict, "models": dict})
    for family, run in content["runs"].items():
        _check(f"measured.yml, {family}", run, _RUN)
    for model, facts in content["models"].items():
        _check(f"measured.yml, {model}", facts, _MEASURED)
    return content


def default_cfgs(name: str) -> dict[str, Any]:
    """timm's pretrained configurations of a family's models, for ``generate_default_cfgs``.

    Importing the package calls this for every family, so it parses what it needs and checks nothing.
    """
    family = _parse(_FOR_CARDS.sub("", _read(f"{name}.yml")))
    cfgs = {model: _cfg(family, facts) for model, facts in family["models"].items()}
    return cfgs | {alias: cfgs[model] for alias, model in family.get("aliases", {}).items()}


def dense_result(rows: list[dict[str, Any]], method: str) -> dict[str, Any] | None:
    """The first result that authors report for COCO or ADE20K with this method and its usual schedule."""
    return next((x for x in rows if x["method"] == method and x["schedule"] in ("1x", "160k", "not stated")), None)


def _cfg(family: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    source = family["input"]
    weights = facts.get("weights", {})
    size = facts.get("size", source["size"])
    cfg = {
        "url": weights.get("url") or weights.get("page"),
        "hf_hub_id": weights.get("hf_hub_id"),
        "hf_hub_filename": weights.get("hf_hub_filename"),
        "input_size": (3, size, size),
        "fixed_input_size": source.get("fixed", False),
        "pool_size": None if source.get("fixed") else (-(-size // 32),) * 2,  # of a hierarchy's last map
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
        "paper_ids": f"arXiv:{family['paper']['arxiv']}",
    }
    return {field: value for field, value in cfg.items() if value is not None or field in ("first_conv", "classifier")}


def _load(name: str) -> Any:
    return _parse(_read(name))


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_LOADER)


def _check(where: str, content: Any, schema: Any) -> None:
    """Compares with a type, a list of one schema, or a dict of fields; a name with ``?`` may be absent."""
    if isinstance(schema, list):
        _check(where, content, list)
        for item in content:
            _check(where, item, schema[0])
    elif isinstance(schema, dict):
        _check(where, content, dict)
        fields = {name.rstrip("?"): inner for name, inner in schema.items()}
        unknown = sorted(content.keys() - fields.keys())
        missing = sorted(name for name in schema if not name.endswith("?") and name not in content)
        if unknown or missing:
            raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}")
        for name, value in content.items():
            _check(f"{where}, {name}", value, fields[name])
    elif not isinstance(content, schema):
        raise ValueError(f"{where}: got {content!r}, expected {schema}")
