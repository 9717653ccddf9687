"""U-Nets: published networks against recordings of the originals, and one decoder on every hierarchical encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.layers import SS2D, MultiHeadScan, PatchExpand
from backbones.layers.multi_head_scan import HEADS
from backbones.layers.patch_expand import pixel_blocks
from backbones.layers.vss_block import VSSBlock
from backbones.patterns import get_pattern
from backbones.segmentation import UNetDecoder
from backbones.segmentation.decoder import MERGES, Level, fitted
from backbones.weights import CheckpointError
from backbones.weights.rules import to_official, to_ours
from tests import tolerances
from tests.small_models import SMALLEST
from tools import recordings
from tools.parity import UNETS, official_file, relative

HIERARCHIES = [name for name, args in SMALLEST.items() if "depths" in args]
THIN = {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
vm_unet = partial(backbones.vm_unet, depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1))


def sampled(logits: Tensor) -> Tensor:
    return logits[:, :, 3::8, 5::8].flatten(1)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x.startswith("mhsvm") else ()) for x in UNETS]
)
def test_recorded_network(name: str, tmp_path: Path) -> None:
    """From a file in the official layout, loaded strictly."""
    recording, arrays = recordings.load(name), recordings.load(name).arrays
    gated = name.startswith("mhsvm")
    dtype = torch.float64 if gated else torch.float32
    file = official_file(tmp_path, recording, dtype)
    model = UNETS[name](checkpoint=file, dtype=dtype, scan_backend="naive" if gated else None).eval()
    assert sum(p.numel() for p in model.parameters()) == recording.parameters
    image = recording.image().to(dtype).requires_grad_()
    taken: list[tuple] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: taken.append(inputs))
    whole = model(image)
    logits = sampled(whole)
    logits.square().mean().backward()
    if gated:
        assert relative(logits.detach(), arrays["logits"]) <= tolerances.GATED_DOUBLE
        assert relative(image.grad[:, :, 8:24, 8:24], arrays["input_grad_crop"]) <= tolerances.GATED_DOUBLE
    else:
        torch.testing.assert_close(logits.detach(), arrays["logits"], rtol=0, atol=tolerances.UNET_LOGITS)
        assert relative(image.grad[:, :, 8:24, 8:24], arrays["input_grad_crop"]) <= tolerances.INPUT_GRADIENT
    ((bottom, maps),) = taken
    assert bottom.shape == maps[-1].shape
    for i, found in enumerate([*(x.permute(0, 3, 1, 2) for x in maps), whole]):
        assert list(found.shape) == arrays[f"feature{i}_shape"].tolist()
        assert relative(found.detach()[:, :8, :4, :4], arrays[f"feature{i}_crop"]) <= tolerances.maps_limit(name)


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (partial(backbones.vm_unet, 9), 27_427_761),
        (partial(backbones.mhs_vm, 1, heads=3), 17_386_153),
        (partial(backbones.mhs_vm, 1, patterns=("cross", "snake", "hilbert")), 17_386_153),
    ],
)
def test_sizes_and_names_of_variants(make: Callable[..., nn.Module], parameters: int) -> None:
    """The authors' counts; and our weights take their names and back."""
    model = make(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    official = to_official(model.state_dict(), model.key_rules)
    assert all(name.startswith("vmunet.") and "scanner" not in name for name in official)
    ours = to_ours(official, model.key_rules)
    assert {x: y.shape for x, y in ours.items()} == {x: y.shape for x, y in model.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in UNETS if name.startswith("mhsvm")])
def test_gated_network_in_single_precision(name: str) -> None:
    recording = recordings.load(name)
    model = UNETS[name]().eval()
    model.load_state_dict(recording.weights())
    with torch.no_grad():
        logits = sampled(model(recording.image()))
    assert relative(logits.double(), recording.arrays["logits"]) <= tolerances.GATED_LOGITS


def test_multi_head_scan() -> None:
    recording = recordings.load("mhs_module_4head_6x10")
    module = MultiHeadScan(48, patterns=HEADS, threshold=0.5, backend="naive", dtype=torch.float64)
    module.load_state_dict(recording.weights(torch.float64))
    assert sum(p.numel() for p in module.parameters()) == recording.parameters
    x = recording.image().double().requires_grad_()
    y = module(x.permute(0, 2, 3, 1))
    y.square().mean().backward()
    assert relative(y.detach().flatten(1), recording.arrays["logits"]) <= tolerances.GATED_DOUBLE
    assert relative(x.grad, recording.arrays["input_grad_full"]) <= tolerances.GATED_DOUBLE


