"""EfficientViM, whose model is timm's: its mixer and its dense backbone against the original, and what that loads."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models.efficientvim import HSMSSD
from torch import nn

from backbones.commands.bench.measure import relative_error

pytest.importorskip("mmengine")

from backbones.export import export_onnx
from backbones.models import GUESTS
from backbones.models.efficientvim import EfficientViM
from backbones.weights import CheckpointError
from backbones.zoo import load_family
from tests.tolerances import DOUBLE_INPUT_GRADIENT, DOUBLE_LOGITS, EFFICIENTVIM_AUTOCAST, SAME_FUNCTION
from tools import recordings
from tools.parity import build, official_file, relative

M1 = {"type": "EfficientViM", "arch": "efficientvim_m1"}
SMALL = {"depths": (1, 2, 1), "embed_dim": (8, 16, 24), "state_dim": (4, 3, 2)}


def test_its_names_are_timm_s() -> None:
    names = timm.list_models(module="efficientvim")
    assert EfficientViM in GUESTS
    assert all(timm.model_entrypoint(name).__module__ == "timm.models.efficientvim" for name in names)
    assert set(names) == load_family("efficientvim")["models"].keys()


def test_facts_agree_with_timm() -> None:
    facts = load_family("efficientvim")
    for name, model in facts["models"].items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.input_size[1] == model.get("size", facts["input"]["size"])
        assert (list(cfg.mean), list(cfg.std)) == (facts["input"]["mean"], facts["input"]["std"])
        assert (cfg.crop_pct, cfg.interpolation) == (facts["input"]["crop_pct"], facts["input"]["interpolation"])
        assert cfg.first_conv == facts["first_conv"]


def test_its_mixer() -> None:
    arrays, meta = recordings.load_arrays("efficientvim_hsmssd_unit")
    mixer = HSMSSD(16, state_dim=9).double()
    assert sum(p.numel() for p in mixer.parameters()) == meta["parameters"]
    shapes = meta["state_dict"].items()
    mixer.load_state_dict({name: recordings.draw(name, tuple(x), dtype=torch.float64) for name, x in shapes})
    x = arrays["input"].clone().requires_grad_()
    y, h = mixer(x.unflatten(-1, (5, 7)))
    y.square().mean().backward()
    for found, name in ((h, "h"), (y, "output"), (x.grad, "input_grad")):
        assert relative(found.detach(), arrays[name]) <= DOUBLE_LOGITS
    for name, p in mixer.named_parameters():
        if name != "A":  # it is constant along the softmax: its gradient is rounding
            assert relative(p.grad, arrays[f"param_grad.{name}"]) <= DOUBLE_INPUT_GRADIENT


def test_parameters_are_those_of_the_authors_dense_models() -> None:
    """Of the sheet of facts for the models without a recording."""
    counts = {"m1": 5_713_534, "m2": 12_489_022, "m3": 15_029_034, "m4": 18_031_365}
    for name, count in counts.items():
        with torch.device("meta"):
            backbone = build({"type": "EfficientViM", "arch": f"efficientvim_{name}"})
        assert sum(p.numel() for p in backbone.parameters()) == count


def test_a_dense_backbone_gives_the_maps_of_timm_s_model() -> None:
    model = timm.create_model("efficientvim_m1_dist", **SMALL).eval()
    backbone = build({**M1, "model_args": SMALL}).eval()
    backbone.model.load_state_dict(model.state_dict())
    for size in ((65, 40), (1, 1), (5, 17)):
        image = torch.randn(2, 3, *size)
        expected = model.forward_intermediates(image, intermediates_only=True)
        for found, other in zip(backbone(image), expected, strict=True):
            assert torch.equal(found, other)


@pytest.fixture(scope="module")
def recorded() -> nn.Module:
    """The dense backbone with the weights of its recording; tests leave it as it is."""
    backbone = build(M1).eval()
    backbone.model.load_state_dict(recordings.load("efficientvim_m1_backbone_200x273").weights())
    return backbone


@torch.no_grad()
@pytest.mark.parametrize("size", [(57, 83), (16, 160), (160, 16), (1, 70)])
def test_images_of_any_shape(recorded: nn.Module, size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size)
    for found, expected in zip(recorded(image), copy.deepcopy(recorded).double()(image.double()), strict=True):
        assert found.isfinite().all()
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(recorded: nn.Module, dtype: torch.dtype) -> None:
    image = torch.randn(2, 3, 200, 273)
    exact = recorded(image)
    with torch.autocast("cpu", dtype):
        maps = recorded(image)
    for found, expected in zip(maps, exact, strict=True):
        assert relative_error(found, expected) <= EFFICIENTVIM_AUTOCAST[str(dtype).removeprefix("torch.")]


@torch.no_grad()
@pytest.mark.slow
def test_onnx_agrees_for_any_batch_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model("efficientvim_m1", num_classes=10, **SMALL).eval()
    export_onnx(model, torch.zeros(1, 3, 50, 37), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        image = torch.randn(batch, 3, 50, 37)
        (logits,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(image), rtol=0, atol=SAME_FUNCTION)


@torch.no_grad()
@pytest.mark.slow
def test_compiles_whole() -> None:
    torch.compiler.reset()
    backbone, image = build(M1, model_args=SMALL).eval(), torch.randn(2, 3, 64, 96)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")(image)
    for found, expected in zip(compiled, backbone(image), strict=True):
        torch.testing.assert_close(found, expected, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@pytest.mark.parametrize("name", ["efficientvim_m1_224", "efficientvim_m1_dist_224"])
@pytest.mark.parametrize("arch", ["efficientvim_m1", "efficientvim_m1_dist"])
def test_official_classifiers_load_into_dense_backbones(name: str, arch: str, tmp_path: Path) -> None:
    recording = recordings.load(name)
    file = official_file(tmp_path, recording)
    backbone = build({**M1, "arch": arch}, file, out_indices=(0, 1)).eval()
    model = timm.create_model(name.removesuffix("_224"), pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    image = torch.randn(1, 3, 64, 96)
    expected = model.eval().forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(x, y) for x, y in zip(backbone(image), expected, strict=True))


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    plain, averaged = (timm.create_model("efficientvim_m1", **SMALL).state_dict() for _ in range(2))
    torch.save({"model": plain, "model_ema": averaged}, tmp_path / "weights.pth")
    backbone = build({**M1, "model_args": SMALL}, tmp_path / "weights.pth")
    assert torch.equal(backbone.model.stem.conv[0].conv.weight, averaged["patch_embed.conv.0.conv.weight"])


def test_misshapen_norms_are_refused(tmp_path: Path) -> None:
    weights = timm.create_model("efficientvim_m1", **SMALL).state_dict()
    name = "stages.1.blocks.0.norm.weight"
    weights[name] = weights[name].view(4, 4)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"misshapen.*stages\.1\.blocks\.0\.norm\.weight \(4, 4\)"):
        build({**M1, "model_args": SMALL}, tmp_path / "weights.pth")


def test_frozen_stages_and_checkpointing() -> None:
    backbone = build(M1, model_args=SMALL, frozen_stages=2, norm_eval=True).train()
    frozen = {name.split(".")[1] + name.split(".")[2] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"stemconv", "stages0", "stages1", "downsamples0"}
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    backbone = build(M1, model_args=SMALL, with_cp=True, norm_eval=True).train()
    image = torch.randn(1, 3, 40, 70)
    checkpointed = backbone(image)
    sum(x.square().sum() for x in checkpointed).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    backbone.model.set_grad_checkpointing(False)
    assert all(torch.equal(x, y) for x, y in zip(checkpointed, backbone(image), strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_fmt": "NLC"}, "output_fmt: got 'NLC', expected 'NCHW' or 'NHWC'"),
        ({"intermediates_only": False}, "intermediates_only: got False"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientViM.create("efficientvim_m1", **SMALL).forward_intermediates(torch.randn(1, 3, 32, 32), **kwargs)


def test_the_official_layout_loads_through_load_state_dict() -> None:
    recording = recordings.load("efficientvim_m1_backbone_200x273")
    backbone, weights = build(M1), recording.weights()
    backbone.model.load_state_dict(weights)
    name = "stages.2.blocks.1.norm.weight"
    assert torch.equal(backbone.model.state_dict()[name], weights[name].flatten())
    with pytest.raises(CheckpointError, match=r"misshapen.*stages\.2\.blocks\.1\.norm\.weight"):
        backbone.model.load_state_dict({**weights, name: weights[name].view(2, 160, 1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"stages\.2\.blocks\.1\.norm\.weight"'):
        backbone.model.load_state_dict({key: x for key, x in weights.items() if key != name})
