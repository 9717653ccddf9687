"""Layers as parts of other networks: shapes, sizes, gradients, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

import backbones.layers
from backbones.layers import (
    SS2D,
    BiAttn,
    ChannelsFirst,
    ConvFFN,
    GroupMambaLayer,
    Mamba2Mixer,
    MambaBlock,
    MambaMixer,
    MultiHeadScan,
    MultiScaleSS2D,
    NonCausalSSD,
    OnMap,
    OnTokens,
    PositionalBlock,
    Scan,
    SelectiveSSM,
    StructureAwareSSM,
    VSSBlock,
    no_weight_decay,
    unprunable,
)
from backbones.patterns import FORWARD, HILBERT, LOCAL_WINDOWS_2
from tests.small_models import SMALLEST, create_small
from tests.test_docs import ROOT, blocks

DIM = 32
SECOND = partial(SS2D, d_state=1, ssm_ratio=1.0, gated=False, conv_bias=False)
ON_MAPS: dict[str, Callable[..., nn.Module]] = {
    "SS2D": SS2D,
    "SS2D, second generation": SECOND,
    "SS2D, another pattern": partial(SS2D, scan=Scan(HILBERT)),
    "SS2D, LocalMamba": partial(SS2D, scan=Scan(LOCAL_WINDOWS_2), merge=BiAttn),
    "MultiScaleSS2D": MultiScaleSS2D,
    "GroupMambaLayer": GroupMambaLayer,
    "StructureAwareSSM": StructureAwareSSM,
    "NonCausalSSD": NonCausalSSD,
    "MultiHeadScan": MultiHeadScan,
    "VSSBlock": VSSBlock,
    "VSSBlock, second generation": partial(VSSBlock, mixer=SECOND, mlp=Mlp),
    "VSSBlock, MSVMamba": partial(VSSBlock, mixer=MultiScaleSS2D, mlp=partial(ConvFFN, residual=True)),
    "PositionalBlock": PositionalBlock,
    "PositionalBlock, VSSD": partial(PositionalBlock, mixer=NonCausalSSD),
}
ON_TOKENS: dict[str, Callable[..., nn.Module]] = {
    "MambaMixer": MambaMixer,
    "MambaMixer, one way": partial(MambaMixer, scan=Scan(FORWARD)),
    "MambaMixer, LBMamba": partial(MambaMixer, scan=Scan(FORWARD, local_window=8)),
    "Mamba2Mixer": Mamba2Mixer,
    "MambaBlock": MambaBlock,
    "MambaBlock, Mamba-2": partial(MambaBlock, mixer=Mamba2Mixer),
}
SIZES = [(4, 4), (5, 7), (1, 9), (9, 1), (1, 1)]


def check_gradients(layer: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """The output, of the input's shape; every parameter and the input got a finite gradient, and not all zeros."""
    x.requires_grad_()
    y = layer(x, *args)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    for name, leaf in [("x", x), *layer.named_parameters()]:
        assert leaf.grad is not None and leaf.grad.isfinite().all(), name
    assert x.grad is not None and x.grad.any()
    return y


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ON_MAPS)
def test_maps_of_any_size(name: str, size: tuple[int, int]) -> None:
    check_gradients(ON_MAPS[name](DIM), torch.randn(2, *size, DIM))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ON_TOKENS)
