"""CONTRIBUTING's six steps, for every family: a failure names the step that is missing."""

import ast
import re
from pathlib import Path

import pytest
import timm

from backbones import zoo
from backbones.base import Backbone
from backbones.models import FAMILIES, GUESTS, family_names
from tests.small_models import SMALLEST
from tests.test_models import PROMISED
from tools.parity import MODELS, RECORDED

ROOT = Path(__file__).parents[1]
STEPS = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add a family in six steps")[2]


def step(number: int, module: str, what: str) -> str:
    return f"{module}: step {number} of CONTRIBUTING.md is missing: {what}"


def family_named(module: str) -> type[Backbone]:
    return next(family for family in (*FAMILIES, *GUESTS) if family.__module__.endswith(f".{module}"))


@pytest.fixture(params=[*FAMILIES, *GUESTS], ids=lambda family: family.__name__)
def module(request: pytest.FixtureRequest) -> str:
    """The name of a family's file, zoo page and card."""
    return request.param.__module__.rpartition(".")[2]


def test_there_are_six_steps() -> None:
    assert re.findall(r"^(\d)\. \*\*", STEPS, re.MULTILINE) == list("123456")


def test_every_family_file_is_in_families() -> None:
    files = {path.stem for path in (ROOT / "backbones" / "models").glob("*.py")} - {"__init__"}
    listed = set(family_names(guests=True))
    assert files == listed, step(3, ", ".join(sorted(files ^ listed)), "its class in FAMILIES")


def test_facts(module: str) -> None:
    assert (ROOT / "backbones" / "zoo" / f"{module}.yml").is_file(), step(1, module, "backbones/zoo/<family>.yml")
    facts, notice = zoo.load_family(module), (ROOT / "NOTICE.md").read_text(encoding="utf-8")
    assert facts["repository"]["url"] in notice, step(1, module, "the work in NOTICE.md")


def test_the_family_file(module: str) -> None:
    text = (ROOT / "backbones" / "models" / f"{module}.py").read_text(encoding="utf-8")
    assert timm.list_models(module=module), step(3, module, "@register_model functions")
    assert "arXiv:" in text or "arxiv" in text, step(3, module, "the paper in the docstring")
    assert text.count("\n") <= 250, step(3, module, f"a file of at most 250 lines, got {text.count(chr(10))}")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_create_"):
            lines = 1 + (node.end_lineno or 0) - node.lineno  # from its `def` to its last line
            assert lines <= 12, step(3, module, f"{node.name} of at most 12 lines, got {lines}")


def test_key_rules_and_recordings(module: str) -> None:
    names = timm.list_models(module=module)
    family = family_named(module)
    assert family.create(names[0], device="meta").key_rules, step(4, module, "key_rules")
    recorded = {*MODELS.values(), *(config["arch"] for config in RECORDED.values())}
    assert recorded & set(names), step(5, module, "a recording in tools/parity.py")
    if family in GUESTS:  # timm tests its own contract
        return
    assert set(names) <= set(PROMISED), step(5, module, "its names in PROMISED of tests/test_models.py")
    assert set(names) & set(SMALLEST), step(5, module, "its smallest model in SMALLEST of tests/small_models.py")


def test_configs_and_card(module: str) -> None:
    assert (ROOT / "model_cards" / f"{module}.md").is_file(), step(6, module, "its card, by make docs")
    names = timm.list_models(module=module)
    configs = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "configs").rglob("*.py"))
    assert any(f'"{name}"' in configs for name in names), step(6, module, "a config under configs/")
