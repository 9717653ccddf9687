"""Dense backbones of OpenMMLab against recordings of the originals' maps, and what configs expect of them."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from torch import nn

from backbones.base import Backbone, PlainBackbone
from backbones.layers import NonCausalSSD
from backbones.mm import UserError
from backbones.mm.models import dense
from backbones.models import FAMILIES, GUESTS
from backbones.models.vssd import VSSD
from backbones.weights import CheckpointError
from backbones.weights.rules import to_ours
from tests.test_parity import hold_in_double_precision
from tests.tolerances import INPUT_GRADIENT, LOGITS, SAME_FUNCTION, gradient_limit, logits_limit, maps_limit
from tools import recordings
from tools.parity import RECORDED, build, official_file, relative


@pytest.mark.parametrize("name", RECORDED)
def test_maps_and_input_gradients(name: str, tmp_path: Path) -> None:
    recording = recordings.load(name)
    backbone = build(RECORDED[name], official_file(tmp_path, recording)).eval()
    image = recording.image().requires_grad_()
    maps = backbone(image)
    means = torch.cat([x.mean((-2, -1)) for x in maps], dim=1)
    means.square().mean().backward()
    recorded = recording.arrays["logits"]
    torch.testing.assert_close(means.detach(), recorded, rtol=0, atol=logits_limit(name, recorded))
    for i, found in enumerate(maps):
        assert list(found.shape) == recording.arrays[f"feature{i}_shape"].tolist()
        crop = recording.arrays[f"feature{i}_crop"]
        assert relative(found.detach()[:, :8, :4, :4], crop) <= maps_limit(name)
    assert relative(image.grad[:, :, 8:24, 8:24], recording.arrays["input_grad_crop"]) <= gradient_limit(name)
    if "logits64" in recording.arrays:
        hold_in_double_precision(backbone, recording)


def test_vim_with_the_pyramid_of_its_segmentor(tmp_path: Path) -> None:
    """The authors' segmentation backbone holds the layers of its pyramid; here a neck has them."""
    recording = recordings.load("vim_tiny_seg_224")
    weights = recording.weights()
    pyramid = nn.ModuleDict(
        {
            "fpn1": nn.Sequential(
                nn.ConvTranspose2d(192, 192, 2, 2), nn.BatchNorm2d(192), nn.GELU(), nn.ConvTranspose2d(192, 192, 2, 2)
            ),
            "fpn2": nn.Sequential(nn.ConvTranspose2d(192, 192, 2, 2)),
            "fpn3": nn.Identity(),
            "fpn4": nn.MaxPool2d(2),
        }
    ).eval()
    pyramid.load_state_dict({name: weights.pop(name) for name in list(weights) if name.startswith("fpn")})
    torch.save(weights, tmp_path / "backbone.pth")
    args = {"class_token": False, "global_pool": "avg"}
    backbone = build({"type": "Vim", "arch": "vim_tiny"}, tmp_path / "backbone.pth", out_norm=False, model_args=args)
    image = recording.image().requires_grad_()
    maps = [layer(x) for layer, x in zip(pyramid.values(), backbone.eval()(image), strict=True)]
    means = torch.cat([x.mean((-2, -1)) for x in maps], dim=1)
    means.square().mean().backward()
    torch.testing.assert_close(means.detach(), recording.arrays["logits"], rtol=0, atol=LOGITS)
    assert relative(image.grad[:, :, 8:24, 8:24], recording.arrays["input_grad_crop"]) <= INPUT_GRADIENT


def test_a_block_of_spatial_mamba(backend: str) -> None:
    arrays, meta = recordings.load_arrays("spatialmamba_block_unit")
    model = timm.create_model(
        "spatialmamba_tiny", dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), scan_backend=backend
    ).eval()
    prefix, ours = "layers.0.blocks.0.", "stages.0.blocks.0."
    official = {prefix + name: recordings.draw(name, tuple(shape)) for name, shape in meta["state_dict"].items()}
    block = model.get_submodule(ours.rstrip("."))
    block.load_state_dict({x.removeprefix(ours): value for x, value in to_ours(official, model.key_rules).items()})
    x = arrays["input"].clone().requires_grad_()
    y = block(x)
    y.square().mean().backward()
    assert relative(y.detach(), arrays["output"]) <= LOGITS
    assert relative(x.grad, arrays["input_grad"]) <= INPUT_GRADIENT