def test_tokens_of_any_number(name: str, size: tuple[int, int]) -> None:
    layer, cells = ON_TOKENS[name](DIM), size[0] * size[1]
    check_gradients(layer, torch.randn(2, cells, DIM), size)
    check_gradients(layer, torch.randn(2, cells + 1, DIM), size)  # with a class token
    x = torch.randn(2, cells, DIM)
    torch.testing.assert_close(layer(x), layer(x, (1, cells)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ON_MAPS | ON_TOKENS)
def test_layers_are_traced(name: str) -> None:
    layer = (ON_MAPS | ON_TOKENS)[name](DIM)
    x = torch.randn(2, 3, 5, DIM) if name in ON_MAPS else torch.randn(2, 15, DIM)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


@pytest.mark.parametrize("name", ON_MAPS)
def test_channels_first_is_the_same_layer(name: str) -> None:
    layer, x = ON_MAPS[name](DIM), torch.randn(2, 3, 5, DIM)
    y = ChannelsFirst(layer)(x.permute(0, 3, 1, 2))
    assert torch.equal(y, layer(x).permute(0, 3, 1, 2))


def test_layers_change_their_layout() -> None:
    x = torch.randn(2, 3, 5, DIM)
    mixer, block = MambaMixer(DIM, Scan(HILBERT)), VSSBlock(DIM)
    assert torch.equal(OnMap(mixer)(x), mixer(x.flatten(1, 2), (3, 5)).view_as(x))
    assert torch.equal(OnTokens(block, (3, 5))(x.flatten(1, 2)), block(x).flatten(1, 2))
    square = x[:, :, :3].flatten(1, 2)
    assert torch.equal(OnTokens(block)(square), OnTokens(block, (3, 3))(square))


@pytest.mark.parametrize("name", ON_MAPS | ON_TOKENS)
def test_another_width_is_named(name: str) -> None:
    layer, on_map = (ON_MAPS | ON_TOKENS)[name](DIM), name in ON_MAPS
    x = torch.randn(2, 5, 7, DIM // 2) if on_map else torch.randn(2, 35, DIM // 2)
    with pytest.raises(ValueError, match=r"^x: got shape \(2, .*, 16\), expected \((b, h, w|b, l|\.\.\.), 32\)"):
        layer(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SS2D(DIM)(torch.randn(2, DIM, 5, 7)), r"x: got shape \(2, 32, 5, 7\).*; ChannelsFirst wraps"),
        (lambda: SS2D(DIM)(torch.randn(2, 35, DIM)), r"x: got shape \(2, 35, 32\), .*; OnTokens wraps"),
        (lambda: MambaMixer(DIM)(torch.randn(2, 5, 7, DIM)), r"x: got shape \(2, 5, 7, 32\), .*; OnMap wraps"),
        (lambda: MambaMixer(DIM)(torch.randn(2, 35, DIM), (5, 6)), "grid: got 5 x 6, expected one of 35 cells"),
        (lambda: Mamba2Mixer(DIM)(torch.randn(2, 35, DIM), (6, 6)), "grid: got 6 x 6, expected one of 35 cells"),
        (lambda: OnMap(MambaMixer(DIM))(torch.randn(2, 35, DIM)), r"x: got shape .*, expected \(b, h, w, c\)"),
        (lambda: OnTokens(SS2D(DIM))(torch.randn(2, 5, 7, DIM)), r"x: got shape .*, expected \(b, l, c\)"),
        (lambda: OnTokens(SS2D(DIM))(torch.randn(2, 17, DIM)), "x: got 17 tokens, expected a square number"),
        (lambda: OnTokens(SS2D(DIM), (4, 4))(torch.randn(2, 17, DIM)), "x: got 17 tokens, expected 4 x 4; a class"),
        (lambda: Mamba2Mixer(DIM, head_dim=48), "head_dim: got 48, expected a number that divides the inner width 64"),
        (lambda: Mamba2Mixer(16), "head_dim: got 64, expected a number that divides the inner width 32"),
        (lambda: NonCausalSSD(DIM, num_heads=3), "num_heads: got 3, expected a number that divides .* 64"),
        (lambda: GroupMambaLayer(34), "dim: got 34, expected a multiple of 4"),
        (lambda: GroupMambaLayer(8), "dim: got 8 channels, expected at least 16"),
        (lambda: MultiScaleSS2D(6, ssm_ratio=1.0), "dim: got 6 channels, expected at least 8"),
        (lambda: SS2D(DIM, ssm_ratio=0.01), "ssm_ratio: got 0.01, which leaves no channel of 32"),
        (lambda: MambaMixer(0), "dim: got 0, expected at least 1"),
        (lambda: Mamba2Mixer(DIM, Scan(HILBERT)), "scan: got .hilbert. with 4 orders, expected one"),
        (lambda: StructureAwareSSM(DIM, Scan(HILBERT)), "scan: got .hilbert. with 4 orders, expected one"),
        (lambda: MultiScaleSS2D(DIM, Scan(HILBERT)), "scan: got .hilbert. with 4 orders, expected one"),
        (lambda: MultiHeadScan(DIM, ["forward"]), "patterns: got 'forward' with one order"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_without_weight_decay_are_found_in_any_network() -> None:
    net = nn.Sequential(nn.Conv2d(3, DIM, 3), ChannelsFirst(VSSBlock(DIM)))
    ssm = "1.layer.mixer.ssm."
    assert no_weight_decay(net) == {ssm + "A_log", ssm + "D", ssm + "dt_proj_bias"}


def test_the_page_lists_the_layers_that_are_tested() -> None:
    page = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed >= {name.split(",")[0] for name in ON_MAPS | ON_TOKENS}
    assert listed <= set(backbones.layers.__all__)


def test_replaced_layers_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    networks = 0
    for block in blocks(ROOT / "docs" / "layers.md"):
        if block.language == "python" and ".backward()" in block.code:
            scope: dict[str, Any] = {}
            exec(compile(block.code, "docs/layers.md", "exec"), scope)
            net = scope["net"]
            ours = [x for x in net.modules() if type(x).__module__.startswith("backbones.layers")]
            assert ours
            for layer in ours:
                assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
            networks += 1
    assert networks == 5


@pytest.mark.parametrize("name", SMALLEST)
def test_what_a_pruner_may_touch_stands_in_nothing_that_it_leaves_alone(name: str) -> None:
    """torch-pruning passes over all that is inside of its ``ignored_layers``."""
    model = create_small(name, device="meta")
    kept = {part for layer in unprunable(model) for part in layer.modules()}
    scans = [part for x in model.modules() if isinstance(x, SelectiveSSM) for part in x.modules()]
    classifiers = model.get_classifier()
    assert {*scans, *(classifiers if isinstance(classifiers, tuple) else (classifiers,))} <= kept
    if getattr(model, "rope", None) is not None:
        assert kept >= {*model.modules()}
        return
    free = {key for key, x in model.named_modules() if isinstance(x, nn.Linear | nn.Conv2d) and x not in kept}
    hidden = {key for key, _ in model.named_modules() if key.endswith((".mlp.fc1", ".mlp.dwconv"))}
    assert hidden <= free and free
    assert name != "groupmamba_tiny" or free == hidden
