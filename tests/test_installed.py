"""The library as it is installed from its wheel: every command, in folders that know no clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest
from PIL import Image

from tests.test_packaging import ROOT, repository_files

pytestmark = pytest.mark.slow
Run = Callable[..., str]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(command: list[object], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process outside of the clone that runs this test."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = inherited | ONE_THREAD | environment
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)


def pip(*arguments: object, cwd: Path, **environment: str) -> str:
    options = ["--no-deps", "--no-index"]
    done = run([sys.executable, "-m", "pip", arguments[0], *options, *arguments[1:]], cwd, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    clone = folder / "clone"
    for path in repository_files():
        copy = clone / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy, follow_symlinks=False)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = run([sys.executable, "-c", build, folder], clone)
    assert done.returncode == 0, done.stderr[-1000:]
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``ssm-backbones`` of an installation beside which there are only its dependencies."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--target", site, wheel, cwd=site)
    others = [entry for entry in sys.path if entry and not (Path(entry) / "backbones" / "__init__.py").is_file()]

    def call(*arguments: object, cwd: Path, status: int = 0) -> str:
        path = os.pathsep.join([str(site), *others])
        done = run([site / "bin" / "ssm-backbones", *arguments], cwd, PYTHONPATH=path)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    where = "import backbones, backbones.configs as c; print(backbones.__file__, c.folder())"
    done = run([sys.executable, "-c", where], site, PYTHONPATH=os.pathsep.join([str(site), *others]))
    assert done.stdout.split() == [str(site / "backbones/__init__.py"), str(site / "backbones/.mim/configs")], done
    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_the_wheel_carries_configs_and_a_page_for_the_index(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = message_from_bytes(next(file.read(x) for x in names if x.endswith(".dist-info/METADATA")))
    packed = {name for name in names if name.startswith("backbones/.mim/")}
    kept = [*(ROOT / "configs").rglob("*.py"), *(ROOT / "configs").rglob("*.yml"), ROOT / "model-index.yml"]
    kept += [ROOT / "tools" / "train.py", ROOT / "tools" / "test.py"]
    assert packed == {f"backbones/.mim/{path.relative_to(ROOT).as_posix()}" for path in kept}
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"].startswith("text/markdown") and len(page) > 1000
    assert all(re.match("https?:|#", target) for target in re.findall(r"\]\(([^)\s]+)\)", page))
    kernel = any(name.endswith((".so", ".dylib", ".dll")) for name in names)
    assert wheel.name.endswith("-py3-none-any.whl") != kernel


def test_a_wheel_without_the_kernel_is_named_so_and_says_it_once(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    options = ["--verbose", "--no-build-isolation", "--wheel-dir", tmp_path]
    printed = pip("wheel", *options, copy, cwd=tmp_path, CC="false", CXX="false")
    (found,) = tmp_path.glob("*.whl")
    assert found.name.endswith("-py3-none-any.whl") and found.name in printed
    assert printed.count("the C++ kernel was not built") == 1 and "install g++ or clang++" in printed
    with zipfile.ZipFile(found) as file:
        assert not [name for name in file.namelist() if name.endswith((".so", ".dylib", ".dll"))]
        about = next(file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: true" in about and "Tag: py3-none-any" in about


def test_the_source_distribution_carries_what_its_tests_need(source: Path) -> None:
    done = run([sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"], source, PYTHONPATH=".")
    assert done.returncode == 0, done.stdout[-2000:]
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected >= {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_c*.py")}
    missing = {path.relative_to(ROOT).as_posix() for path in repository_files()} - {
        path.relative_to(source).as_posix() for path in source.rglob("*")
    }
    assert not {name for name in missing if not name.startswith(".")}


def test_demo_then_test_and_inference_from_its_folder(command: Run, folder: Path) -> None:
    printed = command("demo", cwd=folder)
    assert float(re.search(r"^top1 ([\d.]+) ", printed, re.MULTILINE)[1]) >= 95, printed[-1000:]
    picture, checkpoint = (re.search(rf"^{x} +(.+)$", printed, re.MULTILINE)[1] for x in ("picture", "checkpoint"))
    assert (folder / checkpoint).is_file()
    with Image.open(folder / picture) as image:
        image.load()
    run_dir = Path(checkpoint).parent
    assert command("test", run_dir, cwd=folder).splitlines()[-1].startswith("top1 ")
    digit = next((folder / "data/digits/val/7").glob("*.png"))
    line = command("inference", digit, "--checkpoint", run_dir, cwd=folder).splitlines()[-1]
    assert re.search(r": 7 0\.\d+", line) and Path(folder, line.rsplit("(", 1)[1].rstrip(")")).is_file()


def test_models_flops_and_export(command: Run, folder: Path) -> None:
    assert "vmamba_tiny_s1l8\t30.2\t4.91\t82.6" in command("models", cwd=folder)
    printed = command("flops", "vim-tiny_digits", cwd=folder)
    assert printed.startswith("vim-tiny_digits, 24 x 24 pixels\n")
    arguments = ["efficientvmamba_tiny", "--img-size", "64", "--pt2", "model.pt2"]
    assert "outputs within" in command("export", *arguments, cwd=folder)
    assert (folder / "model.pt2").is_file()
    assert "did you mean" in command("train", "vim-tiny_digit", cwd=folder, status=2)


def test_detection_trains_for_an_epoch(command: Run, folder: Path) -> None:
    pytest.importorskip("mmdet")
    config = "mask-rcnn_vmamba-tiny-s1l8_fpn_digits"
    data = ["--task", "detection", "--out", "data/digits_coco", "--train", "40", "--val", "8"]
    command("data", "digits", *data, cwd=folder)
    printed = command("train", config, "--cfg-options", "train_cfg.max_epochs=1", cwd=folder)
    assert re.search(r"epoch 1/1.*box AP", printed, re.DOTALL)
    assert re.search(r"box AP .*\(8 images, ", command("test", f"work_dirs/{config}", cwd=folder))


def test_openmmlab_finds_the_configs_by_the_package(command: Run, wheel: Path, tmp_path: Path) -> None:
    """In a process of mmengine's that knows no file of the clone."""
    pip("install", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    code = (
        "import backbones.mm; from mmengine.hub import get_config; "
        "print(get_config('backbones::imagenet/vim-tiny_8xb128_in1k.py').filename)"
    )
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=path)
    assert done.stdout.strip() == f"{tmp_path}/site/backbones/.mim/configs/imagenet/vim-tiny_8xb128_in1k.py", done