def test_heads_read_the_authors_routes() -> None:
    """Recorded are each head's first and third order; their reverses are ours."""
    routes = recordings.load("mhs_module_4head_6x10").arrays["routes"].unflatten(0, (4, 2))
    for pattern, (first, third) in zip(HEADS, routes, strict=True):
        orders = pattern.orders(6, 10).long()
        ours = {tuple(order.tolist()) for order in orders}
        there = {tuple(order.tolist()) for order in (first, third)}
        assert ours == there | {order[::-1] for order in there}


def test_weights_that_do_not_fit_are_named() -> None:
    recording = recordings.load("mhs_module_4head_6x10")
    module = MultiHeadScan(48, patterns=HEADS[:3])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*heads\.3"):
        module.load_state_dict(recording.weights())
    weights = recording.weights()
    del weights["scanhead_S.scanning.seq2seq_engine.Ds"]
    with pytest.raises(RuntimeError, match=r"Missing key.*heads\.2\.D"):
        MultiHeadScan(48).load_state_dict(weights)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = official_file(tmp_path, recordings.load("mhs_module_4head_6x10"))
    with pytest.raises(CheckpointError, match="missing: decoder"):
        vm_unet(checkpoint=file)


def test_it_begins_with_vmamba(tmp_path: Path) -> None:
    vmamba = timm.create_model("vanilla_vmamba_tiny", depths=(1, 1, 2, 1))
    torch.save({"model": to_official(vmamba.state_dict(), vmamba.key_rules)}, tmp_path / "vmamba.pth")
    net = vm_unet()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    fresh = net.load_vmamba(tmp_path / "vmamba.pth")
    after = net.state_dict()
    assert all(name.startswith(("decoder.final_up.", "head.")) or ".up." in name for name in fresh)
    assert len(fresh) == 3 * 3 + 3 + 2
    assert {x for x in after if torch.equal(before[x], after[x])} >= set(fresh)
    for ours, theirs in (
        ("encoder.stages.2.blocks.0", "stages.2.blocks.0"),
        ("encoder.downsamples.0", "downsamples.0"),
        ("decoder.bottom.0", "stages.3.blocks.0"),
        ("decoder.levels.0.blocks.0", "stages.2.blocks.0"),
        ("decoder.levels.2.blocks.0", "stages.0.blocks.0"),
    ):
        expected = vmamba.get_submodule(theirs).state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in net.get_submodule(ours).state_dict().items())
    with pytest.raises(CheckpointError, match=r"missing: .*encoder\.stages\.0\.blocks\.1"):
        backbones.vm_unet(depths=(2, 1, 1, 1), decoder_depths=(1, 1, 1, 1)).load_vmamba(tmp_path / "vmamba.pth")


@pytest.mark.parametrize("options", [{"patterns": "cross"}, {"patterns": ()}, {"patterns": ("forward",)}])
def test_patterns_that_no_head_can_gate(options: dict) -> None:
    with pytest.raises(ValueError, match="patterns: got"):
        MultiHeadScan(8, **options)


def test_any_patterns_in_any_mixer(backend: str) -> None:
    """Three heads of 5 channels each in a width of 16, gated by formula."""
    names = ("hilbert", "h v_flip", "local_windows_2")
    scanner = partial(MultiHeadScan, patterns=names, threshold=0.2, d_state=2, backend=backend)
    mixer = SS2D(16, ssm_ratio=1.0, scanner=scanner)
    x = torch.randn(2, 5, 7, 16, requires_grad=True)
    mixer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert [head.num_orders for head in mixer.scanner.heads] == [get_pattern(name).num_orders for name in names]
    y = torch.randn(3, 4, 5, dtype=torch.float64)
    spread = y.var(1).sqrt() / ((y - y.min(1, keepdim=True).values).mean(1) + 1e-5)
    expected = y.sum(1) * (spread - 0.2).clamp(min=0)
    torch.testing.assert_close(mixer.scanner.gate(y), expected)


