"""The rooms of the package, and that no import runs back up between them; docs/architecture.md draws them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a room imports itself and what stands before it.
ROOMS = (
    *("suggest", "processes", "configs", "zoo", "images", "ops", "graphs", "weights", "patterns", "scan_patterns"),
    *("layers", "base", "models", "segmentation", "analysis", "conversion", "export", "doctor", "mm", "commands"),
)


def room_of(module: str) -> str | None:
    """The room of a dotted name under ``backbones``; None is the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "backbones" and len(parts) > 1 and parts[1] in ROOMS else None


def arrows() -> set[tuple[str, str]]:
    """Every (importer, imported) pair of rooms, imports within functions included."""
    found = set()
    for path in (ROOT / "backbones").rglob("*.py"):
        importer = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: imports in this package are absolute"
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {(importer, room) for room in map(room_of, names) if importer and room and importer != room}
    return found


def test_every_file_stands_in_a_room() -> None:
    names = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "backbones").iterdir()
        if path.suffix in ("", ".py")
    }
    assert names - {"__init__", "__main__", "__pycache__", ".mim"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_back_up(room: str) -> None:
    above = {
        imported for importer, imported in arrows() if importer == room and ROOMS.index(imported) > ROOMS.index(room)
    }
    assert not above, f"backbones.{room} imports {', '.join(sorted(above))}, which stand above it"


def test_the_diagram_draws_every_arrow() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"^```mermaid\nflowchart TD\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    drawn = {
        (importer, imported)
        for importer, targets in re.findall(r"^ *(\w+) --> (.+)$", diagram, re.MULTILINE)
        for imported in targets.split(" & ")
    }
    assert drawn == arrows()
    assert all(re.search(rf"^\| `{room}`", page, re.MULTILINE) for room in ROOMS)
