"""The configs that come with the package, found by name: ``vmamba-tiny-s1l8_8xb128_in1k``.

They stand where OpenMMLab's packages have theirs, in ``.mim`` within the package; in a clone that is a link.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from backbones.suggest import did_you_mean


def folder() -> Path:
    """Where the configs are.

    Raises:
        FileNotFoundError: this installation has none.
    """
    package = Path(__file__).parent
    # Where a checkout has no symbolic links, the second of them is there.
    for found in (package / ".mim" / "configs", package.parent / "configs"):
        if (found / "_base_").is_dir():
            return found.resolve()
    raise FileNotFoundError(f"{package} was installed without its configs")


@cache
def by_name() -> dict[str, Path]:
    """Every config that describes a run, by its name: that of its file, without folder and suffix."""
    root = folder()
    return {path.stem: path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] != "_base_"}


def find(config: str | Path) -> Path:
    """The file that ``config`` means.

    Args:
        config: a file; the name of one that comes with the package, such as ``vim-tiny_digits``,
            ``digits/vim-tiny_digits.py`` or ``backbones::digits/vim-tiny_digits.py``; or the work directory of a run,
            in which mmengine has left its config.

    Raises:
        ValueError: there is none of them; the message offers what is alike.
    """
    path = Path(config)
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(path.glob("*.py"))
        if len(files) == 1:
            return files[0]
        held = f"several configs: {', '.join(file.name for file in files)}; name one" if files else "no config of a run"
        raise ValueError(f"folder {path} holds {held}")
    if found := _ours(str(config)):
        return found
    beside = sorted(other.name for other in path.parent.glob("*.py")) if path.suffix == ".py" else []
    raise ValueError(f"config {config} does not exist{did_you_mean(path.name, [*beside, *by_name()])}")


def is_config(name: str) -> bool:
    """Whether ``name`` is meant as a config, and not as a model of timm's."""
    return name.endswith(".py") or _ours(name) is not None or any(Path(name).glob("*.py"))


def _ours(name: str) -> Path | None:
    within = Path(name.removeprefix("backbones::").removesuffix(".py"))
    found = by_name().get(within.name)
    return found if found and within.parent in (Path(), Path(found.parent.name)) else None
