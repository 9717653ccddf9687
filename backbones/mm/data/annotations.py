"""Do annotations match their images and the model? OpenMMLab drops what does not fit, or fails in mid-run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from backbones.images import UNREADABLE, image_size
from backbones.mm.errors import UserError

_NAMED = 3
_HEADS = ("bbox_head", "mask_head", "decode_head", "auxiliary_head")


def check_annotations(config: Config, loaders: Sequence[str]) -> None:
    """Hold the annotations of the COCO and ADE20K style data sets of a config against images and model.

    Args:
        loaders: data loaders that are going to be used, such as "train_dataloader".

    Raises:
        UserError: a list of annotations that is missing or unreadable; images or label maps that are missing or
            have another size than stated; categories or boxes out of range; heads with another number of classes.
    """
    checked: list[dict[str, Any]] = []
    for name in loaders:
        for dataset in _datasets(config.get(name)):
            if dataset in checked:
                continue
            checked.append(dataset)
            prefix = dataset["data_prefix"]
            classes = _classes(dataset, config.get("default_scope"))
            if "seg_map_path" in prefix:
                _check_label_maps(dataset)
            elif "img" in prefix and str(dataset.get("ann_file", "")).endswith(".json"):
                _check_coco(dataset, classes)
            else:
                continue
            if classes:
                _check_heads(config.get("model", {}), len(classes), name)


def _check_coco(dataset: dict[str, Any], classes: Sequence[str]) -> None:
    file = _join(dataset, dataset["ann_file"])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
    except FileNotFoundError:
        raise UserError(f"annotations {file} do not exist; check data_root and ann_file") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"annotations {file} are not in COCO's format: {type(error).__name__} {error}") from None
    names = {category["name"] for category in categories}
    if absent := [name for name in classes if name not in names]:
        raise UserError(
            f"annotations {file} have no categories {_some(absent)}; "
            "set metainfo=dict(classes=...) of the data set to the names in the file"
        )
    folder = _join(dataset, dataset["data_prefix"]["img"])
    paths = [folder / image["file_name"] for image in images]
    _require_files(paths, f"images that {file} names")
    by_id = {image["id"]: image for image in images}
    known = {category["id"] for category in categories}
    _refuse(
        file,
        "category ids out of range",
        (f"{a['category_id']} in annotation {a['id']}" for a in annotations if a["category_id"] not in known),
        f"the categories are {min(known, default=0)} to {max(known, default=0)}",
    )
    _refuse(
        file,
        "images that are not listed",
        (f"{a['image_id']} in annotation {a['id']}" for a in annotations if a["image_id"] not in by_id),
        "the list 'images' must hold every image_id",
    )
    _refuse(
        file,
        "boxes outside of their images",
        (f"{a['bbox']} in annotation {a['id']}" for a in annotations if _outside(a["bbox"], by_id[a["image_id"]])),
        "they are x, y, width, height in pixels",
    )
    sizes = _map(_size, paths)
    stated = [(image["width"], image["height"]) for image in images]
    wrong = (
        f"{path.name} is {size[0]} x {size[1]}, not {width} x {height}"
        for path, size, (width, height) in zip(paths, sizes, stated, strict=True)
        if size != (width, height)
    )
    _refuse(file, "sizes that are not those of the images", wrong, "the file belongs to other images")


def _check_label_maps(dataset: dict[str, Any]) -> None:
    images = _join(dataset, dataset["data_prefix"].get("img_path", ""))
    labels = _join(dataset, dataset["data_prefix"]["seg_map_path"])
    end, label_end = dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")
    listed = _join(dataset, dataset["ann_file"]) if dataset.get("ann_file") else None
    if listed is not None and listed.is_file():
        stems = listed.read_text(encoding="utf-8").split()
    else:
        stems = sorted(str(path.relative_to(images)).removesuffix(end) for path in images.rglob(f"*{end}"))
    if not stems:
        raise UserError(f"no images *{end} in {images}; check data_root, data_prefix and img_suffix")
    pairs = [(images / f"{stem}{end}", labels / f"{stem}{label_end}") for stem in stems]
    _require_files([image for image, _ in pairs], f"images of {images}")
    _require_files([label for _, label in pairs], f"label maps of the images in {images}")
    sizes = _map(lambda pair: (_size(pair[0]), _size(pair[1])), pairs)
    wrong = (
        f"{label.name} is {b[0]} x {b[1]}, its image {a[0]} x {a[1]}"
        for (_, label), (a, b) in zip(pairs, sizes, strict=True)
        if a != b
    )
    _refuse(labels, "sizes that are not those of the images", wrong, "every label map has a label for each pixel")


def _check_heads(model: Any, classes: int, loader: str) -> None:
    for name, head in _heads(model):
        if head.get("num_classes", classes) != classes:
            raise UserError(
                f"the {name} has num_classes={head['num_classes']}, the data set of {loader} {classes} classes"
            )
        losses = head.get("loss_decode", ())
        for loss in losses if isinstance(losses, list | tuple) else [losses]:
            if len(loss.get("class_weight") or range(classes)) != classes:
                raise UserError(
                    f"the {name} has a loss with class_weight for {len(loss['class_weight'])} classes, the data set of "
                    f"{loader} {classes} classes"
                )


def _heads(model: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(model, dict):
        if name in _HEADS:
            yield name, model
        for key, value in model.items():
            yield from _heads(value, key)
    elif isinstance(model, list | tuple):
        for value in model:
            yield from _heads(value, name)


def _datasets(config: Any) -> Iterator[dict[str, Any]]:
    """Every data set with a ``data_prefix``, however deep it is wrapped."""
    if isinstance(config, dict):
        if isinstance(config.get("data_prefix"), dict):
            yield config
        else:
            for value in config.values():
                yield from _datasets(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _datasets(value)


def _classes(dataset: dict[str, Any], scope: str | None) -> Sequence[str]:
    given = dataset.get("metainfo", {}).get("classes")
    if given is not None:
        return given
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return getattr(registry.get(dataset["type"]), "METAINFO", {}).get("classes", ())


def _join(dataset: dict[str, Any], path: str) -> Path:
    return Path(dataset.get("data_root") or "", path)


def _require_files(paths: Sequence[Path], what: str) -> None:
    # One listing a folder: asking for a hundred thousand files one by one is slow on a network.
    present = {folder: _listing(folder) for folder in {path.parent for path in paths}}
    absent = [str(path) for path in paths if path.name not in present[path.parent]]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(paths)} {what} are missing: {_some(absent)}; "
            "check data_root and data_prefix, or make the data anew"
        )


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _refuse(where: Path, what: str, wrong: Iterable[str], hint: str) -> None:
    if found := list(islice(wrong, _NAMED + 1)):
        raise UserError(f"{where}: {what}: {_some(found)}; {hint}")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_NAMED]) + (", ..." if len(items) > _NAMED else "")


def _outside(box: Sequence[float], image: dict[str, Any]) -> bool:
    left, top, width, height = box
    return left >= image["width"] or top >= image["height"] or left + width < 0 or top + height < 0


def _map(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def _size(path: Path) -> tuple[int, int]:
    """Width and height from the file's header, upright as OpenMMLab's pipelines read it."""
    try:
        return image_size(path)
    except UNREADABLE as error:
        raise UserError(f"cannot read image {path}: {error}; replace the file") from error