def test_pixel_blocks() -> None:
    x = torch.arange(2 * 3 * 4 * 12.0).view(2, 3, 4, 12)
    y = pixel_blocks(x, 2)
    assert y.shape == (2, 6, 8, 3)
    for row in range(6):
        for column in range(8):
            part = 3 * (2 * (row % 2) + column % 2)
            assert torch.equal(y[:, row, column], x[:, row // 2, column // 2, part : part + 3])
    assert PatchExpand(8, 6, scale=4)(torch.randn(1, 2, 3, 8)).shape == (1, 8, 12, 6)


def test_maps_are_fitted_at_the_bottom_and_right() -> None:
    x = torch.arange(12.0).view(1, 3, 4, 1)
    assert torch.equal(fitted(x, 2, 3), x[:, :2, :3])
    wider = fitted(x, 4, 5)
    assert torch.equal(wider[:, :3, :4], x)
    assert torch.equal(wider[:, 3, :4], x[:, 2]) and torch.equal(wider[:, :, 4], wider[:, :, 3])


@pytest.mark.parametrize("name", HIERARCHIES)
def test_every_hierarchy_is_an_encoder_at_any_size(name: str) -> None:
    net = backbones.unet(name, classes=3, decoder_depths=(0, 1, 1, 1), **SMALLEST[name])
    logits = net(torch.randn(2, 3, 70, 93))
    assert logits.shape == (2, 3, 70, 93)
    logits.square().mean().backward()
    silent = [x for x, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


@pytest.mark.parametrize("up", ["expand", "lkpe", "bilinear"])
@pytest.mark.parametrize("merge", ["concat", "add"])
@pytest.mark.parametrize("block", ["vss", "conv"])
def test_choices(up: str, merge: str, block: str) -> None:
    net = backbones.unet(
        "vmamba_tiny_s1l8", up=up, merge=merge, block=block, decoder_depths=(1, 1, 0, 2), **THIN, drop_path_rate=0.1
    )
    image = torch.randn(2, 3, 33, 47)
    assert net(image).shape == (2, 1, 33, 47)
    net(image).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_merge_before_widening_reads_what_stages_begin_with() -> None:
    net = backbones.unet("vanilla_vmamba_tiny", merge="add_before", taps="input", **THIN)
    image = torch.randn(1, 3, 41, 64)
    net(image).sum().backward()
    # The finest map is never read, so the first norm has no part in the result.
    assert [x for x, p in net.named_parameters() if p.grad is None] == ["norms.0.weight", "norms.0.bias"]
    image = torch.nn.functional.pad(image, (0, 0, 0, 3))
    bottom, maps = net.eval().encode(image)
    whole = timm.create_model("vanilla_vmamba_tiny", **THIN).eval()
    missing, _ = whole.load_state_dict(net.encoder.state_dict(), strict=False)
    assert all(x.startswith(("norm.", "head.")) for x in missing)
    outputs = whole.forward_intermediates(image, output_fmt="NHWC")[1]
    torch.testing.assert_close(bottom, net.norms[4](outputs[3]))
    for i in range(3):
        torch.testing.assert_close(maps[i + 1], net.norms[i + 1](whole.downsamples[i](outputs[i])))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_models_of_timm_are_encoders(name: str) -> None:
    """ResNet rounds odd sides up, ConvNeXt down; Swin gives its maps channels-last."""
    args = {"img_size": (70, 93), "depths": (1, 1, 1, 1)} if name.startswith("swin") else {}
    args = {"always_partition": True, "strict_img_size": False, "depths": (1, 1, 1, 1)} if args else {}
    net = backbones.unet(name, classes=2, block="conv", decoder_depths=(0, 1, 1, 1), **args)
    logits = net(torch.randn(2, 3, 70, 93))
    assert logits.shape == (2, 2, 70, 93)
    logits.sum().backward()


def test_a_grey_image_is_repeated() -> None:
    net = backbones.unet("vmamba_tiny_s1l8", **THIN).eval()
    image = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(net(image), net(image.expand(-1, 3, -1, -1)))
    assert backbones.unet("vmamba_tiny_s1l8", in_chans=1, **THIN)(image).shape == (1, 1, 32, 32)


def test_checkpointing_computes_blocks_again_and_changes_nothing() -> None:
    net = backbones.unet("vmamba_tiny_s1l8", **THIN)
    image = torch.randn(1, 3, 32, 32)
    blocks = [x for x in net.modules() if isinstance(x, VSSBlock)]
    calls: list[nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    grads = []
    for enable, times in ((False, 1), (True, 2)):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        calls.clear()
        net(image).square().mean().backward()
        grads.append(net.encoder.stem.conv1.weight.grad.clone())
        assert [sum(module is block for module in calls) for block in blocks] == [times] * len(blocks)
    torch.testing.assert_close(grads[0], grads[1])


class Doubled(nn.Module):
    """Every cell four times."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


@torch.no_grad()
@pytest.mark.parametrize("merge", MERGES)
def test_what_a_level_joins(merge: str) -> None:
    join = nn.Linear(6, 3) if merge == "concat" else nn.Identity()
    level = Level(Doubled(), join, nn.ModuleList(), merge)
    x, here, skip = torch.randn(1, 2, 2, 3), torch.randn(1, 2, 2, 3), torch.randn(1, 4, 4, 3)
    wide = Doubled()(x)
    expected = {
        "concat": lambda: torch.cat([wide, skip], -1) @ join.weight.T + join.bias,
        "add": lambda: wide + skip,
        "add_before": lambda: Doubled()(x + here),
    }[merge]()
    torch.testing.assert_close(level(x, here, skip), expected)


@torch.no_grad()
@pytest.mark.parametrize("merge", MERGES)
def test_hooks_fire_on_every_part_of_the_decoder(merge: str) -> None:
    model = backbones.unet("vmamba_tiny_s1l8", **THIN, taps="input" if merge == "add_before" else "output", merge=merge)
    idle = {f"levels.{i}.join" for i in range(3)} if merge != "concat" else set()
    watched = {key for key, x in model.decoder.named_modules() if not isinstance(x, nn.ModuleList)} - idle
    seen: set[str] = set()
    for key in watched:
        model.decoder.get_submodule(key).register_forward_hook(lambda module, args, y, key=key: seen.add(key))
    model.eval()(torch.zeros(1, 3, 64, 64))
    assert watched - seen == set()


@torch.no_grad()
@pytest.mark.parametrize("make", [vm_unet, partial(backbones.mhs_vm, depths=(1, 1, 1, 1)), backbones.msvm_unet])
def test_changed_linear_layers_of_a_network_act(make: Callable[..., nn.Module]) -> None:
    """Hooks that double every linear layer give what doubled weights give."""
    model = make(num_classes=2).eval().double()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plain, doubled = model(image), copy.deepcopy(model)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_hook(lambda module, args, y: 2 * y)
            for parameter in doubled.get_submodule(name).parameters():
                parameter.mul_(2)
    expected = doubled(image)
    assert relative(plain, expected) > 1e-3
    assert relative(model(image), expected) <= tolerances.GATED_DOUBLE


def test_naive_reaches_every_operator_of_a_network() -> None:
    """A product with the Hessian is what differences of gradients give; kernels refuse it."""
    model = vm_unet(num_classes=2, scan_backend="naive").eval().double()
    x, direction = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)

    def gradient(model: nn.Module, x: Tensor, create_graph: bool = False) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=create_graph)[0]

    (found,) = torch.autograd.grad(gradient(model, x, create_graph=True), x, direction)
    step = 1e-7
    ahead, behind = (gradient(model, x.detach() + sign * step * direction) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    kernels = vm_unet(num_classes=2).eval()
    x = x.detach().float()
    with pytest.raises(NotImplementedError, match="scan_backend='naive'"):
        gradient(kernels, x, create_graph=True).square().sum().backward()


def test_drop_path_falls_from_the_bottom() -> None:
    rates = []

    def block(dim: int, drop_path: float, **_: object) -> nn.Module:
        rates.append(drop_path)
        return nn.Identity()

    UNetDecoder((8, 16, 24, 32), (2, 2, 2, 1), block=block, drop_path_rate=0.2)
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0.2, 0, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "vmamba_tiny_s1l9"}, "encoder: unknown model 'vmamba_tiny_s1l9'; did you mean"),
        ({"encoder": "vim_tiny"}, "encoder: 'vim_tiny' has all its maps at one stride"),
        ({"encoder": "vit_tiny_patch16_224"}, "encoder: 'vit_tiny_patch16_224' has maps of strides"),
        ({"up": "expnd"}, "up: got 'expnd'"),
        ({"merge": "sum"}, "merge: got 'sum'"),
        ({"merge": "add_before"}, "merge: got 'add_before' with taps 'output'"),
        ({"block": "mlp"}, "block: got 'mlp'"),
        ({"taps": "both"}, "taps: got 'both'"),
        ({"encoder": "resnet18", "taps": "input"}, "taps: got 'input'"),
        ({"classes": 0}, "num_classes: got 0"),
        ({"decoder_depths": (1, 1)}, r"depths: got \(1, 1\)"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.unet(**({"encoder": "vmamba_tiny_s1l8"} | options))


@pytest.mark.parametrize("options", [{"heads": 5}, {"heads": 0}, {"heads": 3, "patterns": ("cross",)}])
def test_wrong_heads_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match="heads"):
        backbones.mhs_vm(**options)


def test_a_scanner_leaves_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="out_proj: got False with ssm_ratio 2"):
        SS2D(8, ssm_ratio=2.0, out_proj=False)
    with pytest.raises(ValueError, match="merge: got"):
        SS2D(8, scanner=MultiHeadScan, merge=nn.Identity)


@pytest.mark.slow
def test_exported_as_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from backbones.export import export_onnx

    net = backbones.unet("vmamba_tiny_s1l8", classes=2, decoder_depths=(0, 0, 0, 1), **THIN).eval()
    image = torch.randn(1, 3, 34, 45)
    export_onnx(net, image, tmp_path / "unet.onnx")
    session = runtime.InferenceSession(str(tmp_path / "unet.onnx"), providers=["CPUExecutionProvider"])
    batch = torch.randn(3, 3, 34, 45)
    (found,) = session.run(None, {"image": batch.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(batch), rtol=0, atol=1e-4)


def test_models_are_encoders_of_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet("tu-vmamba_tiny_s1l8", encoder_weights=None, classes=2, **THIN)
    logits = net(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 2, 64, 96)
    logits.square().mean().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.startswith("encoder.model.stages"))
