"""The U-Net head in mmseg: published networks, losses of the papers, volumes, and the demonstration's tissue."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("mmseg")

from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from scipy.spatial.distance import cdist

import backbones
import backbones.mm.segmentation
from backbones.mm import BatchDiceLoss, BinaryDiceLoss, UserError, VolumeMetric
from backbones.mm.engine.volumes import dice_coefficient, hausdorff_95
from backbones.weights import CheckpointError
from tests.scripts import call_tool, load_tool
from tools import recordings
from tools.parity import official_file

CONFIGS = Path(__file__).parents[1] / "configs" / "medical"
DIMS = [8, 12, 16, 20]
THIN = {"dims": DIMS, "depths": (1, 1, 1, 1)}
VMAMBA = {"type": "VMamba", "arch": "vmamba_tiny_s1l8", "model_args": THIN}
PREPROCESSOR = {"type": "SegDataPreProcessor", "mean": [0.0] * 3, "std": [1.0] * 3, "test_cfg": {"size_divisor": 1}}


def build(backbone: dict, size: tuple[int, int] = (64, 64), **head: object) -> nn.Module:
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": PREPROCESSOR | {"size": size, "pad_val": 0, "seg_pad_val": 255},
        "backbone": backbone,
        "decode_head": {"type": "UNetHead", "depths": (0, 1, 1, 1), **head},
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(ConfigDict(config))
        model.init_weights()
    return model


def samples(labels: Tensor) -> list[SegDataSample]:
    shape = tuple(labels.shape[1:])
    meta = {"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "img_path": "x.png"}
    return [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=x[None])) for x in labels]


BINARY = {
    "num_classes": 2,
    "out_channels": 1,
    "threshold": 0.5,
    "loss_decode": [
        {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_name": "loss_bce"},
        {"type": "BinaryDiceLoss"},
    ],
}
NINE = {"num_classes": 9, "loss_decode": [{"type": "CrossEntropyLoss"}, {"type": "BatchDiceLoss"}]}


@pytest.mark.parametrize(("task", "dice"), [(BINARY, BinaryDiceLoss), (NINE, BatchDiceLoss)], ids=["one", "nine"])
def test_trained_and_predicted_at_an_odd_size(task: dict, dice: type[nn.Module]) -> None:
    model = build(VMAMBA, (45, 61), in_channels=DIMS, **task)
    images, labels = torch.randn(2, 3, 45, 61), torch.randint(0, task["num_classes"], (2, 45, 61))
    labels[:, 0] = 255
    losses = model.loss(images, samples(labels))
    sum(x for name, x in losses.items() if "loss" in name).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        logits = model.encode_decode(images, [x.metainfo for x in samples(labels)])
        whole = model.decode_head(model.backbone(images))
        assert whole.shape[2:] == (48, 64)
        # Cropped, not squeezed.
        assert torch.equal(logits, whole[:, :, :45, :61])
        torch.testing.assert_close(
            losses["decode.loss_dice"], dice()(model.train()._forward(images)[..., :45, :61], labels)
        )
        predicted = model.eval().predict(images, samples(labels))[0].pred_sem_seg.data
    expected = logits[0].sigmoid() > 0.5 if task is BINARY else logits[0].argmax(0, keepdim=True)
    assert torch.equal(predicted, expected.to(predicted))


@pytest.mark.parametrize(
    "backbone",
    [
        {"type": "mmseg.ResNetV1c", "depth": 18, "norm_cfg": {"type": "BN"}},
        {"type": "mmseg.MixVisionTransformer", "embed_dims": 8, "num_layers": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    ],
    ids=["ResNet", "MiT"],
)
def test_backbones_of_mmseg(backbone: dict) -> None:
    model = build(
        backbone, num_classes=3, block="conv", in_channels=[64, 128, 256, 512] if "depth" in backbone else [8] * 4
    )
    assert model.decode_head(model.backbone(torch.randn(2, 3, 50, 70))).shape == (2, 3, 52, 72)


NETWORKS = {
    "vm_unet": ("vm-unet_300e_isic-256x256.py", {}),
    "mhs_vm": ("mhs-vm-4head_300e_isic-256x256.py", {}),
    "msvm_unet": ("msvm-unet_300e_synapse-224x224.py", {"num_classes": 9}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_config_of_a_published_network(network: str, tmp_path: Path) -> None:
    """It computes what the plain module does, with the same file, through mmengine's own way to initialise models."""
    name, args = NETWORKS[network]
    plain = getattr(backbones, network)(**args).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    config = Config.fromfile(CONFIGS / name).model
    config.backbone.pop("init_cfg", None)
    config.init_cfg = {"type": "UNetWeights", "network": network, "checkpoint": str(tmp_path / "weights.pth")}
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config)
        model.init_weights()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()._forward(image), plain(image))


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = official_file(tmp_path, recordings.load("msvmunet_tiny_synapse_128x160"))
    config = Config.fromfile(CONFIGS / NETWORKS["vm_unet"][0]).model
    config.init_cfg = {"type": "UNetWeights", "network": "vm_unet", "checkpoint": str(file)}
    with DefaultScope.overwrite_default_scope("mmseg"), pytest.raises(CheckpointError, match="do not fit"):
        MODELS.build(config).init_weights()
    with pytest.raises(UserError, match="network: got 'unet'"):
        backbones.mm.segmentation.UNetWeights("unet", "file.pth")


