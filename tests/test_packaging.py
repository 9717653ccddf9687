"""What surrounds the code: metadata, pins, notices, links, and what a built distribution carries."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import backbones
from backbones import zoo
from backbones.models import family_names

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "ssm-backbones"


def repository_files() -> list[Path]:
    """Return every file that is tracked, or would be on `git add --all`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def pinned(*names: str) -> dict[str, Requirement]:
    """Return the requirements of the named files in requirements/, by canonical distribution name."""
    lines = [
        line
        for name in names
        for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "-"))
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def declared() -> tuple[set[str], set[str]]:
    """Return what setup.py says every installation needs, and what any of its extras needs, by distribution name."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(values["extras_require"]).values()
    return (
        {canonicalize_name(Requirement(line).name) for line in ast.literal_eval(values["install_requires"])},
        {canonicalize_name(Requirement(line).name) for extra in extras for line in extra},
    )


def imported(path: Path) -> set[str]:
    """Return the distributions that a module imports, anywhere in it."""
    names = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "mmengine": "onedl-mmengine",
        "mmcv": "onedl-mmcv",
        "mmdet": "onedl-mmdetection",
        "mmseg": "onedl-mmsegmentation",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "huggingface_hub": "huggingface-hub",
    }
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.partition(".")[0])
    return {names.get(name, name) for name in modules - sys.stdlib_module_names - {"backbones", "ssm_backbones"}}


def exact_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned exactly"
    return specifier.version


def test_version_agrees_with_metadata():
    assert backbones.__version__ == metadata.version(DISTRIBUTION)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["title"]) == (backbones.__version__, DISTRIBUTION)


@pytest.mark.parametrize("name", ["base", "train", "dev", "clients", "constraints"])
def test_requirements_are_pinned_once(name):
    others = {"base", "train", "dev", "clients", "constraints"} - {name}
    here = pinned(name)
    for requirement in here.values():
        exact_version(requirement)
    assert not here.keys() & pinned(*others).keys()


def test_pins_satisfy_the_declared_minimums():
    pins = {name: exact_version(requirement) for name, requirement in pinned("base", "train", "dev").items()}
    declared = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    mandatory = [requirement for requirement in declared if requirement.marker is None]
    assert {"torch", "timm", "einops", "numpy", "pyyaml"} <= {canonicalize_name(r.name) for r in mandatory}
    assert {canonicalize_name(r.name) for r in mandatory} <= pinned("base").keys()
    for requirement in declared:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is not None:
            assert requirement.specifier.contains(pin), f"pinned {pin}, declared {requirement}"


def test_what_is_imported_is_declared():
    mandatory, optional = declared()
    assert mandatory <= pinned("base").keys()
    for path in (ROOT / "backbones").rglob("*.py"):
        where = path.relative_to(ROOT / "backbones")
        assert imported(path) <= mandatory | optional, where
        if where.parts[0] not in ("mm", "commands") and not {"triton", "onnx"} & set(
            re.split(r"[/_.]", where.as_posix())
        ):
            figures = {"matplotlib"} if where == Path("images.py") else set()  # it is handed one, and writes it
            assert imported(path) - {"triton", "onnxscript"} - figures <= mandatory, where


def test_import_leaves_openmmlab_and_cuda_packages_alone():
    code = "import sys, backbones; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert "backbones" in loaded
    unwanted = {"mmengine", "mmcv", "mmdet", "mmseg", "mamba_ssm", "causal_conv1d", "sklearn", "matplotlib"}
    assert not unwanted.intersection(loaded)


@pytest.mark.parametrize("family", family_names(guests=True))
def test_notice_names_the_original_work(family):
    sections = (ROOT / "NOTICE.md").read_text(encoding="utf-8").split("\n### ")[1:]
    url = zoo.load_family(family)["repository"]["url"]
    (section,) = [section for section in sections if f"<{url}>" in section]
    for field in ("Paper", "Licence of the code", "Licence of the weights"):
        assert re.search(rf"^- {field}: \S", section, re.MULTILINE), f"{family}: no {field.lower()}"


def test_notice_says_where_a_licence_is_missing():
    text = (ROOT / "NOTICE.md").read_text(encoding="utf-8")
    missing = {section.partition("\n")[0] for section in text.split("\n### ")[1:] if "**" in section}
    assert missing == {"MSVMamba", "EfficientVMamba", "GroupMamba", "LBMamba", "VSSD", "Adventurer"}


def test_no_file_names_a_machine():
    # Assembled here so that this file does not match itself.
    machine_path = re.compile(r"(?<![\w.\-/~:$}>])/(?:" + "|".join(["work", "root", "home", "Users"]) + r")/[\w.]")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or an array
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in machine_path.finditer(text)]
    assert not found


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown text."""
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_markdown_links_resolve():
    documents = [path for path in repository_files() if path.suffix == ".md"]
    assert documents
    broken = []
    for path in documents:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            linked = path.parent / name if name else path
            if not linked.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in heading_anchors(linked.read_text(encoding="utf-8")):
                broken.append(f"{path.relative_to(ROOT)}: {target} (no such heading)")
    assert not broken


@pytest.mark.slow
def test_wheel_built_from_the_source_distribution_is_complete(tmp_path):
    source = tmp_path / "source"
    for path in repository_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)

    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(archive)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())

    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "backbones").rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "backbones" / "zoo").glob("*.yml")}
    assert wanted <= packed
    assert not {name.partition("/")[0] for name in packed} & {"tests", "tools", "configs"}
    assert {Path(name).name for name in packed} >= {"LICENSE", "NOTICE.md"}
    if any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        assert any(Path(name).suffix in {".so", ".dylib", ".dll", ".pyd"} for name in packed)
