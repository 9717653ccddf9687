"""The command line: its commands, what it imports for help, and what it says where something is missing."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssm_backbones
from backbones.configs import by_name
from backbones.models import family_names
from backbones.zoo import load_family
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
    assert sorted(called) == sorted(COMMANDS.keys() - {"models", "demo"})  # which came with the command line


@pytest.mark.parametrize(
    "called, name",
    [
        ([ROOT / "tools" / "flops.py"], "flops.py"),
        pytest.param(["-m", "backbones", "flops"], "python -m backbones flops", marks=pytest.mark.slow),
    ],
)
def test_a_script_and_the_package_go_by_their_own_names(called: list[object], name: str, tmp_path: Path) -> None:
    """Both from a folder of their own, without an installation."""
    ran = python(*called, "vim_tinny", cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith(f"{name}: error: unknown model 'vim_tinny'; did you mean ")


@pytest.mark.parametrize(
    "called",
    [
        ["tools/train.py"],
        pytest.param(["-m", "ssm_backbones", "train"], marks=pytest.mark.slow),
        pytest.param(["-m", "backbones", "train"], marks=pytest.mark.slow),
    ],
)
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
    names = {"onedl-mmengine": "mmengine", "onedl-mmcv": "mmcv", "onedl-mmdetection": "mmdet"}
    names |= {"onedl-mmsegmentation": "mmseg"}
    names |= {"scikit-learn": "sklearn", "scikit-image": "skimage"}
    mandatory, _ = declared()
    found = {names.get(x, x) for path in (ROOT / "backbones").rglob("*.py") for x in imported(path) - mandatory}
    assert found <= {package for packages in EXTRAS.values() for package in packages}


def test_a_library_that_does_not_import(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "backbones", None)
    status, _, err = call(capsys, "doctor")
    assert status == 2 and len(err.splitlines()) == 1
    assert "--force-reinstall torch torchvision" in err


def test_models_are_listed_with_tabs_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "models")
    table = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and {len(line) for line in table} == {9}
    by_model = {line[1]: dict(zip(table[0], line, strict=True)) for line in table[1:]}
    assert by_model.keys() >= {model for name in family_names(guests=True) for model in load_family(name)["models"]}
    assert by_model["vmamba_tiny_s1l8"] == {
        **{"family": "VMamba", "model": "vmamba_tiny_s1l8", "params": "30.2", "GFLOPs": "4.91", "top-1": "82.6"},
        **{"box": "47.3", "mask": "42.7", "mIoU": "47.9", "weights": "yes"},
    }


@pytest.mark.parametrize("task, figure", [("imagenet", "top-1"), ("coco", "box"), ("ade20k", "mIoU")])
def test_models_of_a_task_come_best_first(task: str, figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "models", "--task", task, "--max-params", "31", "--max-gflops", "9", "--pretrained")
    head, *lines = (line.split("\t") for line in out.splitlines())
    values = [float(line[head.index(figure)]) for line in lines]
    assert len(values) > 3 and values == sorted(values, reverse=True)
    assert all(float(line[2]) <= 31 and float(line[3]) <= 9 and line[-1] == "yes" for line in lines)


def test_models_of_one_family_and_their_configs(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "models", "--family", "Spatial-Mamba")
    assert {line.split("\t")[0] for line in out.splitlines()[1:]} == {"Spatial-Mamba"}
    _, out, _ = call(capsys, "models", "--family", "spatialmamba", "--task", "imagenet", "--configs")
    assert out.splitlines() == [f"spatialmamba-{size}_8xb128_in1k" for size in ("base", "small", "tiny")]
    assert call(capsys, "models", "--family", "vmambaa")[::2] == (
        2,
        "ssm-backbones models: error: --family: unknown family 'vmambaa'; "
        "did you mean vmamba or msvmamba or lbmamba?\n",
    )
    assert call(capsys, "models", "--max-params", "1")[0] == 2


def test_a_table_for_a_terminal_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbones.commands import models

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert models.main([]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation", "unet"])
def test_a_demo_is_three_commands(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("mmengine")
    from backbones.commands import demo

    called = []
    monkeypatch.setattr(demo, "run", lambda name, arguments, prog: called.append([name, *arguments]) or 0)
    monkeypatch.setattr(demo, "find_best", lambda folder: folder / "epoch_3.pth")
    assert demo.main([task]) == 0
    work_dir = f"work_dirs/{demo.DEMOS[task].config}"
    assert [line[0] for line in called] == [demo.DEMOS[task].data, "train", "test"]
    assert called[1][1:] == [demo.DEMOS[task].config, "--work-dir", work_dir, "--resume"]
    assert called[2][1:] == [work_dir]
    assert by_name()[called[1][1]].is_file()
    printed = capsys.readouterr().out
    assert printed.splitlines()[:3] == [f"$ ssm-backbones {' '.join(line)}" for line in called]
    monkeypatch.setattr(demo, "run", lambda *_: 2)
    assert demo.main([task]) == 2