def test_taps_are_of_all_stages() -> None:
    with pytest.raises(UserError, match="taps: got 'input', expected with it"):
        build(VMAMBA | {"taps": "input"}, in_channels=DIMS, num_classes=2)
    with pytest.raises(UserError, match="taps: got 'inputs'"):
        build(VMAMBA | {"taps": "inputs"}, in_channels=DIMS, num_classes=2)


def test_binary_dice_by_hand() -> None:
    logits, labels = torch.randn(3, 1, 4, 5, dtype=torch.float64), torch.randint(0, 2, (3, 4, 5))
    labels[0, 0, 0] = 255
    expected = 0.0
    for x, t in zip(logits, labels, strict=True):
        pairs = [(a.sigmoid().item(), b.item()) for a, b in zip(x.flatten(), t.flatten(), strict=True) if b != 255]
        overlap, sizes = sum(a * b for a, b in pairs), sum(a + b for a, b in pairs)
        expected += (1 - (2 * overlap + 1) / (sizes + 1)) / 3
    assert BinaryDiceLoss(loss_weight=2)(logits, labels).item() == pytest.approx(2 * expected, rel=1e-5)
    with pytest.raises(ValueError, match="pred: got 2 logits"):
        BinaryDiceLoss()(torch.randn(1, 2, 4, 4), labels)


def test_batch_dice_by_hand() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[1, 2, 3] = 255
    p, counted = logits.softmax(1), labels != 255
    expected = 0.0
    for k in range(3):
        a, t = p[:, k][counted], (labels[counted] == k).float()
        expected += (1 - (2 * (a @ t) + 1e-5) / (a @ a + t @ t + 1e-5)).item() / 3
    assert BatchDiceLoss()(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="pred: got 1 logits"):
        BatchDiceLoss()(logits[:, :1], labels)


def test_perfect_logits_cost_nothing() -> None:
    labels = torch.randint(0, 4, (2, 8, 8))
    sure = 100.0 * F.one_hot(labels, 4).movedim(-1, 1)
    assert BatchDiceLoss()(sure, labels).item() == pytest.approx(0, abs=1e-5)
    assert BinaryDiceLoss()(200.0 * (labels > 1).unsqueeze(1) - 100, labels > 1).item() == pytest.approx(0, abs=1e-5)


