"""The zoo's facts as the cells of tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import timm

from backbones import zoo
from backbones.base import PlainBackbone
from backbones.models import FAMILIES, GUESTS, family_names

from .markdown import enumerated, table

Facts = dict[str, Any]


def families() -> tuple[str, ...]:
    """Names of the zoo's files: plain models first, then by age, and timm's own last."""
    return family_names(guests=True)


def type_list() -> str:
    """Names of the dense backbones for OpenMMLab, and which of them need a neck that makes their pyramid."""
    names = [f"`{family.__name__}`" for family in (*FAMILIES, *GUESTS)]
    plain = [f"`{family.__name__}`" for family in FAMILIES if issubclass(family, PlainBackbone)]
    return (
        f"The types are {enumerated(names)}. The maps of {enumerated(plain)} all have the same stride; "
        'for detection, add `neck=dict(type="SimpleFeaturePyramid", ...)`.'
    )


def models(family: str) -> Iterator[tuple[str, Facts]]:
    """Names and facts of a family's architectures."""
    yield from zoo.load_family(family)["models"].items()


def aliases(family: str) -> dict[str, str]:
    """Further names of an architecture, and the name that its facts stand under."""
    return zoo.load_family(family).get("aliases", {})


@cache
def skeleton(name: str) -> Any:
    """The model without weights."""
    return timm.create_model(name, device="meta")


def millions(count: int) -> str:
    """7148008 to 7.1."""
    return f"{count / 1e6:.1f}"


def giga(operations: float) -> str:
    """4876000000 to 4.88."""
    return f"{operations / 1e9:.2f}"


def weights_link(facts: Facts) -> str:
    """Where the authors' weights are, as a link that says whether they can be downloaded."""
    given = facts.get("weights", {})
    if "hf_hub_id" in given:
        return f"[Hub](https://huggingface.co/{given['hf_hub_id']})"
    if "url" in given:
        return f"[release]({given['url']})"
    return f"[by hand]({given['page']})" if "page" in given else "none"


def dense_result(rows: list[Facts], method: str, *fields: str) -> str | None:
    """The first result of a method, as "47.3 / 42.7"."""
    row = zoo.dense_result(rows, method)
    return None if row is None else " / ".join(f"{row[field]:.1f}" for field in fields if field in row)


def model_table() -> str:
    """The README's table: for every architecture its cost as counted here, and two of its authors' figures."""
    rows = []
    for family, name, facts in _architectures(""):
        reported = facts.get("reported", {})
        box_ap = dense_result(reported.get("coco", []), "Mask R-CNN", "box_ap")
        rows.append([family, *_cost(name, facts), reported.get("imagenet", {}).get("top1"), box_ap])
    return table(["family", "model", "M", "G", "top-1", "box AP"], rows)


def full_model_table(prefix: str) -> str:
    """Every architecture with all tasks and its weights; ``prefix`` leads to the cards."""
    rows = []
    for family, name, facts in _architectures(prefix):
        reported = facts.get("reported", {})
        rows.append(
            [
                family,
                *_cost(name, facts),
                reported.get("imagenet", {}).get("top1"),
                dense_result(reported.get("coco", []), "Mask R-CNN", "box_ap", "mask_ap"),
                dense_result(reported.get("ade20k", []), "UPerNet", "miou"),
                weights_link(facts),
            ]
        )
    header = ["family", "model", "M", "G", "top-1", "COCO box / mask AP", "ADE20K mIoU", "weights"]
    return table(header, rows)


def channel_table() -> str:
    """The maps of every architecture as a dense backbone: their strides and widths, models of equal ones in a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for family, module in zip((*FAMILIES, *GUESTS), families(), strict=True):
        for name, _ in models(module):
            info = family.create(name, device="meta").feature_info
            plain = issubclass(family, PlainBackbone)
            widths, strides = ([x[key] for x in (info[-1:] if plain else info)] for key in ("num_chs", "reduction"))
            given = str(widths[0]) if plain else str(widths)
            key = (f"`{family.__name__}`", ", ".join(map(str, strides)), f"`{given}`")
            rows.setdefault(key, []).append(f"`{name}`")
    cells = [[kind, ", ".join(names), strides, widths] for (kind, strides, widths), names in rows.items()]
    return table(["type", "arch", "strides", "in_channels"], cells)


def _architectures(prefix: str) -> Iterator[tuple[str | None, str, Facts]]:
    """Every architecture: a link to its card where its family begins, its name, and its facts."""
    for family in families():
        link = f"[{zoo.load_family(family)['title']}]({prefix}model_cards/{family}.md)"
        for i, (name, facts) in enumerate(models(family)):
            yield None if i else link, name, facts


def _cost(name: str, facts: Facts) -> list[str]:
    flops = zoo.load_measured()["models"][name]["compute"]["flops"]
    return [f"`{name}`", millions(facts["parameters"]), giga(flops)]


def twin(family: str, name: str) -> str | None:
    """A recorded model that is built of the same classes."""
    measured = zoo.load_measured()["models"]
    for other, _ in models(family):
        if measured[other]["parity"] and type(skeleton(other)) is type(skeleton(name)):
            return other
    return None
