"""The configs that come with the package: found by name here, by mmengine, and by every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbones import configs
from tests.scripts import load_tool

ROOT = Path(__file__).parents[1]
NAME = "vim-tiny_digits"
FILE = ROOT / "configs" / "digits" / f"{NAME}.py"


def test_every_config_has_a_name_of_its_own() -> None:
    files = [path for path in (ROOT / "configs").glob("*/*.py") if path.parent.name != "_base_"]
    assert len(files) > 100 and sorted(path.resolve() for path in files) == sorted(configs.by_name().values())


@pytest.mark.parametrize(
    "name", [NAME, f"{NAME}.py", f"digits/{NAME}", f"digits/{NAME}.py", f"backbones::digits/{NAME}.py"]
)
def test_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.find(name) == FILE
    assert configs.is_config(name)


def test_a_file_comes_before_a_name_and_a_run_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path(f"{NAME}.py")
    own.touch()
    assert configs.find(own.name) == own
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="folder run holds no config of a run"):
        configs.find("run")
    (tmp_path / "run" / "a.py").touch()
    assert configs.find("run") == Path("run", "a.py")
    (tmp_path / "run" / "b.py").touch()
    with pytest.raises(ValueError, match=r"folder run holds several configs: a\.py, b\.py"):
        configs.find("run")


@pytest.mark.parametrize("name", ["vim-tiny_digit", "imagenet/vim-tiny_digits.py", "configs/digits/vim-tiny_digit.py"])
def test_an_unknown_name_is_answered_with_near_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"config {name} does not exist; did you mean .*{NAME}"):
        configs.find(name)


def test_an_installation_without_configs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "backbones" / "configs.py"))
    with pytest.raises(FileNotFoundError, match="installed without its configs"):
        configs.folder()


@pytest.mark.parametrize("command", ["flops", "train"])
def test_commands_take_names(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmengine")
    tool = load_tool(command)
    if command == "flops":
        assert tool.main([NAME]) == 0
        assert capsys.readouterr().out.startswith(f"{NAME}, 24 x 24 pixels\n")
    assert tool.main(["vim-tiny_digit.py"], command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{command}: error: config vim-tiny_digit.py does not exist; did you mean ")
    assert NAME in error and len(error.splitlines()) == 1


def test_mmengine_finds_them() -> None:
    pytest.importorskip("mmengine")
    from mmengine.config import Config
    from mmengine.hub import get_config

    import backbones.mm  # noqa: F401

    expected = Config.fromfile(FILE)
    assert get_config(f"backbones::digits/{NAME}.py").to_dict() == expected.to_dict()


@pytest.mark.parametrize("name", [f"digits/{NAME}", "coco/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco"])
def test_a_config_of_ours_is_a_base(name: str, tmp_path: Path) -> None:
    """Its types stay in the scope of the config, as if the base were a file."""
    pytest.importorskip("mmengine")
    from mmengine.config import Config

    import backbones.mm  # noqa: F401

    own = tmp_path / "own.py"
    own.write_text(f'_base_ = "backbones::{name}.py"\nextra = 1\n')
    config = Config.fromfile(own).to_dict()
    assert config.pop("extra") == 1
    assert config == Config.fromfile(ROOT / "configs" / f"{name}.py").to_dict()
    assert "_scope_" not in str(config)
