"""What a mistyped name may have meant: one helper for every message."""

from pathlib import Path

from backbones.suggest import did_you_mean

ROOT = Path(__file__).parents[1]


def test_offers() -> None:
    names = ["vim_tiny", "vim_small", "resnet18"]
    assert did_you_mean("vim_tinny", names) == "; did you mean vim_tiny?"
    assert did_you_mean("vim_tin", ["vim_tina", "vim_ting"]) == "; did you mean vim_ting or vim_tina?"
    assert did_you_mean("resnet", iter(names)) == "; did you mean resnet18?"
    assert did_you_mean("zzz", names) == "; known: vim_tiny, vim_small, resnet18"
    assert did_you_mean("zzz", []) == ""
    assert did_you_mean("zzz", map(str, range(41))) == ""
    assert did_you_mean("xx", [f"xx{i}" for i in range(9)]).count(" or ") == 2


def test_nobody_else_looks_for_near_names() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in ("backbones", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "get_close_matches" in path.read_text(encoding="utf-8")
    ]
    assert users == ["backbones/suggest.py"]