def brute_hausdorff(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    def surface(mask: np.ndarray) -> np.ndarray:
        cells = []
        for cell in np.argwhere(mask):
            around = [cell + sign * step for step in np.eye(mask.ndim, dtype=int) for sign in (1, -1)]
            if not all(np.all((x >= 0) & (x < mask.shape)) and mask[tuple(x)] for x in around):
                cells.append(cell * np.array(spacing))
        return np.array(cells)

    distances = cdist(surface(a), surface(b))
    return float(np.percentile(np.concatenate([distances.min(1), distances.min(0)]), 95))


@pytest.mark.parametrize("shape", [(9, 12), (5, 8, 7)])
def test_hausdorff_by_hand(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    spacing = (3.0, 1.0, 0.5)[-len(shape) :]
    for share in (0.1, 0.6, 0.95):
        a, b = (rng.random(shape) < share for _ in range(2))
        assert hausdorff_95(a, b, spacing) == pytest.approx(brute_hausdorff(a, b, spacing))
    assert hausdorff_95(a, a, spacing) == 0


def slice_sample(name: str, predicted: np.ndarray, true: np.ndarray) -> dict:
    both = {"pred_sem_seg": predicted, "gt_sem_seg": true}
    return {"img_path": f"/data/{name}.png", **{k: {"data": torch.from_numpy(x)[None]} for k, x in both.items()}}


def test_volumes_are_put_together_from_slices() -> None:
    rng = np.random.default_rng(0)
    predicted, true = (rng.integers(0, 3, (2, 4, 6, 7)) for _ in range(2))
    true[1][true[1] == 2] = 0  # the second volume has no class 2, and none is predicted
    predicted[1][predicted[1] == 2] = 1
    with DefaultScope.overwrite_default_scope("mmseg"):
        metric = METRICS.build(
            {"type": "VolumeMetric", "volume": r"(?P<volume>\w+)_slice(?P<slice>\d+)", "spacing": (2, 1, 1)}
        )
    metric.dataset_meta = {"classes": ("ground", "liver", "spleen")}
    order = [(v, i) for v in range(2) for i in (2, 0, 3, 1)]
    for v, i in order:
        metric.process(None, [slice_sample(f"case{v}_slice{i:03d}", predicted[v, i], true[v, i])])
    found = metric.evaluate(8)
    liver = [100 * dice_coefficient(predicted[v] == 1, true[v] == 1) for v in range(2)]
    spleen = 100 * dice_coefficient(predicted[0] == 2, true[0] == 2)
    assert found["Dice_liver"] == pytest.approx(np.mean(liver))
    assert found["Dice_spleen"] == pytest.approx(spleen)
    assert found["Dice"] == pytest.approx((np.mean(liver) + spleen) / 2)
    far = [hausdorff_95(predicted[v] == 1, true[v] == 1, (2, 1, 1)) for v in range(2)]
    assert found["HD95"] == pytest.approx((np.mean(far) + hausdorff_95(predicted[0] == 2, true[0] == 2, (2, 1, 1))) / 2)


def test_a_class_in_one_of_them_alone_has_no_dice() -> None:
    empty, full = np.zeros((4, 4), int), np.eye(4, dtype=int)
    metric = VolumeMetric()
    metric.process(
        None, [slice_sample("a", full, empty), slice_sample("b", full, full), slice_sample("c", empty, empty)]
    )
    assert metric.evaluate(3) == {"Dice": 50.0, "HD95": 0.0, "Dice_1": 50.0}


def test_names_that_are_no_slices() -> None:
    empty = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match=r"volume: got 'case', expected groups"):
        VolumeMetric("case")
    metric = VolumeMetric(r"(?P<volume>\w)_(?P<slice>\d)")
    with pytest.raises(ValueError, match=r"volume: 'abc' does not match"):
        metric.process(None, [slice_sample("abc", empty, empty)])
    metric.process(None, [slice_sample("a_1", empty, empty)] * 2)
    with pytest.raises(ValueError, match="slice 1 of 'a' is there twice"):
        metric.evaluate(2)


def test_masks_of_lesions(tmp_path: Path) -> None:
    mask = np.array([[0, 127, 128, 255]] * 3, np.uint8)
    for folder, name, content in (
        ("images", "ISIC_1.jpg", np.zeros((3, 4, 3), np.uint8)),
        ("masks", "ISIC_1_segmentation.png", mask),
    ):
        (tmp_path / folder).mkdir()
        Image.fromarray(content).save(tmp_path / folder / name)
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = DATASETS.build(
            {
                "type": "ISICDataset",
                "data_root": str(tmp_path),
                "data_prefix": {"img_path": "images", "seg_map_path": "masks"},
                "pipeline": [{"type": "LoadImageFromFile"}, {"type": "LoadMask"}, {"type": "PackSegInputs"}],
            }
        )
    assert dataset.metainfo["classes"] == ("skin", "lesion")
    assert dataset[0]["data_samples"].gt_sem_seg.data.tolist() == [[[0, 0, 1, 1]] * 3]


def test_tissue(tmp_path: Path) -> None:
    """Splits do not overlap, and running again changes nothing."""
    tool = load_tool("tissue")
    out = tmp_path / "tissue"
    arguments = ["--out", str(out), "--train", "3", "--size", "64"]
    assert tool.main(arguments) == 0
    files = sorted(out.rglob("*.png"))
    assert len(files) == 12
    before = [x.stat().st_mtime_ns for x in files]
    assert tool.main(arguments) == 0
    assert [x.stat().st_mtime_ns for x in files] == before
    assert tool.main([*arguments[:3], "4"]) == 2
    assert tool.main([*arguments, "--seed", "1"]) == 2
    for kind, split, shape in (("annotations", "training", (64, 64)), ("images", "validation", (192, 192, 3))):
        content = np.asarray(Image.open(out / kind / split / "000000.png"))
        assert content.shape == shape
        assert kind == "images" or set(np.unique(content)) <= {0, 1}
    image = tool.data.immunohistochemistry()
    share = tool.mask_of(image).mean()
    assert 0.4 < share < 0.7
    for pair in tool.crops(50, 64, 0)["training"]:
        assert pair[0].shape == (64, 64, 3)
    assert image.shape[0] == tool.SPLIT_ROW + tool.WINDOW


SMALL = """
_base_ = ["{config}"]
widths = [8, 12, 16, 20]
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(model_args=dict(dims=widths)),
    decode_head=dict(in_channels=widths),
)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
train_dataloader = dict(batch_size=2, dataset=dict(data_root="{data}"))
val_dataloader = dict(dataset=dict(data_root="{data}"))
test_dataloader = val_dataloader
"""


@pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")
def test_trained_tested_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demonstration, smaller."""
    data = tmp_path / "tissue"
    assert load_tool("tissue").main(["--out", str(data), "--train", "4", "--size", "32"]) == 0
    (tmp_path / "small.py").write_text(SMALL.format(config=CONFIGS / "unet_vmamba-tiny-s1l8_tissue.py", data=data))
    monkeypatch.chdir(tmp_path)
    for arguments in (["train", "small.py"], ["test", "small.py", "run"]):
        call_tool(*arguments, "--work-dir", "run")
    assert re.search(r"^Dice [\d.]+ .*Dice_epithelium [\d.]+  \(3 images, ", capsys.readouterr().out, re.MULTILINE)
    with Image.open("run/predictions.png") as picture:
        assert np.asarray(picture).std() > 1
