"""Test-time augmentation: views of an image, predictions that are merged, and `test --tta` for all three tasks."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.structures import InstanceData, PixelData

from backbones.mm import ClassifierTTA, DetectorTTA, ImageFolder, SegmentorTTA, UserError
from backbones.mm.app.inference import build_model
from backbones.mm.app.tta import use_tta
from tests.scripts import call_tool, load_tool

# mmengine names a run after its config and the second; runs of one process within a second share a name.
pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")

CONFIGS = Path(__file__).parents[1] / "configs"


class Anything(nn.Module):
    """What a wrapper asks of its model."""

    decode_head = SimpleNamespace(threshold=0.5)

    def test_step(self, data: Any) -> Any:
        return data


def test_probabilities_of_views_are_meant() -> None:
    views = [({"scores": torch.tensor([0.9, 0.1]), "target": 1}, {"scores": torch.tensor([0.2, 0.8]), "target": 1})]
    (merged,) = ClassifierTTA(Anything()).merge_preds(views)
    assert merged["target"] == 1
    torch.testing.assert_close(merged["scores"], torch.tensor([0.55, 0.45]))


def detection(boxes: list[list[float]], scores: list[float], flip: str | None, masks: bool = True) -> Any:
    """What a detector finds in one view of an image of 10 x 20 pixels."""
    structures = pytest.importorskip("mmdet.structures")
    sample = structures.DetDataSample()
    sample.set_metainfo({"ori_shape": (10, 20), "flip": flip is not None, "flip_direction": flip})
    found = InstanceData(
        bboxes=torch.tensor(boxes).view(-1, 4), scores=torch.tensor(scores), labels=torch.zeros(len(boxes)).long()
    )
    if masks:
        found.masks = torch.zeros(len(boxes), 10, 20, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(found.masks, boxes, strict=True):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
            mask[int(y0), int(x0)] = False  # not symmetric
    sample.pred_instances = found
    return sample


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("flip", "mirrored"), [("horizontal", [15, 2, 18, 6]), ("vertical", [2, 4, 5, 8])])
def test_boxes_of_views_are_joined(flip: str, mirrored: list[float], masks: bool) -> None:
    """One object that both views find, better in the mirrored one, and another that only the first finds."""
    model = DetectorTTA({"type": "nms", "iou_threshold": 0.5}, 10, module=Anything())
    views = [
        detection([[2.0, 2, 5, 6], [10.0, 2, 14, 8]], [0.5, 0.6], None, masks),
        detection([[float(x) for x in mirrored]], [0.9], flip, masks),
    ]
    (merged,) = model.merge_preds([views])
    found = merged.pred_instances
    assert found.bboxes.tolist() == [[2, 2, 5, 6], [10, 2, 14, 8]]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.6]))
    assert ("masks" in found) == masks
    if masks:
        assert found.masks.shape == (2, 10, 20)
        corner = (2, 4) if flip == "horizontal" else (5, 2)  # the pixel that the mirrored mask lacks
        inside = torch.zeros(10, 20, dtype=torch.bool)
        inside[2:6, 2:5] = True
        inside[corner] = False
        assert torch.equal(found.masks[0], inside)
    model.max_per_img = 1
    assert (
        len(model.merge_preds([[detection([[2.0, 2, 5, 6], [10.0, 2, 14, 8]], [0.5, 0.6], None)]])[0].pred_instances)
        == 1
    )


def test_nothing_is_found_in_any_view() -> None:
    model = DetectorTTA({"type": "nms", "iou_threshold": 0.5}, 10, module=Anything())
    (merged,) = model.merge_preds([[detection([], [], None), detection([], [], "horizontal")]])
    assert len(merged.pred_instances) == 0 and merged.pred_instances.masks.shape == (0, 10, 20)


def segmentation(logits: torch.Tensor) -> Any:
    sample = pytest.importorskip("mmseg.structures").SegDataSample()
    sample.set_data({"seg_logits": PixelData(data=logits)})
    return sample


def test_probabilities_of_pixels_are_meant() -> None:
    views = torch.randn(3, 4, 5, 7) * 3
    (merged,) = SegmentorTTA(Anything()).merge_preds([[segmentation(x) for x in views]])
    mean = views.softmax(1).mean(0)
    torch.testing.assert_close(merged.seg_logits.data, mean)
    assert torch.equal(merged.pred_sem_seg.data, mean.argmax(0, keepdim=True))


def test_binary_segmentors_are_asked_for_probabilities_once() -> None:
    """Of one channel, mmseg returns probabilities, not logits."""
    views = [segmentation(torch.full((1, 2, 2), x)) for x in (0.1, 0.5)]
    (merged,) = SegmentorTTA(Anything()).merge_preds([views])
    assert merged.pred_sem_seg.data.tolist() == [[[0, 0], [0, 0]]]
    torch.testing.assert_close(merged.seg_logits.data, torch.full((1, 2, 2), 0.3))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of four classes, of other shapes than the network's."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(4):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (40 + 4 * i, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / str(label) / f"{i}.png")
    return root


def test_views_of_an_image(digits: Path) -> None:
    transform = {"input_size": 24, "crop_pct": 0.8}
    plain = ImageFolder(str(digits), "val", transform)
    views = [{}, {"flip": "horizontal"}, {"flip": "vertical"}, {"scale": 0.8}, {"scale": 1.6}]
    found = ImageFolder(str(digits), "val", transform, views=views)[0]
    assert found["targets"] == [0] * 5
    one = plain[0]["inputs"]
    assert {x.shape for x in found["inputs"]} == {one.shape}
    assert torch.equal(found["inputs"][0], one)
    torch.testing.assert_close(found["inputs"][1], one.flip(-1), rtol=0, atol=0.05)
    torch.testing.assert_close(found["inputs"][2], one.flip(-2), rtol=0, atol=0.05)
    for scale, image in ((1.0, found["inputs"][3]), (0.5, found["inputs"][4])):
        assert torch.equal(image, ImageFolder(str(digits), "val", {**transform, "crop_pct": scale})[0]["inputs"])


@pytest.mark.parametrize("view", [{"scale": 0.5}, {"scale": 0.0}, {"flip": "diagonal"}])
def test_views_that_cannot_be_meant(view: dict[str, Any], digits: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(next(iter(view.values()))))):
        ImageFolder(str(digits), "val", {"input_size": 24, "crop_pct": 0.8}, views=[view])


CLASSIFIER = """
_base_ = ["{base}"]
model = dict(network=dict(_delete_=True, name="test_vit", img_size=16, patch_size=8, num_classes=4))
train_dataloader = dict(dataset=dict(data_root="{data}", num_classes=4))
val_dataloader = dict(dataset=dict(data_root="{data}", num_classes=4, transform=dict(input_size=16, crop_pct=0.8)))
test_dataloader = val_dataloader
test_evaluator = dict(type="ClassificationMetric", topk=(1, 2))
"""


def test_classifier_from_the_command_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The averages decide; the digits are never mirrored, as their training does not mirror them."""
    monkeypatch.chdir(tmp_path)
    text = CLASSIFIER.format(base=CONFIGS / "digits/vim-tiny_digits.py", data=digits)
    Path("plain.py").write_text(text)
    Path("own.py").write_text(text + 'tta_pipeline = [dict(), dict(flip="horizontal")]\n')
    torch.manual_seed(3)
    model = build_model(Config.fromfile("plain.py")).eval()
    torch.save({"state_dict": model.state_dict()}, "weights.pth")
    transform = {"input_size": 16, "crop_pct": 0.8, "interpolation": "bilinear"}
    views = {
        "plain": [{}, {"scale": 1.125}, {"scale": 0.8}],
        "own": [{}, {"flip": "horizontal"}],
    }
    for name, chosen in views.items():
        call_tool("test", f"{name}.py", "weights.pth", "--tta", "--work-dir", name)
        printed = capsys.readouterr().out
        assert f"(12 images, {len(chosen)} views of each, " in printed
        right = 0
        for sample in ImageFolder(str(digits), "val", transform, views=chosen):
            with torch.no_grad():
                scores = torch.stack([model(x[None]).softmax(-1)[0] for x in sample["inputs"]]).mean(0)
            right += int(scores.argmax() == sample["targets"][0])
        assert f"top1 {100 * right / 12:.4g} " in printed


