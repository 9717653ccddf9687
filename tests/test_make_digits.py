"""tools/make_digits.py: a complete, stratified, reproducible image folder, and no harm to other folders."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[1] / "tools" / "make_digits.py"


@pytest.fixture(scope="module")
def make_digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def native(make_digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    assert make_digits.main(["--out", str(out), "--size", "8", "--resample", "nearest"]) == 0
    return out


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_native_images_are_the_scans(native: Path) -> None:
    digits = load_digits()
    files = sorted(native.glob("*/*/*.png"), key=lambda path: path.stem)
    assert [int(path.stem) for path in files] == list(range(1797))
    assert [int(path.parent.name) for path in files] == digits.target.tolist()
    pixels = np.stack([load(path) for path in files])
    np.testing.assert_array_equal(np.round(pixels * (16 / 255)), digits.images)


def test_split_is_stratified_and_disjoint(native: Path) -> None:
    train, val = (list((native / split).glob("*/*.png")) for split in ("train", "val"))
    assert (len(train), len(val)) == (1438, 359)
    assert not {path.name for path in train} & {path.name for path in val}
    held_out = Counter(path.parent.name for path in val)
    total = Counter(map(str, load_digits().target))
    assert all(abs(held_out[digit] - total[digit] / 5) < 1 for digit in total)


def test_size_and_bytes_are_reproducible(make_digits: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_digits.write_digits(tmp_path / name, 20, "bicubic")
    sample = Path("train", "0", "0000.png")
    assert load(tmp_path / "a" / sample).shape == (20, 20)
    assert (tmp_path / "a" / sample).read_bytes() == (tmp_path / "b" / sample).read_bytes()


def test_complete_folder_is_left_alone_and_gaps_are_filled(
    make_digits: ModuleType, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(native), "--size", "8", "--resample", "nearest"]
    first, second = sorted(native.glob("val/*/*.png"))[:2]
    time = first.stat().st_mtime_ns
    assert make_digits.main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == time
    content = second.read_bytes()
    second.unlink()
    assert make_digits.main(arguments) == 0
    assert second.read_bytes() == content


def test_interrupted_run_starts_over(make_digits: ModuleType, tmp_path: Path) -> None:
    partial = tmp_path / "digits.partial"
    partial.mkdir()
    (partial / "half.png").touch()
    assert make_digits.write_digits(tmp_path / "digits", 8, "nearest")
    assert not partial.exists()
    assert not list(tmp_path.glob("**/half.png"))


@pytest.mark.parametrize("size", [8, 9])
def test_other_folders_are_refused(
    make_digits: ModuleType, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    if size == 8:  # foreign content
        out = tmp_path
        (out / "thesis.txt").write_text("years of work")
    else:  # digits, but other ones
        out = native
    before = sorted(out.rglob("*"))
    assert make_digits.main(["--out", str(out), "--size", str(size), "--resample", "nearest"]) == 2
    assert str(out) in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_size_below_the_scans_is_refused(make_digits: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_digits.main(["--out", str(tmp_path / "digits"), "--size", "7"])
