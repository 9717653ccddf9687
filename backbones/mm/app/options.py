"""Checks of ``--cfg-options``, and the one number of classes of a config."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine import registry
from mmengine.config import Config

from backbones.mm.errors import UserError
from backbones.suggest import did_you_mean

# Settings that mmengine or this library reads and a config need not have, beside the arguments of a Runner.
_TOP = {"auto_scale_lr", "find_unused_parameters", "model_wrapper_cfg", "custom_imports", "custom_hooks"} | {
    *("compile", "tta_model", "tta_pipeline"),
    *("load_ignore", "check_annotations", "data_hint", "verbose", "num_classes", "metainfo"),
}
# What builders take out of the settings of a type before they call it.
_OF_BUILDERS = {"type", "_scope_", "_delete_", "constructor", "paramwise_cfg", "init_cfg", "convert_to_iter_based"}
_REGISTRIES = [value for name, value in vars(registry).items() if isinstance(value, registry.Registry)]


def check_options(config: Config, options: Mapping[str, Any]) -> None:
    """Refuse options that cannot be meant, before they are merged into ``config``.

    A key is known if the config has it, or if it is an argument of the type that it stands beside. At the top, nothing
    else is read by anyone, so other keys are refused; so they are beside a type that takes no further arguments. In
    settings without a type, such as ``model.network``, a new key is refused only if it differs from a known one by
    a letter or two.

    Raises:
        UserError: a key that is unknown, an index outside of its list, or a key below what holds no settings.
    """
    for key in options:
        parts, place = key.split("."), config._cfg_dict
        for depth, part in enumerate(parts):
            above = ".".join(parts[:depth])
            if isinstance(place, list | tuple):
                if not part.isdecimal() or int(part) >= len(place):
                    last = len(place) - 1
                    raise UserError(f"--cfg-options {key}: {above} is a list, got {part!r}, expected 0 to {last}")
                place = place[int(part)]
            elif not isinstance(place, dict):
                raise UserError(f"--cfg-options {key}: {above} is {place!r} and has no settings")
            elif part in place:
                place = place[part]
            else:
                _check_new(key, part, above, {**place, **_new_type(options, above)}, config.get("default_scope"))
                break


def _new_type(options: Mapping[str, Any], above: str) -> dict[str, Any]:
    """The type that other options put there, whose arguments count."""
    name = f"{above}.type"
    return {"type": options[name]} if name in options else {}


def _check_new(key: str, part: str, above: str, place: Mapping[str, Any], scope: str | None) -> None:
    if above:
        arguments, others = _arguments(place.get("type"), scope)
        known = {*place, *arguments}
        near = [name for name in known if _near(part, name)]
        accepted = part in arguments | _OF_BUILDERS or (others and not near)
    else:
        from backbones.mm.engine.runner import Runner

        known = {*place, *_TOP, *inspect.signature(Runner.__init__).parameters} - {"self", "cfg"}
        accepted = part in known
    if not accepted:
        where = f"{above} has no" if above else "the config has no"
        raise UserError(f"--cfg-options {key}: {where} {part!r}{did_you_mean(part, sorted(known))}")


def _arguments(kind: Any, scope: str | None) -> tuple[set[str], bool]:
    """Arguments of the type called ``kind``, and whether it may take others."""
    found = next((x for x in (_find(one, kind, scope) for one in _REGISTRIES) if x is not None), None)
    if found is None:
        return set(), True
    names: set[str] = set()
    owners = (
        [vars(x)["__init__"] for x in found.__mro__ if "__init__" in vars(x)] if isinstance(found, type) else [found]
    )
    for owner in owners:
        parameters = inspect.signature(owner).parameters.values()
        names |= {x.name for x in parameters if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)} - {"self"}
        if not any(x.kind == x.VAR_KEYWORD for x in parameters):
            return names, False
    return names, True


def _find(one: registry.Registry, kind: Any, scope: str | None) -> Any:
    if not isinstance(kind, str):
        return kind
    return one.children.get(scope, one).get(kind)


def _near(a: str, b: str) -> bool:
    """Whether one is the other with a letter too many, too few, another or two exchanged; of long names, two such."""
    previous: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, previous, row = previous, row, [i]
        for j, y in enumerate(b, 1):
            costs = [previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)]
            if i > 1 and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                costs.append(before[j - 2] + 1)
            row.append(min(costs))
    return row[-1] <= (2 if min(len(a), len(b)) > 7 else 1)


def spread_classes(config: Config, options: Mapping[str, Any] | None = None) -> None:
    """Write ``num_classes`` of a config into its network, heads and image folders, so that one place states it.

    ``metainfo``, names of classes where a config has them, goes to all data sets in the same way, and ``num_classes``
    follows it, unless it is changed itself.

    Args:
        options: what the command line has changed.

    Raises:
        UserError: ``num_classes`` is not a positive number, or places that state their own disagree.
    """
    options = options or {}
    _spread_names(config, options)
    if "num_classes" not in config:
        return
    places = {f"{path}.num_classes": place for path, place in _places(config._cfg_dict, "num_classes") if path}
    if "network" in config.get("model", {}):
        places["model.network.num_classes"] = config.model.network
    for name, value in {"num_classes": config.num_classes, **_values(places)}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{name}: got {value!r}, expected a whole number of at least 1")
    count, literals = config.num_classes, set() if "num_classes" in options else _literals(config.filename)
    own = {
        name: value
        for name, value in _values(places).items()
        if value not in (None, count) and (name in options or value in literals)
    }
    if own and len({*_values(places).values()}) == 1:  # an earlier way: every place states the same
        config.num_classes = count = next(iter(own.values()))
    elif own:
        name, value = next(iter(own.items()))
        raise UserError(f"{name} is {value}, num_classes of the config is {count}; change num_classes alone")
    for place in places.values():
        place["num_classes"] = count


def _spread_names(config: Config, options: Mapping[str, Any]) -> None:
    """Give ``metainfo`` of a config to data sets that state none, or all another: that of the config's base."""
    stated = [place for path, place in _places(config._cfg_dict, "metainfo") if path]
    names = config.get("metainfo", {}).get("classes")
    if names and not stated:
        for place in _data_sets(config):
            place["metainfo"] = config.metainfo
    if not names or not stated or any(place["metainfo"] != stated[0]["metainfo"] for place in stated):
        return
    before = stated[0]["metainfo"].get("classes", ())
    if "num_classes" not in options and config.get("num_classes") == len(before):
        config.num_classes = len(names)
    for place in stated:
        place["metainfo"] = config.metainfo


def _data_sets(config: Config) -> Iterator[dict[str, Any]]:
    """Settings of the data sets of all loaders, without what wraps them."""
    waiting: list[Any] = [config.get(f"{part}_dataloader") for part in ("train", "val", "test")]
    while waiting:
        settings = waiting.pop()
        if not isinstance(settings, dict):
            continue
        inner = [settings[key] for key in ("dataset", "datasets") if key in settings]
        if not inner and "type" in settings:
            yield settings
        for value in inner:
            waiting += value if isinstance(value, list | tuple) else [value]


def _values(places: Mapping[str, Any]) -> dict[str, Any]:
    return {name: place.get("num_classes") for name, place in places.items()}


def _places(value: Any, key: str, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that state ``key``, and where they are."""
    if isinstance(value, dict):
        if key in value:
            yield path, value
        for name, item in value.items():
            yield from _places(item, key, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _places(item, key, f"{path}.{number}")


def _literals(file: str | None) -> set[int]:
    """Numbers of classes that a config and its bases write into nested settings."""
    if file is None or not Path(file).is_file():
        return set()
    found = {
        node.value.value
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "num_classes"
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, int)
    }
    for base in Config._get_base_files(file):
        found |= _literals(Config._get_cfg_path(base, file)[0])
    return found
