"""Every command and snippet of README and docs is run.

A block is run unless the line above it says otherwise, with the reason: ``<!-- not tested: ... -->``. Blocks under
``<!-- slow -->`` are left to ``make test-all``. Under ``<!-- stand-ins: photo.jpg, weights -->``, a snippet gets a
picture of noise, and random weights in place of a download. The snippets of one page share their names, its commands a
folder.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image
from timm.models import _hub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAND_INS = "stand-ins: photo.jpg, weights"
BLOCK = re.compile(
    rf"^(?:<!-- (?P<mark>slow|{STAND_INS}|not tested: [^\n]{{10,}}) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
NOT_RUN = {"text", "mermaid", "bibtex"}


# What stays the same in the messages of the table of troubles.
WORDS = [re.compile(r"[A-Za-z]+(?: [a-z]+)+"), re.compile(r"[A-Za-z]+(?:[,;]? [a-z]+)+")]


class Block(NamedTuple):
    language: str
    code: str
    mark: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["code"], match["mark"] or "") for match in found]


def run(commands: str, folder: Path) -> None:
    for name in ("Makefile", "backbones", "configs", "requirements", "setup.py", "ssm_backbones.py", "tests", "tools"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    # The environment that runs the tests is the one that make would make.
    make = f"make --no-print-directory VENV={sys.prefix} -o {sys.prefix}/.installed -o {sys.prefix}/.openmmlab "
    script = re.sub(r"^make ", make, commands, flags=re.MULTILINE)
    # This copy of the code, whichever the environment has installed; tests/test_installed.py runs the command itself.
    script = re.sub(r"\bssm-backbones(?= )", f"{sys.executable} -m ssm_backbones", script)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def pages_with(language: str, *marks: str) -> list:
    chosen = [page for page in PAGES if any(x.language == language and x.mark in marks for x in blocks(page))]
    return [pytest.param(page, id=page.stem) for page in chosen]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_every_block_is_found_and_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page)) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE))
    assert {block.language for block in blocks(page)} <= {"python", "sh", *NOT_RUN}


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000


def test_the_messages_of_the_troubleshooting_table_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "backbones").rglob("*.py"))
    assert len(messages) > 5
    for message in messages:
        found = [words for pattern in WORDS for words in pattern.findall(message) if words in sources]
        assert found, f"no part of {message!r} is in the code"


def download(url: str, **options: object) -> str:
    """Stands in for a download of published weights: a file of random ones, for the model whose address it is."""
    name = next(x for x in timm.list_models(pretrained=True) if timm.get_pretrained_cfg_value(x, "url") == url)
    torch.save({"model": timm.create_model(name).state_dict()}, "downloaded.pth")
    return "downloaded.pth"


@pytest.mark.parametrize("page", pages_with("python", ""))
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in blocks(page):
        if block.language == "python" and not block.mark:
            exec(compile(block.code, str(page), "exec"), scope)


@pytest.mark.parametrize("page", pages_with("python", STAND_INS))
def test_snippets_that_classify_a_picture_print_five_classes(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_hub, "download_cached_file", download)
    Image.effect_noise((320, 240), 50).save("photo.jpg")
    for block in blocks(page):
        if block.mark == STAND_INS:
            exec(compile(block.code, str(page), "exec"), {})
            assert Path("downloaded.pth").is_file()
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) == 5
            assert all(re.fullmatch(r"\d+\.\d%  \S.+", line) for line in lines)


@pytest.mark.parametrize("page", pages_with("sh", ""))
def test_commands_run(page: Path, tmp_path: Path) -> None:
    run("".join(x.code for x in blocks(page) if x.language == "sh" and not x.mark), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh", "slow"))
def test_slow_commands_run(page: Path, tmp_path: Path) -> None:
    data = "python tools/make_digits.py --out data/digits\n"  # what every page may take for granted
    run(data + "".join(x.code for x in blocks(page) if x.language == "sh" and x.mark in ("", "slow")), tmp_path)
