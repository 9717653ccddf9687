"""One family's model card."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from backbones import zoo
from backbones.base import PlainBackbone

from .facts import Facts, aliases, giga, millions, models, skeleton, twin, weights_link
from .markdown import table

_IMPLEMENTATION = "This is an\nindependent implementation, [`{file}`](../{file}); none of the original's code is in it."
# The smallest model with published dense results, or just the smallest.
_EXAMPLES = {"vmamba": "vmamba_tiny_s1l8", "msvmamba": "msvmamba_tiny"}


def card(family: str) -> str:
    """The Markdown text of ``model_cards/<family>.md``."""
    facts = zoo.load_family(family)
    entries = dict(models(family))
    example = _EXAMPLES.get(family, next(iter(entries)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    file = f"backbones/models/{family}.py"
    size = facts["input"]["size"]
    text = environment.get_template("card.md.j2").render(
        module=family,
        family={"implementation": _IMPLEMENTATION.format(file=file), **facts},
        example=example,
        **_configs(facts["family"], example, entries[example].get("weights", {})),
        weights_sentence=_weights_sentence(entries),
        released=any("weights" in x for x in entries.values()),
        other_sizes=[(name, x["size"]) for name, x in entries.items() if x.get("size", size) != size],
        variants=_variants(entries),
        aliases=aliases(family),
        logs=[
            (name, x["reported"]["imagenet_log"])
            for name, x in entries.items()
            if "imagenet_log" in x.get("reported", {})
        ],
        coco=_dense(entries, "coco", ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")),
        ade20k=_dense(entries, "ade20k", ("miou", "miou_ms")),
        throughput=_throughput(entries),
        certificate=_certificate(family, entries),
        run=zoo.load_measured()["runs"][family],
        weight_notes=[(name, x["weights"]["notes"]) for name, x in entries.items() if "notes" in x.get("weights", {})],
        recipe=table(["setting", "value"], _settings(facts["recipe"])),
        recipes=_recipes(entries),
        stages=_stages(facts.get("stages", [])),
        model_notes=[(name, note) for name, x in entries.items() for note in x.get("notes", ())],
        key=facts["family"].lower(),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _configs(type_: str, example: str, weights: dict[str, str]) -> dict[str, Any]:
    """Backbone, neck and head of a detector and of a segmentor."""
    model = skeleton(example)
    checkpoint = "the_downloaded_file.pth" if "page" in weights else "published"
    init = f', init_cfg=dict(type="Pretrained", checkpoint="{checkpoint}")' if weights else ""
    backbone = f'dict(type="{type_}", arch="{example}", drop_path_rate=0.1{{}}{init})'
    if not isinstance(model, PlainBackbone):
        backbone = backbone.format("")
        channels = [info["num_chs"] for info in model.feature_info]
        # Detectors want strides from 4 on.
        finer = round(math.log2(model.feature_info[0]["reduction"] / 4))
        neck = (
            f'dict(type="FinerFPN", in_channels={channels}, finer={finer})'
            if finer
            else f"dict(in_channels={channels})"
        )
        indices = "" if len(channels) == 4 else f", in_index={list(range(len(channels)))}"
        return {
            "detection_base": "Mask R-CNN with a feature pyramid",
            "detection": {"backbone": backbone, "neck": neck},
            "segmentation_base": "UPerNet",
            "segmentation": {
                "backbone": backbone,
                "neck": None,
                "decode_head": f"dict(in_channels={channels}{indices})",
            },
        }
    width, last = model.num_features, len(model.blocks) - 1
    single = backbone.format(f", out_indices=({last},), out_norm=False")
    neck = f'dict(type="SimpleFeaturePyramid", in_channels={width}, out_channels=256, num_outs=5)'
    return {
        "detection_base": "Cascade Mask R-CNN with a simple feature pyramid",
        "detection": {"backbone": single, "neck": neck},
        "segmentation_base": "UPerNet",
        "segmentation": {
            "backbone": single,
            "neck": neck.replace("num_outs=5", "num_outs=4"),
            "decode_head": "dict(in_channels=[256] * 4)",
        },
    }


def _weights_sentence(entries: dict[str, Facts]) -> str:
    given = [facts["weights"] for facts in entries.values() if "weights" in facts]
    if not given:
        return "No weights were released."
    call = "`pretrained=True` downloads the authors' weights"
    if all("page" in x for x in given):
        return "The authors' weights must be fetched by hand; `pretrained=True` says where."
    return call + (" where they have a public address." if any("page" in x for x in given) else ".")


def _variants(entries: dict[str, Facts]) -> str:
    measured = zoo.load_measured()["models"]
    rows = []
    for name, facts in entries.items():
        compute = measured[name]["compute"]
        image = facts.get("reported", {}).get("imagenet", {})
        rows.append(
            [
                f"`{name}`",
                millions(facts["parameters"]),
                giga(compute["flops"]),
                giga(compute["scan"]),
                image.get("params_m"),
                image.get("gflops"),
                image.get("top1"),
                image.get("top5"),
                image.get("source"),
                weights_link(facts),
            ]
        )
    header = ["model", "measured M", "measured G", "of which scans", "reported M", "reported G"]
    header += ["reported top-1, %", "reported top-5, %", "source", "weights"]
    return _without_empty(header, rows)


def _dense(entries: dict[str, Facts], task: str, metrics: Sequence[str]) -> str:
    rows = [
        [
            f"`{name}`",
            row["method"],
            row["schedule"],
            *(row.get(metric) for metric in metrics),
            row.get("params_m"),
            row.get("gflops"),
            row.get("iteration"),
            f"[{row['source']}]({row['weights']})" if "weights" in row else row["source"],
        ]
        for name, facts in entries.items()
        for row in facts.get("reported", {}).get(task, ())
    ]
    titles = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU", "miou_ms": "mIoU, multi-scale"}
    names = [titles.get(metric) or metric.split("_ap")[-1] for metric in metrics]
    header = ["model", "method", "schedule", *names, "M", "G", "best iteration", "source"]
    return _without_empty(header, rows) if rows else ""


def _throughput(entries: dict[str, Facts]) -> str:
    rows = []
    for name, facts in entries.items():
        row = facts.get("reported", {}).get("throughput")
        if row:
            speeds = [row["images_per_second"], row["training"]]
            rows.append([f"`{name}`", *speeds, f"{row['device']}, batch {row['batch_size']}", row["source"]])
    header = ["model", "inference, images/s", "training, images/s", "on", "source"]
    return table(header, rows) if rows else ""


def _certificate(family: str, entries: dict[str, Facts]) -> str:
    measured = zoo.load_measured()["models"]
    rows: list[list[object]] = []
    for name in entries:
        for row in measured[name]["parity"]:
            names = ("logits_max_error", "logits_relative_rms", "gradient_max_error")
            errors = [f"{row[x]:.1e}" if x in row else "on a kink" for x in names]
            size = " x ".join(map(str, row["input"]))
            rows.append([f"`{name}`", f"`{row['recording']}`", size, *errors, f"`{row['backend']}`"])
    header = ["model", "recording", "input", "logits, largest", "logits, RMS", "gradient, largest", "backend"]
    lines = [table(header, rows), ""]
    for name in entries:
        other = twin(family, name)
        if not measured[name]["parity"] and other:
            lines.append(f"- `{name}`: no recording of this size. It runs the same code as `{other}`, which has one.")
    return "\n".join(lines).strip()


def _settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _text(value)) for name, value in recipe.items() if name != "source"]


def _recipes(entries: dict[str, Facts]) -> str:
    rows = []
    names: list[str] = []
    given = {name: x["reported"]["training"] for name, x in entries.items() if "training" in x.get("reported", {})}
    for recipe in given.values():
        names += [field for field in recipe if field not in names and field != "source"]
    for name, recipe in given.items():
        rows.append([f"`{name}`", *(_text(recipe[x]) if x in recipe else None for x in names), recipe["source"]])
    return table(["model", *(x.replace("_", " ") for x in names), "source"], rows) if rows else ""


def _stages(stages: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for stage in stages for name in stage))
    rows = [[i + 1, *(_text(stage[x]) if x in stage else None for x in names)] for i, stage in enumerate(stages)]
    return table(["stage", *(x.replace("_", " ") for x in names)], rows) if rows else ""


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _without_empty(header: list[str], rows: list[list[object]]) -> str:
    """A table without the columns in which no row says anything."""
    kept = [i for i in range(len(header)) if any(row[i] is not None for row in rows)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])