@pytest.mark.parametrize(
    "config, views, sizes, directions",
    [
        ("ade20k/upernet_vmamba-tiny-s1l8_160k_ade20k-512x512", 12, [(1024, 256), (3584, 896)], {None, "horizontal"}),
        ("coco/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", 6, [(1333, 800), (2000, 1200)], {None, "horizontal"}),
        ("coco/cascade-mask-rcnn_vim-tiny_simple-fpn_100e_coco-lsj", 6, [(1024, 1024)], {None, "horizontal"}),
        ("coco/rtmdet_msvmamba-nano_300e_coco", 6, [(640, 640), (320, 320)], {None, "horizontal"}),
        ("digits/upernet_efficientvmamba-tiny_digits", 6, [], {None}),
        ("digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits", 3, [(96, 96), (48, 48)], {None}),
        ("medical/unet_vmamba-tiny-s1l8_tissue", 18, [], {None, "horizontal", "vertical"}),
        ("medical/vm-unet_300e_isic-256x256", 18, [(256, 256)], {None, "horizontal", "vertical"}),
        ("medical/vm-unet_300e_synapse-224x224", 6, [(224, 224)], {None}),
    ],
)
def test_pipelines(config: str, views: int, sizes: list[tuple[int, int]], directions: set[str | None]) -> None:
    package = "mmdet" if config.startswith("coco") or "mask-rcnn" in config else "mmseg"
    pytest.importorskip(f"{package}.datasets")
    pytest.importorskip(f"{package}.models")
    cfg = Config.fromfile(CONFIGS / f"{config}.py")
    before = cfg.test_dataloader.dataset.pipeline
    assert use_tta(cfg) == f"{views} views"
    pipeline = cfg.test_dataloader.dataset.pipeline
    assert pipeline[0] == before[0]
    (augment,) = (step for step in pipeline if step["type"] == "TestTimeAug")
    resizes, flips, *rest = augment["transforms"]
    assert {tuple(x["scale"]) for x in resizes if "scale" in x} >= set(sizes)
    assert {x.get("direction") for x in flips} == directions
    kinds = [step["type"] for (step,) in rest]
    assert kinds[-2].startswith("Load") and kinds[-1].startswith("Pack")  # annotations are not mirrored
    assert sorted(kinds) == sorted(step["type"] for step in before if step["type"] not in ("Resize", before[0]["type"]))
    Compose(pipeline)
    model = cfg.custom_hooks[-1].tta_cfg
    assert model.type == ("DetectorTTA" if package == "mmdet" else "SegmentorTTA")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_dense_models_from_the_command_line(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from tests.test_mm_dense_tasks import BOTH, METRIC, SMALL

    monkeypatch.chdir(tmp_path)
    load_tool("digits").write_digits(tmp_path / "data", task, {"size": 64, "train": 4, "val": 3, "seed": 0})
    text = SMALL[task].format(configs=CONFIGS / "digits", data=tmp_path / "data") + BOTH
    Path("small.py").write_text(text)
    Path("mirrored.py").write_text(
        '_base_ = "small.py"\ntrain_pipeline = [*_base_.train_pipeline]\n'
        'train_pipeline.insert(2, dict(type="RandomFlip", prob=0.5))\n'
        "train_dataloader = dict(dataset=dict(pipeline=train_pipeline))\n"
    )
    call_tool("train", "mirrored.py", "--work-dir", "run")
    call_tool("test", "mirrored.py", "run", "--work-dir", "run", "--tta")
    printed = capsys.readouterr().out
    views = {"detection": 6, "segmentation": 12}[task]
    assert re.search(rf"{METRIC[task]}.*\(3 images, {views} views of each, ", printed.splitlines()[-1])
    assert Path("run/predictions.png").is_file()
