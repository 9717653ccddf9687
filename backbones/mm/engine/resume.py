"""Settings that a resumed run takes from its checkpoint instead of its config, and changes that prevent resuming."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from backbones.mm.errors import UserError

# How an optimizer computes a step; what it computes is the same.
_IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


def read_settings(text: str) -> dict[str, Any]:
    """The settings of a config's text, which mmengine keeps in checkpoints, without running code from it.

    Lists and tuples become lists; what is neither a literal nor ``dict(...)`` stays text.

    Raises:
        ValueError: the text is no Python.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"the text of a config: {error}") from error
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): _value(node.value) for node in assignments}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        return {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(key) if key else "**": _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old value and new value of every setting that differs; None stands for one that is absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{name}.{number}")
    elif old != new:
        yield name, old, new


def require_same_kind(old: Mapping[str, Any], new: Mapping[str, Any], source: str) -> None:
    """Refuse an optimizer or schedules of another kind, whose state is of no use.

    Args:
        old, new: settings of the checkpoint and of this run, see :func:`read_settings`.
        source: the checkpoint, for the message.

    Raises:
        UserError: the optimizer's type, or the types of the schedules, are others.
    """
    if "optim_wrapper" in old and "optim_wrapper" in new:
        kinds = [settings["optim_wrapper"].get("optimizer", {}).get("type") for settings in (old, new)]
        _require(source, "optim_wrapper.optimizer.type", *kinds)
        kinds = [_types(settings.get("param_scheduler")) for settings in (old, new)]
        _require(source, "param_scheduler", *kinds)


def _types(schedulers: Any) -> str:
    listed = schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []
    return ", ".join(scheduler["type"] for scheduler in listed) or "none"


def _require(source: str, name: str, old: Any, new: Any) -> None:
    if old != new:
        raise UserError(
            f"{source} cannot be resumed with {name} {new}: its state is that of {old}; "
            "resume with the settings of the run, or start a new one with load_from"
        )


def require_same_groups(old: Sequence[Mapping[str, Any]], optimizer: Optimizer, source: str) -> None:
    """Refuse other groups of parameters than the checkpoint's optimizer has.

    Raises:
        UserError: their number or the number of tensors in one of them differs.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (old, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        counts = [f"{len(x)} groups of {', '.join(map(str, x))} parameter tensors" for x in sizes]
        raise UserError(
            f"{source} cannot be resumed: its optimizer has {counts[0]}, this run's {counts[1]}; layer_decay, "
            "custom_keys and frozen_stages must be as in the run, or start a new one with load_from"
        )


def overridden(
    old: Mapping[str, Any], new: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], optimizer: Optimizer
) -> list[str]:
    """One line for each setting of this run in whose place the checkpoint's counts.

    Args:
        old, new: settings of the checkpoint and of this run, see :func:`read_settings`.
        groups: of the checkpoint's optimizer, of the same number as those of ``optimizer``.
    """
    lines = []
    keys = dict.fromkeys(key for group in optimizer.param_groups for key in group if not key.startswith("initial_"))
    for key in keys:
        if key in _IMPLEMENTATION:
            continue
        found = [[_base(group, key) for group in x] for x in (groups, optimizer.param_groups)]
        if found[0] != found[1]:
            a, b = (_shown(x) for x in found)
            lines.append(
                f"{'learning rate' if key == 'lr' else key}: {a} of the checkpoint counts, not {b} of the config"
            )
    for name, a, b in differences(old.get("param_scheduler"), new.get("param_scheduler"), "param_scheduler"):
        lines.append(f"{name}: {a} of the checkpoint counts, not {b} of the config")
    return lines


def _base(group: Mapping[str, Any], key: str) -> Any:
    """A setting before any schedule changes it."""
    value = group.get(f"initial_{key}", group.get(key))
    return tuple(value) if isinstance(value, list) else value


def _shown(values: Sequence[Any]) -> str:
    shown = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in dict.fromkeys(values)]
    return " and ".join(shown) if len(shown) <= 3 else f"{shown[0]} to {shown[-1]} ({len(shown)} values)"
