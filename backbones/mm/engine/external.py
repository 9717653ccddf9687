"""mmengine's names for configs of other packages, such as ``_base_ = "backbones::digits/vim-tiny_digits.py"``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

_PACKAGE = "backbones"


def _without_scope(find: Callable[[str, str], tuple[str, str | None]]) -> Callable[[str, str], tuple[str, str | None]]:
    """``find`` for configs whose types stay in the scope of the config that has them as its base.

    mmengine takes the package's name for the scope of all its types. Ours are in the root registries, and those of
    mmdet and mmseg beside them are found in the config's ``default_scope``.
    """

    @wraps(find)
    def found(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = find(cfg_path, filename)
        return path, None if scope == _PACKAGE else scope

    return found


def register() -> None:
    """Lets mmengine know this package's configs; of no effect when repeated."""
    if _PACKAGE not in MODULE2PACKAGE:
        MODULE2PACKAGE[_PACKAGE] = _PACKAGE  # the importable name, by which clones are found, too
        Config._get_cfg_path = staticmethod(_without_scope(Config._get_cfg_path))


register()
