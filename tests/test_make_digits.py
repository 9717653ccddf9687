"""tools/make_digits.py: complete, reproducible data sets with exact annotations, and no harm to other folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.scripts import load_tool


@pytest.fixture(scope="module")
def make_digits() -> ModuleType:
    return load_tool("digits")


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
        make_digits.write_digits(tmp_path / name, "classification", {"size": 20, "resample": "bicubic"})
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
    settings = {"size": 8, "resample": "nearest"}
    assert make_digits.write_digits(tmp_path / "digits", "classification", settings)
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "7"], "--size is 7, expected 8 to 4096"),
        (["--size", "100000"], "--size is 100000, expected 8 to 4096"),
        (["--task", "segmentation", "--train", "1000000"], "--train and --val are at least 1 and at most 999999"),
        (["--task", "detection", "--size", "63"], "--size is 63, expected 64 to 4096"),
        (["--task", "detection", "--resample", "nearest"], "--resample has no meaning for --task detection"),
        (["--seed", "1"], "--seed has no meaning for --task classification"),
        (["--task", "segmentation", "--val", "0"], "--train and --val are at least 1"),
    ],
)
def test_arguments_are_checked(
    make_digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_digits.main(["--out", str(tmp_path / "digits"), *arguments], "digits.py")
    error = capsys.readouterr().err
    assert words in error and error.startswith("digits.py: error: ") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(
    make_digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert make_digits.main(["--out", str(tmp_path / "file" / "digits")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


SCENES = {"size": 80, "train": 40, "val": 12, "seed": 3}


@pytest.fixture(scope="module")
def coco(make_digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "coco"
    make_digits.write_digits(out, "detection", SCENES)
    return out


@pytest.fixture(scope="module")
def ade(make_digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "ade"
    make_digits.write_digits(out, "segmentation", SCENES)
    return out


def rasterise(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    mask = pytest.importorskip("pycocotools.mask")
    return mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))).astype(bool)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (13, 8), (31, 47)])
def test_outline_gives_the_mask_back(make_digits: ModuleType, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8, 1.0):  # specks that touch at corners, holes within parts, all pixels
        mask = rng.random(shape) < share
        if mask.any():
            np.testing.assert_array_equal(rasterise(make_digits.outline(mask), *shape), mask)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_annotations_are_exact(make_digits: ModuleType, coco: Path, split: str) -> None:
    content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
    assert [category["name"] for category in content["categories"]] == [str(digit) for digit in range(10)]
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
    scenes = list(make_digits.scenes(split, SCENES[split], SCENES["size"], SCENES["seed"], make_digits.DETECTION))
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    assert len(of_image) == len(scenes)
    for image, scene in zip(content["images"], scenes, strict=True):
        # JPEG at quality 95 moves pixels a little; another image would be tens of levels away.
        difference = load(coco / split / image["file_name"]).astype(int) - scene.image
        assert np.abs(difference).mean() < 6
        assert (image["height"], image["width"]) == scene.image.shape[:2]
        annotations = of_image[image["id"]]
        assert [a["category_id"] - 1 for a in annotations] == scene.labels
        for annotation, mask in zip(annotations, scene.masks, strict=True):
            np.testing.assert_array_equal(rasterise(annotation["segmentation"], *mask.shape), mask)
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() > 0
        assert scene.masks.sum(axis=0).max(initial=0) <= 1  # nothing covers anything


def test_some_scenes_are_empty_and_all_digits_occur(make_digits: ModuleType) -> None:
    labels = [scene.labels for scene in make_digits.scenes("train", 200, 64, 0, make_digits.DETECTION)]
    assert 0 < sum(not found for found in labels) < 30
    assert {label for found in labels for label in found} == set(range(10))


@pytest.mark.parametrize("split, folder", [("train", "training"), ("val", "validation")])
def test_label_maps_are_those_of_the_scenes(make_digits: ModuleType, ade: Path, split: str, folder: str) -> None:
    files = sorted((ade / "annotations" / folder).iterdir())
    assert [path.stem for path in files] == sorted(path.stem for path in (ade / "images" / folder).iterdir())
    scenes = make_digits.scenes(split, SCENES[split], SCENES["size"], SCENES["seed"], make_digits.SEGMENTATION)
    for path, scene in zip(files, scenes, strict=True):
        labels = load(path)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels == 0, scene.rim)
        digits = scene.masks.any(axis=0) & ~scene.rim
        np.testing.assert_array_equal(labels > 1, digits)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            assert np.unique(labels[mask & ~scene.rim]).tolist() == [label + 2]


def test_splits_share_neither_digits_nor_photographs(make_digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs whose red tells the column, digits whose grey tells the split."""
    columns = np.broadcast_to(np.arange(640) // 4, (427, 640))
    photograph = np.stack([columns, columns * 0, columns * 0], axis=-1).astype(np.uint8)
    pixels: dict[str, list[np.ndarray]] = {}
    chosen: dict[str, list[np.ndarray]] = {}
    monkeypatch.setattr(make_digits, "load_sample_images", lambda: type("Images", (), {"images": [photograph]}))
    for split in ("train", "val"):
        pixels[split], chosen[split] = [], []

        def compose(image: np.ndarray, scans: np.ndarray, *_: object, split: str = split) -> None:
            chosen[split].extend(scans)

        def crop(image: np.ndarray, *_: object, split: str = split) -> None:
            pixels[split].append(image[..., 0])

        with monkeypatch.context() as patch:
            patch.setattr(make_digits, "_compose", compose)
            patch.setattr(make_digits, "_crop", crop)
            list(make_digits.scenes(split, 300, 64, 0, make_digits.DETECTION))
    assert np.concatenate(pixels["train"]).max() < np.concatenate(pixels["val"]).min()
    digits = load_digits().images / 16
    held_out = [path.parts[0] == "val" for path in make_digits.image_paths(load_digits().target)]
    index = {scan.tobytes(): i for i, scan in enumerate(digits)}
    assert not any(held_out[index[scan.tobytes()]] for scan in chosen["train"])
    assert all(held_out[index[scan.tobytes()]] for scan in chosen["val"])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_scenes_depend_on_the_seed_alone(make_digits: ModuleType, tmp_path: Path, task: str) -> None:
    settings = {"size": 64, "train": 3, "val": 2, "seed": 1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert make_digits.write_digits(tmp_path / name, task, settings | {"seed": seed})
    names = [path for path in make_digits.expected_files(task, settings) if path.suffix != ".json"]
    contents = [[(tmp_path / folder / name).read_bytes() for name in names] for folder in "abc"]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    written = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert written == {*make_digits.expected_files(task, settings), Path("digits.json")}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_scenes_are_not_written_over_others(
    make_digits: ModuleType, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    assert make_digits.main(["--task", task, "--out", str(coco)]) == 2
    assert "remove it or choose another --out" in capsys.readouterr().err
    arguments = ["--task", task, "--out", str(tmp_path / "new"), "--train", "2", "--val", "1"]
    assert make_digits.main(arguments) == make_digits.main(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("new: 2 training and 1 validation images")
    assert second == f"{first} (already there)"
