"""``ssm-backbones train --data FOLDER --model NAME``: what is found, what is chosen, the config that is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.image_folders import write_images

pytest.importorskip("mmengine")

from mmengine.config import Config

from backbones.commands import train
from backbones.mm import ArrayFolder, ImageFolder, UserError
from backbones.mm.app import recipe
from backbones.mm.engine.checkpoints import find_latest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")


def paint(folder: Path, classes: int, images: int) -> None:
    write_images(folder.parent, {folder.name: images}, classes, noise=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``split`` with train/ and val/, ``flat`` with classes alone, ``one`` class, ``none``."""
    path = tmp_path_factory.mktemp("recipe")
    paint(path / "split" / "train", 3, 8)
    paint(path / "split" / "valid", 3, 2)
    paint(path / "flat", 3, 10)
    paint(path / "one", 1, 4)
    (path / "none").mkdir()
    return path


@pytest.fixture
def call(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def called(data: str, *arguments: object) -> int:
        return train.main(["--data", str(folder / data), *map(str, arguments)], "ssm-backbones train")

    return called


SCRATCH = ("--model", "vim_tiny", "--from-scratch", "--image-size", 16)
SHALLOW = ("--cfg-options", "model.network.depth=1", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0")


def test_trains_without_a_config_and_again_with_the_one_that_it_wrote(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("split", *SCRATCH, "--epochs", 1, *SHALLOW) == 0
    printed = capsys.readouterr().out
    assert "3 classes, 24 training and 6 validation images" in printed
    assert "7.0 M parameters, from random weights, 1 epoch of 16 x 16 pixels in batches of 3" in printed
    file = Path("work_dirs/vim_tiny_split.py")
    assert f"config: {file}" in printed
    assert find_latest("work_dirs/vim_tiny_split") is not None
    text = file.read_text()
    file.write_text(text.replace("hflip=0.5", "hflip=0.0"))
    assert call("split", *SCRATCH, "--epochs", 1) == 2
    assert "is there already" in capsys.readouterr().err
    assert train.main([str(file), "--resume", *SHALLOW], "ssm-backbones train") == 0  # in the same work directory
    # Fine-tuning from a file, to another number of classes and another size.
    weights = sorted(Path("work_dirs/vim_tiny_split").glob("best*"))[0]
    options = ("--model", "vim_tiny", "--weights", weights, "--image-size", 32, "--epochs", 1, *SHALLOW)
    assert call("flat", *options) == 0
    printed = capsys.readouterr().out
    assert f"fine-tuned from {weights}" in printed and "8 validation" not in printed


def test_held_out_images_are_an_even_share_of_each_class(folder: Path, call: Callable[..., int]) -> None:
    data = {"data_root": str(folder / "flat"), "split": "", "transform": {"input_size": 16}}
    for share, expected in ((0.2, [4, 9]), (0.25, [3, 7]), (0.5, [1, 3, 5, 7, 9])):
        parts = [ImageFolder(**data, subset=name, val_share=share) for name in ("train", "val")]
        train, val = ({x["img_path"] for x in (part.get_data_info(i) for i in range(len(part)))} for part in parts)
        assert not train & val and len(train | val) == 30
        assert sorted(int(Path(path).stem) for path in val if Path(path).parent.name == "1") == expected
    with pytest.raises(UserError, match="subset: got 'test'"):
        ImageFolder(**data, subset="test")
    with pytest.raises(UserError, match="val_share: got 1"):
        ImageFolder(**data, subset="val", val_share=1)
    assert call("flat", *SCRATCH, "--write-only", "--val-share", 0.3) == 0
    config = Config.fromfile("work_dirs/vim_tiny_flat.py")
    sizes = [len(ImageFolder(**x)) for x in (_dataset(config, "train"), _dataset(config, "val"))]
    assert sizes == [21, 9]


def _dataset(config: Config, part: str) -> dict[str, Any]:
    dataset = dict(config[f"{part}_dataloader"].dataset)
    dataset.pop("type")
    return dataset


def data_of(images: int) -> recipe.Data:
    return recipe.Data(Path("data"), "train", "val", None, 10, (images, images // 5))


def test_the_recipe_follows_the_number_of_images_and_the_size_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "fetch_weights", lambda checkpoint, arch: checkpoint)
    tuned = [recipe.choose("vmamba_tiny_s1l8", data_of(n)) for n in (100, 1_000, 5_000, 100_000)]
    assert [x.epochs for x in tuned] == [50, 50, 20, 10]
    assert [x.batch_size for x in tuned] == [12, 64, 64, 64]
    assert not any(x.mixup for x in tuned) and {x.lr for x in tuned[1:]} == {1e-4} and tuned[0].lr < 1e-4
    fresh = [recipe.choose("vmamba_tiny_s1l8", data_of(n), None) for n in (1_000, 20_000, 100_000)]
    assert [x.epochs for x in fresh] == [300, 150, 100]
    assert [x.mixup for x in fresh] == [False, True, True]
    rates = [recipe.choose(name, data_of(1_000)).drop_path_rate for name in ("vim_tiny", "vim_small", "vim_base")]
    assert rates == [0.0, 0.1, 0.2]
    assert recipe.choose("vim_base", data_of(1_000)).batch_size == 32
    assert recipe.choose("vim_tiny", data_of(1_000), epochs=1).warmup_epochs == 0


@pytest.mark.parametrize("weights", ["published", None])
@pytest.mark.parametrize("images", [1_000, 50_000])
def test_every_recipe_is_a_config_with_the_usual_runtime(
    images: int, weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "fetch_weights", lambda checkpoint, arch: checkpoint)
    data = data_of(images)
    text = recipe.write(recipe.choose("vmamba_tiny_s1l8", data, weights), data, Path("mine.py"))
    (tmp_path / "mine.py").write_text(text)
    config, runtime = (
        Config.fromfile(file) for file in (tmp_path / "mine.py", ROOT / "configs" / "_base_" / "default_runtime.py")
    )
    assert {key: config[key] for key in runtime} == dict(runtime)
    assert (config.model.loss.type == "SoftTargetCrossEntropy") == (weights is None and images == 50_000)
    assert ("init_cfg" in config.model) == (weights is not None)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("nowhere", SCRATCH, "data folder .*nowhere does not exist"),
        ("none", SCRATCH, "holds no images in class folders"),
        ("one", SCRATCH, "holds one class, '0', expected at least two"),
        ("flat", ("--model", "vim_tinny", "--from-scratch"), "unknown model 'vim_tinny'; did you mean vim_tiny"),
        ("flat", ("--model", "resnet18"), "unknown model 'resnet18'"),
        ("flat", ("--from-scratch",), "--data needs --model NAME"),
        ("flat", (*SCRATCH, "--weights", "x.pth"), "--weights and --from-scratch exclude each other"),
        ("flat", ("--model", "vim_tiny", "--weights", "x.pth"), "no weight file at x.pth.*--from-scratch"),
        ("flat", ("--model", "lbvim_tiny"), "released no weights.*--weights FILE or --from-scratch"),
        ("flat", (*SCRATCH, "--val-share", 2), "--val-share: got 2.0"),
        ("flat", (*SCRATCH, "--val-share", 0.01), "has no image for subset=.val. with val_share=0.01"),
        ("flat", (*SCRATCH, "--epochs", 0), "--epochs: got 0, expected at least 1"),
        ("flat", (*SCRATCH, "--launcher", "pytorch"), "--data runs in one process"),
        ("flat", (*SCRATCH, "--work-dir", "/proc/x/y"), "cannot write"),
        ("flat", ("digits.py", *SCRATCH), "--data writes a config, got digits.py beside it"),
    ],
)
def test_mistakes_get_one_line(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], data: str, arguments: tuple, message: str
) -> None:
    assert call(data, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_options_of_own_images_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["digits.py", "--epochs", "3"], "train") == 2
    assert "--epochs goes with --data" in capsys.readouterr().err
    assert train.main([], "train") == 2
    assert "expected a config, or --data FOLDER and --model NAME" in capsys.readouterr().err


def test_arrays_of_many_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label, images in (("field", 5), ("water", 10)):
        (tmp_path / "bands" / label).mkdir(parents=True)
        for i in range(images):
            np.save(tmp_path / "bands" / label / f"{i}.npy", rng.integers(0, 4000, (18, 20, 12)).astype(np.uint16))
    options = ["--data", "bands", "--model", "vim_tiny", "--from-scratch", "--image-size", "16", "--epochs", "1"]
    assert train.main([*options, *SHALLOW], "train") == 0
    config = Config.fromfile("work_dirs/vim_tiny_bands.py")
    assert config.model.network.in_chans == 12 and config.train_dataloader.dataset.type == "ArrayFolder"
    assert len(config.normalisation.mean) == 12 and 1900 < config.normalisation.mean[0] < 2100
    images = ArrayFolder(**_dataset(config, "train"))
    assert images[0]["inputs"].shape == (12, 16, 16) and abs(images[0]["inputs"].mean()) < 0.5
    np.save(tmp_path / "bands" / "water" / "3.npy", np.zeros((4, 5, 3)))
    with pytest.raises(UserError, match=r"3.npy: an array of shape \(4, 5, 3\), expected \(height, width, 12\)"):
        [images[i] for i in range(len(images))]
    capsys.readouterr()
    assert train.main(options, "train") == 2
    assert re.search(r"arrays of shapes .*expected \(height, width, channels\)", capsys.readouterr().err)
    (tmp_path / "bands" / "water" / "3.npy").write_bytes(b"")
    assert train.main(options, "train") == 2
    assert "cannot read its arrays" in capsys.readouterr().err


def test_one_channel_of_grey(call: Callable[..., int]) -> None:
    assert call("flat", *SCRATCH, "--gray", "--write-only") == 0
    config = Config.fromfile("work_dirs/vim_tiny_flat.py")
    assert config.model.network.in_chans == 1
    assert ImageFolder(**_dataset(config, "train"))[0]["inputs"].shape == (1, 16, 16)
    assert ImageFolder(**_dataset(config, "val"))[0]["inputs"].shape == (1, 16, 16)


def test_transforms_of_arrays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    array = np.arange(8 * 6 * 2, dtype=np.float64).reshape(8, 6, 2)
    np.save(tmp_path / "a" / "0.npy", array)
    settings = {"input_size": 6, "mean": [1.0, 2.0], "std": [2.0, 4.0], "crop_pct": 1.0}
    (sample,) = ArrayFolder(str(tmp_path), "", settings)
    expected = (torch.from_numpy(array[1:7]).permute(2, 0, 1).float() - torch.tensor([1.0, 2.0])[:, None, None]) / 2
    torch.testing.assert_close(sample["inputs"], expected / torch.tensor([1.0, 2.0])[:, None, None])
    with pytest.raises(UserError, match="got 2 means and 1 deviations"):
        ArrayFolder(str(tmp_path), "", {**settings, "std": [1.0]})
    with pytest.raises(UserError, match="unexpected keyword argument 'color_jitter'"):
        ArrayFolder(str(tmp_path), "", {**settings, "color_jitter": 0.4})
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no arrays \(.npy\) in class folders"):
        ArrayFolder(str(tmp_path), "empty", settings)
