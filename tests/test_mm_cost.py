"""What detectors and segmentors cost: sums of parts counted by hand, and the authors' totals."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from backbones import zoo
from backbones.analysis.flops import ModelCost, count
from backbones.mm.app.cli import read_config
from backbones.mm.app.cost import count_config
from tests.scripts import load_tool

ROOT = Path(__file__).parents[1] / "configs"
RCNN = "coco/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"
CASCADE = "coco/cascade-mask-rcnn_lbvim-tiny_simple-fpn_100e_coco-lsj.py"
UPERNET = "ade20k/upernet_vmamba-tiny-s1l8_160k_ade20k-512x512.py"
# Height and width of the maps that a pyramid makes of 800 x 1280 pixels.
LEVELS = [(200, 320), (100, 160), (50, 80), (25, 40), (13, 20)]
POSITIONS = sum(height * width for height, width in LEVELS)


def cost(name: str, size: tuple[int, int] | None = None) -> ModelCost:
    return count_config(read_config(ROOT / name), size)


def test_a_detector_is_the_sum_of_its_parts() -> None:
    found = cost(RCNN)
    assert found.size == (800, 1280)
    stages = found.stages
    assert stages.keys() == {"backbone", "neck", "rpn_head", "bbox_heads", "mask_heads"}
    for field in ("parameters", "macs", "scan", "other", "activations"):
        assert getattr(found.total, field) == sum(getattr(stage, field) for stage in stages.values())
    # A convolution, objectness and boxes of three anchors.
    assert stages["rpn_head"].macs == POSITIONS * 256 * (9 * 256 + 3 + 3 * 4)
    lateral = sum(h * w * c * 256 for (h, w), c in zip(LEVELS, (96, 192, 384, 768), strict=False))
    outputs = sum(h * w * 9 * 256 * 256 for h, w in LEVELS[:4])
    assert stages["neck"].macs == lateral + outputs
    # 1,000 proposals of 7 x 7, two linear layers, 80 classes and background, 80 boxes.
    assert stages["bbox_heads"].macs == 1000 * (49 * 256 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80))
    # 100 objects: four convolutions at 14 x 14, one that doubles the sides, 80 masks.
    assert stages["mask_heads"].macs == 100 * 196 * 256 * (4 * 9 * 256 + 4 * 256 + 4 * 80)
    alone = count("vmamba_tiny_s1l8", (800, 1280))
    assert stages["backbone"].scan == found.total.scan == alone.total.scan
    classifier = alone.stages["head"]
    norms = sum(2 * c for c in (96, 192, 384))  # one for each output, where the classifier has the last one
    assert stages["backbone"].macs == alone.total.macs - classifier.macs
    assert stages["backbone"].parameters == alone.total.parameters - classifier.parameters + norms


def test_a_cascade_counts_every_stage() -> None:
    heads = cost(CASCADE, (256, 256)).stages["bbox_heads"]
    convolutions, linear = 4 * 49 * 9 * 256 * 256, 49 * 256 * 1024 + 1024 * (81 + 4 * 80)
    assert heads.macs == 3 * 1000 * (convolutions + linear)


def test_a_segmentor_counts_its_decoder_alone() -> None:
    found = cost(UPERNET)
    assert found.size == (512, 2048)
    assert found.stages.keys() == {"backbone", "decode_head"}
    assert found.stages["backbone"].scan == count("vmamba_tiny_s1l8", (512, 2048)).total.scan
    positions = [(512 // s) * (2048 // s) for s in (4, 8, 16, 32)]
    pyramid = sum(n * c * 512 for n, c in zip(positions, (96, 192, 384), strict=False))
    pyramid += sum(n * 9 * 512 * 512 for n in positions[:3])
    pooled = (1 + 4 + 9 + 36) * 768 * 512 + positions[3] * 9 * (768 + 4 * 512) * 512
    fused = positions[0] * (9 * 4 * 512 * 512 + 512 * 150)
    assert found.stages["decode_head"].macs == pyramid + pooled + fused


@pytest.mark.parametrize("name", [RCNN, UPERNET, "coco/mask-rcnn_vssd-micro_fpn_1x_coco.py"])
def test_totals_are_those_that_the_authors_state(name: str) -> None:
    arch = name.split("_")[1].replace("-", "_")
    for family in ("vmamba", "vssd"):
        facts = zoo.load_family(family)["models"].get(arch, {}).get("reported", {})
        for row in facts.get(name.split("/")[0], ()):
            if row["schedule"] in ("1x", "160k") and "gflops" in row:
                assert cost(name).total.flops / 1e9 == pytest.approx(row["gflops"], rel=0.02)
                return
    raise AssertionError(name)


def test_a_classifier_is_its_network() -> None:
    found = cost("digits/vim-tiny_digits.py")
    assert found.size == (24, 24)
    assert found.total == count("vim_tiny", 24, patch_size=8, num_classes=10).total


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flops = load_tool("flops")
    config = str(ROOT / "digits/mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py")
    assert flops.main([config]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{config}, 96 x 96 pixels\n")
    assert all(name in printed for name in ("backbone", "neck", "rpn_head", "bbox_heads", "mask_heads", "total"))
    assert flops.main([config, "--size", "64"]) == 0
    assert "64 x 64 pixels" in capsys.readouterr().out
    assert flops.main([str(ROOT / "digits/absent.py")], "flops.py") == 2
    error = capsys.readouterr().err
    assert error.startswith("flops.py: error: config") and len(error.splitlines()) == 1
