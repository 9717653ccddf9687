"""What tools write: refused before any work where it cannot be written, and whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from backbones.commands import benchmark
from backbones.commands.outputs import unwritable, unwritable_folder
from backbones.images import write_picture
from tests.scripts import load_tool

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs/digits/vim-tiny_digits.py"


@pytest.fixture
def wrong(tmp_path: Path) -> dict[str, Path]:
    """Names that no picture can have; a process of root's is kept out by none of permissions' ways."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    return {
        "below a file": tmp_path / "file" / "a.png",
        "a folder": tmp_path / "folder.png",
        "another ending": tmp_path / "a.jpg",
        "no folder": tmp_path / "absent" / "a.png",
        "a system of its own": Path("/proc/a.png"),
    }


def test_reasons(wrong: dict[str, Path], tmp_path: Path) -> None:
    assert unwritable(tmp_path / "a.png", ".png") is None
    assert unwritable(tmp_path / "a.png", ".pdf", ".png") is None
    assert ".pdf or .svg" in unwritable(tmp_path / "a.png", ".pdf", ".svg")
    assert all(unwritable(path, ".png") for path in wrong.values())
    assert unwritable_folder(tmp_path / "new" / "folder") is None
    assert not (tmp_path / "new").exists()
    assert str(tmp_path / "file") in unwritable_folder(tmp_path / "file")
    assert not list(tmp_path.glob("a.png"))


def command_lines(out: Path) -> dict[str, list[object]]:
    return {
        "browse": [DIGITS, "--out", out],
        "analyze": [".", "--out", out],
        "visualize": ["orders", "cross", "--out", out],
    }


@pytest.mark.parametrize("name", ["browse", "analyze", "visualize"])
@pytest.mark.parametrize("kind", ["below a file", "a folder", "another ending", "no folder", "a system of its own"])
def test_tools_refuse_an_unwritable_picture_first(
    wrong: dict[str, Path],
    name: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name != "visualize":
        pytest.importorskip("mmengine")
    module = load_tool(name)

    def work(*_: Any) -> None:
        raise AssertionError("work before the refusal")

    for function in ("read_config", "read_run", "picture_of_orders"):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, work)
    assert status(module, name, command_lines(wrong[kind])[name], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: error: --out: ") and len(error.splitlines()) == 1


def status(module: Any, name: str, arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a tool's command line."""
    return module.main([str(x) for x in arguments], f"{name}.py")


def test_inference_refuses_its_folder_first(
    wrong: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmengine")
    module = load_tool("inference")
    monkeypatch.setattr(module, "read_image", lambda path: pytest.fail("work before the refusal"))
    arguments = ["a.png", "--config", DIGITS, "--checkpoint", "x.pth", "--out", wrong["below a file"].parent]
    assert status(module, "inference", arguments, monkeypatch) == 2
    assert "--out: nothing can be written to" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "suffix"), [("--onnx", "onnx"), ("--pt2", "pt2")])
def test_export_refuses_an_unwritable_file_first(
    option: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    module = load_tool("export")
    monkeypatch.setattr(module, "_create", lambda *_: pytest.fail("work before the refusal"))
    (tmp_path / f"a.{suffix}").mkdir()
    for path in (tmp_path / f"a.{suffix}", Path(f"/proc/a.{suffix}")):
        assert status(module, "export", ["vim_tiny", option, path], monkeypatch) == 2
        assert f"export.py: error: {option}: " in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(_: Figure, partial: Path, **__: Any) -> None:
        Path(partial).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        with pytest.raises(OSError, match="No space left"):
            write_picture(Figure(), path)
        pytest.importorskip("mmengine")
        from backbones.mm import UserError
        from backbones.mm.app import pictures

        with pytest.raises(UserError, match=r"cannot write .*a\.png: .*No space left"):
            pictures.save(Figure(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"
    write_picture(Figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["model", "vim_tinny"], ["model", "vim_tiny", "--against", "deitt"]])
def test_benchmark_names_a_mistyped_model(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: pytest.fail("work before the refusal"))
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unknown model '{arguments[-1]}'; did you mean ") and len(error.splitlines()) == 1


def test_benchmark_refuses_an_unwritable_file_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: pytest.fail("work before the refusal"))
    assert benchmark.main(["model", "vim_tiny", "--csv", str(tmp_path)]) == 2
    assert "--csv: got" in capsys.readouterr().err
