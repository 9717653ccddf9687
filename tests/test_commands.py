"""The command line: its commands, what it imports for help, and what it says where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssm_backbones
from ssm_backbones import COMMANDS, EXTRAS
from tests.test_packaging import declared, imported

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "timm", "mmengine", "matplotlib", "backbones"}
# Says, as soon as PyTorch is imported, what OpenMP is going to find.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("policy", os.environ.get("OMP_WAIT_POLICY"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
"""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of ``ssm-backbones`` with these arguments."""
    try:
        status = ssm_backbones.main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def python(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_help_imports_nothing_large() -> None:
    code = "import sys, ssm_backbones as s\ntry: s.main(['--help'])\nfinally: print(*sys.modules)"
    printed = python("-c", code).stdout
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert not HEAVY & set(printed.splitlines()[-1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmengine")
    status, out, _ = call(capsys, *name.split(), "--help")
    assert status == 0 and out.startswith(f"usage: ssm-backbones {name} ")
    assert "tools/" not in out


def test_every_script_stands_for_one_command() -> None:
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py")]
    called = [name for text in scripts for name in re.findall(r"sys\.exit\(run\(\"(.+)\"\)\)", text)]
    assert sorted(called) == sorted(COMMANDS)


def test_a_script_and_the_package_go_by_their_own_names(tmp_path: Path) -> None:
    """Both from a folder of their own, without an installation."""
    ran = python(ROOT / "tools" / "flops.py", "vim_tinny", cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith("flops.py: error: unknown model 'vim_tinny'; did you mean ")
    ran = python("-m", "backbones", "flops", "vim_tinny", cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith("python -m backbones flops: error: unknown model 'vim_tinny'")


@pytest.mark.parametrize("called", [["tools/train.py"], ["-m", "ssm_backbones", "train"], ["-m", "backbones", "train"]])
def test_openmp_does_not_spin_while_models_run(called: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mmengine")
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    command = [sys.executable, *called, "--help"]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    # python -m backbones imports PyTorch first and starts again.
    assert re.findall(r"^policy (\w+)$", ran.stdout, re.MULTILINE)[-1] == "passive"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["tarin"], "ssm-backbones: error: unknown command 'tarin'; did you mean train?"),
        (["data", "digit"], "ssm-backbones data: error: unknown command 'digit'; did you mean digits?"),
    ],
)
def test_unknown_command(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, *arguments) == (2, "", f"{words}\n")


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys)
    assert status == 2 and "data digits" in out
    status, out, _ = call(capsys, "data")
    assert status == 2 and "\n  digits " in out and "train" not in out


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("backbones.commands.digits", "sklearn.datasets"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, out, err = call(capsys, "data", "digits")
    assert (status, out) == (2, "")
    assert err == (
        "ssm-backbones data digits: error: sklearn is not installed; install it with: pip install 'ssm-backbones[mm]'\n"
    )


def test_every_optional_package_has_its_extra() -> None:
    """Import names that are missing here would end in a traceback."""
    names = {"onedl-mmengine": "mmengine", "onedl-mmsegmentation": "mmseg"}
    names |= {"scikit-learn": "sklearn", "scikit-image": "skimage"}
    mandatory, _ = declared()
    found = {names.get(x, x) for path in (ROOT / "backbones").rglob("*.py") for x in imported(path) - mandatory}
    assert found <= {package for packages in EXTRAS.values() for package in packages}


def test_a_library_that_does_not_import(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "backbones", None)
    status, _, err = call(capsys, "doctor")
    assert status == 2 and len(err.splitlines()) == 1
    assert "--force-reinstall torch torchvision" in err
