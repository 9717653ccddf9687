"""backbones.doctor: quiet where all is well, and a command for everything that is not."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata as metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from backbones import doctor, ops
from backbones.doctor import Finding
from backbones.ops import native
from backbones.ops.scan import cpu

needs_kernel = pytest.mark.skipif(ops.backends()["cpu"] is not None, reason="no compiled kernel")


def problems(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    return [finding for finding in check() if finding.status == "problem"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time measurement: it proves nothing on a busy machine."""
    monkeypatch.setattr(doctor, "_seconds", lambda name, device: 1.0 if name == "naive" else 0.01)


@needs_kernel
@pytest.mark.parametrize("openmmlab", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_this_installation_is_well(
    monkeypatch: pytest.MonkeyPatch, quick: None, openmmlab: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not openmmlab:
        monkeypatch.setattr(doctor, "_OPENMMLAB", {})
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "All is well." in printed
    assert f"torch {metadata.version('torch')}" in printed
    assert f"cpu: {native.instruction_set()}" in printed
    assert "cpu: values and gradients within" in printed
    assert re.search(r"bfloat16: a product takes \S+ times as long as in float32", printed)


@pytest.mark.parametrize(
    "requirement, words", [("torch>=99", "needed is >=99"), ("surely-no-such-package", "is missing")]
)
def test_packages_that_are_missing_or_old(requirement: str, words: str) -> None:
    finding = doctor._check_requirement(Requirement(requirement))
    assert finding.status == "problem"
    assert words in finding.text
    assert finding.fix.endswith(f'pip install "{requirement}"')


def test_source_folder_without_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "distribution", missing)
    (found,) = problems(doctor.check_packages)
    folder = str(Path(__file__).parents[1])
    assert found.fix.endswith(f"pip install {folder}")
    assert doctor._reinstall_command().endswith(folder)


@pytest.mark.parametrize(
    "modules, statuses",
    [
        ({"numpy": "numpy", "yaml": "yaml.no_such_module"}, ["ok", "problem"]),
        ({"no_such_module": "no_such_module"}, ["absent"]),
        ({"numpy": "os; os.abort()"}, ["problem"]),  # a crash of the import is no crash of the doctor
    ],
)
def test_optional_packages(monkeypatch: pytest.MonkeyPatch, modules: dict[str, str], statuses: list[str]) -> None:
    monkeypatch.setattr(doctor, "_OPENMMLAB", modules)
    found = list(doctor.check_openmmlab())
    assert [finding.status for finding in found] == statuses
    assert all("pip install" in finding.fix for finding in found if finding.status != "ok")


def test_versions_that_a_package_does_not_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy<1", "torch", "surely-no-such-package>1", "timm<0.1; extra == 'old'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    (found,) = doctor._unmet("mmcv")
    assert found.status == "problem"
    assert "mmcv wants numpy<1" in found.text
    assert found.fix.endswith('"numpy<1"')


@pytest.mark.parametrize("compiled, words", [(True, "with its compiled operators"), (False, "torchvision's stand in")])
def test_whose_operators_heads_run_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: bool, words: str
) -> None:
    if compiled:
        (tmp_path / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    found = importlib.machinery.ModuleSpec("mmcv", None, is_package=True)
    found.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert words in doctor._operators("mmcv")


@pytest.mark.parametrize(
    "there, triton_runs, status", [(False, False, "problem"), (True, True, "problem"), (False, True, "absent")]
)
def test_missing_and_broken_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, triton_runs: bool, status: str
) -> None:
    """Without any fast backend the kernel is missed; with one, only a kernel that does not load is a problem."""
    library = tmp_path / "kernel.so"
    if there:
        library.touch()
    monkeypatch.setattr(native, "LIBRARY", library)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    reasons = {"naive": None, "cpu": "it is not there", "triton": None if triton_runs else "no GPU"}
    monkeypatch.setattr(ops, "backends", lambda: reasons)
    found = next(finding for finding in doctor.check_backends() if finding.text.startswith("cpu"))
    assert found.status == status
    assert "it is not there" in found.text
    assert "--force-reinstall" in found.fix
    if sys.platform == "linux":
        assert found.fix.startswith("sudo apt-get install g++ && ")


@needs_kernel
def test_wrong_instruction_set(
    monkeypatch: pytest.MonkeyPatch, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "library", functools.cache(native.library.__wrapped__))
    monkeypatch.setenv("BACKBONES_CPU_ISA", "mmx")
    monkeypatch.setattr(doctor, "_OPENMMLAB", {})
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "'mmx' is not one of avx512, avx2, baseline" in printed
    assert "1 problem:" in printed and "run: unset BACKBONES_CPU_ISA" in printed


@needs_kernel
@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_wrong_values_and_gradients(monkeypatch: pytest.MonkeyPatch, quick: None, which: str, factor: float) -> None:
    right = getattr(cpu, which)

    def wrong(*args: Any) -> Any:
        *others, last = right(*args)
        return (others[0] * factor, *others[1:], last)

    monkeypatch.setattr(cpu, which, wrong)
    (found,) = problems(doctor.check_scans)
    assert found.text.startswith("cpu: values or gradients are off by")
    assert "--force-reinstall" in found.fix


@needs_kernel
def test_kernel_slower_than_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_seconds", lambda name, device: 1.0 if name == "naive" else 2.0)
    (found,) = problems(doctor.check_scans)
    assert "0.5 times as fast as naive" in found.text


def test_help_is_printed_instead_of_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        doctor.main(["--help"])
    printed = capsys.readouterr().out
    assert "which command would change that" in printed and "Python 3" not in printed
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--verbos"])