def test_a_mixer_of_vssd() -> None:
    arrays, _ = recordings.load_arrays("vssd_mixer_unit")
    names = {x.removeprefix("param_grad."): value.shape for x, value in arrays.items() if x.startswith("param_grad.")}
    mixer = NonCausalSSD(16, num_heads=2, d_state=8).double()
    official = {f"layers.0.blocks.0.attn.{x}": recordings.draw(x, shape) for x, shape in names.items()}
    prefix = "stages.0.blocks.0.mixer."
    mixer.load_state_dict({x.removeprefix(prefix): y for x, y in to_ours(official, VSSD.key_rules).items()})
    x = arrays["input"].view(2, 5, 7, 16).clone().requires_grad_()
    y = mixer(x)
    y.square().mean().backward()
    # Its weights were not rounded to float32, as ours are.
    assert relative(y.detach().flatten(1, 2), arrays["output"].flatten(1, -2)) <= SAME_FUNCTION
    assert relative(x.grad.flatten(1, 2), arrays["input_grad"].flatten(1, -2)) <= SAME_FUNCTION
    assert relative(mixer.A_log.grad, arrays["param_grad.A_log"]) <= SAME_FUNCTION


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_file(tmp_path_factory.mktemp("weights"), recordings.load("msvmamba_nano_cls_2x3x224x224"))


NANO = {"type": "MSVMamba", "arch": "msvmamba_nano"}


def test_a_classifier_loads_and_what_differs_is_listed(classifier_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, "info", lambda text, *args: lines.append(text % args))
    build(NANO, classifier_file, out_indices=(0, 2))
    text = "\n".join(lines)
    assert "of no use in a backbone: model.downsamples.2." in text
    assert "model.head.fc.weight" in text
    assert "not in the file, left fresh: out_norms.0.bias, out_norms.0.weight, out_norms.2.bias" in text


def test_another_model_s_weights_are_refused(classifier_file: Path) -> None:
    with pytest.raises(CheckpointError, match="misshapen: model"):
        build({**NANO, "arch": "msvmamba_micro"}, classifier_file)


def test_our_own_files_and_detectors_load(tmp_path: Path) -> None:
    backbone = build(NANO)
    torch.save({"state_dict": {f"backbone.{key}": x for key, x in backbone.state_dict().items()}}, tmp_path / "det.pth")
    loaded = build(NANO, tmp_path / "det.pth")
    assert all(torch.equal(x, y) for x, y in zip(backbone.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, *GUESTS])
def test_every_family_is_a_backbone_of_its_name(family: type[Backbone]) -> None:
    cls = getattr(dense, family.__name__)
    assert MODELS.get(family.__name__) is cls
    assert cls.family is family and family.__name__ in cls.__doc__
    assert issubclass(cls, dense.PlainDenseBackbone) == issubclass(family, PlainBackbone)
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_backbones_can_be_pickled() -> None:
    backbone = build(NANO)
    loaded = pickle.loads(pickle.dumps(backbone))
    assert type(loaded) is type(backbone)
    assert all(torch.equal(x, y) for x, y in zip(backbone.parameters(), loaded.parameters(), strict=True))


def test_checkpointing_computes_again_and_changes_no_gradient() -> None:
    image, results = torch.randn(1, 3, 40, 70), []
    backbone = build(NANO, with_cp=True, drop_path_rate=0.2).train()
    calls: list[nn.Module] = []
    for stage in backbone.model.stages:
        stage.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(module))
    for times in (2, 1):
        backbone.zero_grad()
        torch.manual_seed(0)
        sum(x.square().mean() for x in backbone(image)).backward()
        assert len(calls) == 4 * times
        results.append([p.grad.clone() for p in backbone.parameters()])
        backbone.model.set_grad_checkpointing(False)
        calls.clear()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@pytest.mark.parametrize("tap", ["stream", "branch"])
def test_plain_backbones_take_any_size(tap: str) -> None:
    backbone = build({"type": "Vim", "arch": "vim_tiny"}, tap=tap, out_indices=(1, 3)).eval()
    with torch.no_grad():
        assert [tuple(x.shape) for x in backbone(torch.randn(1, 3, 70, 50))] == [(1, 192, 5, 4)] * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"arch": "msvmamba_tinny"}, "'msvmamba_tinny' is no model of MSVMamba; did you mean msvmamba_tiny"),
        ({"out_indices": (0, 4)}, r"out_indices: got \(0, 4\), expected different numbers within 0..3"),
        ({"init_cfg": {"type": "Kaiming"}}, "init_cfg: got .*, expected dict"),
    ],
)
def test_bad_configs_say_what_to_do(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build({**NANO, **config})
