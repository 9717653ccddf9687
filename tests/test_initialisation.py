"""What a fresh model starts from: the distribution of every parameter, as the originals draw them."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (
    SS2D,
    GroupMambaLayer,
    Mamba2Mixer,
    MambaMixer,
    MultiScaleSS2D,
    NonCausalSSD,
    Scan,
    SelectiveSSM,
    StructureAwareSSM,
)
from backbones.models.plainmamba import PlainMambaMixer
from backbones.patterns import FORWARD, SNAKE
from tests.small_models import SMALLEST, create, create_small, images, is_plain

KINDS = {
    nn.Linear: "linear",
    nn.Conv2d: "conv",
    nn.LayerNorm: "norm",
    nn.RMSNorm: "norm",
    nn.GroupNorm: "norm",
    nn.BatchNorm1d: "norm",
    nn.BatchNorm2d: "norm",
}
DEPTH = 3
# Of registered width: samples are large enough there to tell distributions apart.
MODELS: dict[str, dict[str, Any]] = {
    name: {"depth": DEPTH} if is_plain(name) else {"depths": (1, 1, 1, 1)} for name in SMALLEST
}
ZERO, ONE = ("constant", 0.0), ("constant", 1.0)
STEP, DECAY, RANDOM_DECAY = ("step", 0.0), ("decay", 0.0), ("random decay", 0.0)
Rule = tuple[str, Any]  # a kind of distribution, and its scale, maybe a function of the shape


def normal(std: Any) -> Rule:
    return "normal", std


def uniform(bound: Any) -> Rule:
    return "uniform", bound


FAN_IN = uniform(lambda shape: math.prod(shape[1:]) ** -0.5)  # PyTorch's own
LAST = uniform(lambda shape: shape[-1] ** -0.5)  # the same where an axis of orders stands in front
RESIDUAL = uniform(lambda shape: (shape[1] * DEPTH) ** -0.5)  # PyTorch's own over the root of the depth
LECUN = normal(lambda shape: math.prod(shape[1:]) ** -0.5)
FAN_OUT = normal(lambda shape: (2 / (math.prod(shape[2:]) * (shape[0] if shape[1] > 1 else 1))) ** 0.5)

# Patterns of names, or "linear.weight" and so on for all layers of a kind; the first that fits counts.
SSM: dict[str, Rule] = {
    r"\.A_log$": DECAY,
    r"\.D$": ONE,
    r"\.dt_proj_bias$": STEP,
    r"\.(dt_proj|x_proj|conv)_weight$": LAST,
    r"\.conv_bias$": uniform(0.5),  # of four taps
    "norm.weight": ONE,
    "norm.bias": ZERO,
    "conv.weight": FAN_IN,
    "conv.bias": ("bias", 0.0),
}
VIM: dict[str, Rule] = {
    r"^(pos_embed|cls_token|head\.weight)$": normal(0.02),
    r"^head\.bias$": ZERO,
    r"^patch_embed\.proj\.weight$": LECUN,
    r"^patch_embed\.proj\.bias$": ZERO,
    r"\.out_proj\.weight$": RESIDUAL,
    "linear.weight": FAN_IN,
}
NARROW: dict[str, Rule] = {"linear.weight": normal(0.02), "linear.bias": ZERO}


def chained(*tables: dict[str, Rule]) -> list[tuple[str, Rule]]:
    return [row for table in tables for row in table.items()]


FAMILIES: dict[str, list[tuple[str, Rule]]] = {
    "vim": chained({r"\.dt_proj_bias$": ("step, forwards alone", 0.0)}, VIM, SSM),
    "lbvim": chained(
        {
            r"^attn_pool\.latent$": normal(lambda shape: shape[-1] ** -0.5),
            r"^attn_pool\.kv\.weight$": normal(0.02),
            r"^attn_pool\.kv\.bias$": ZERO,
        },
        VIM,
        SSM,
    ),
    "localvim": chained(
        {
            r"^cls_token$|\.dt_proj_bias$": ZERO,
            r"^pos_embed$|\.(x_proj|dt_proj)_weight$": normal(0.02),
            r"\.out_proj\.weight$": RESIDUAL,
        },
        NARROW,
        SSM,
    ),
    "plainmamba": chained(
        {
            r"^pos_embed$|\.direction_B$|\.(x_proj|dt_proj)_weight$": normal(0.02),
            r"^head\.weight$": normal(0.01),
            r"\.dt_proj_bias$": ZERO,
        },
        NARROW,
        SSM,
    ),
    "adventurer": chained({r"\.A_log$": RANDOM_DECAY, r"\.dt_bias$": STEP, "linear.bias": ZERO}, VIM, SSM),
    "groupmamba": chained(
        {
            r"\.skip_scale$": ONE,
            r"\.mixer\.(in|out)_proj\.weight$": normal(0.02),
            "conv.weight": FAN_OUT,
            "conv.bias": ZERO,
        },
        NARROW,
        SSM,
    ),
    "msvmamba": chained({r"\.mlp\.fc[12]\.weight$": FAN_IN, r"\.mlp\.fc[12]\.bias$": ("bias", 0.0)}, NARROW, SSM),
    "spatialmamba": chained({r"\.fusion\.(weight|alpha)$": ONE}, NARROW, SSM),
    "vssd": chained({r"\.A_log$": RANDOM_DECAY, r"\.dt_bias$": STEP}, NARROW, SSM),
    "": chained(NARROW, SSM),  # hierarchies that start as VMamba does
}
# Mixers with a head or channel for each of many decays and steps.
HEADS = 512
MIXERS = {
    "Mamba2Mixer": lambda **dd: Mamba2Mixer(HEADS // 2, Scan(FORWARD), d_state=2, head_dim=1, **dd),
    "NonCausalSSD": lambda **dd: NonCausalSSD(HEADS // 2, num_heads=HEADS, d_state=2, **dd),
    "SelectiveSSM": lambda **dd: SelectiveSSM(HEADS // 2, num_orders=2, **dd),
}


def holds_distribution(values: Tensor, kind: str, scale: float) -> None:
    """Four standard errors around mean and spread; no uniform number is beyond its bound, some normal ones are."""
    x, n = values.detach().double().flatten() / scale, values.numel()
    variance, error = (1 / 3, (4 / 45) ** 0.5) if kind == "uniform" else (1.0, 2**0.5)
    assert abs(x.mean()) <= 4 * (variance / n) ** 0.5
    assert abs(x.square().mean() - variance) <= 4 * error / n**0.5
    if kind == "uniform":
        assert x.abs().max() <= 1 + 1e-6
    elif n > 300:
        assert x.abs().max() > 2


def holds_steps(bias: Tensor, low: float = 1e-3, high: float = 0.1) -> None:
    """softplus of it is log-uniform between ``low`` and ``high``."""
    steps = F.softplus(bias.detach().double()).log()
    middle, half = (math.log(low) + math.log(high)) / 2, (math.log(high) - math.log(low)) / 2
    assert (steps - middle).abs().max() <= half + 1e-4
    holds_distribution(steps - middle, "uniform", half * (1 + 1e-4))


def rule_of(rules: list[tuple[str, Rule]], name: str, owner: nn.Module) -> Rule:
    kind = next((kind for cls, kind in KINDS.items() if isinstance(owner, cls)), "")
    of_kind = f"{kind}.{name.rpartition('.')[2]}"
    return next(rule for pattern, rule in rules if pattern == of_kind or re.search(pattern, name))


@pytest.mark.parametrize("name", SMALLEST)
def test_every_parameter_starts_from_its_distribution(name: str) -> None:
    rules = FAMILIES[max((x for x in FAMILIES if name.startswith(x)), key=len)]
    model = create(name, **{"num_classes": 100, **MODELS[name]})
    for owner, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            kind, scale = rule_of(rules, f"{owner}.{leaf}".lstrip("."), module)
            scale = scale(p.shape) if callable(scale) else scale
            try:
                if kind == "constant":
                    assert (p == scale).all()
                elif kind == "bias":  # PyTorch's: the bound of the weights beside it
                    holds_distribution(p, "uniform", math.prod(module.weight.shape[1:]) ** -0.5)
                elif kind == "decay":
                    expected = torch.arange(1, p.shape[-1] + 1.0).log().expand_as(p)
                    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
                elif kind == "random decay":
                    assert p.exp().min() >= 1 and p.exp().max() <= 16
                elif kind.startswith("step"):
                    holds_steps(p[:1] if "forwards" in kind else p)
                    assert "forwards" not in kind or not p[1:].any()
                else:
                    holds_distribution(p, kind, scale)
            except AssertionError as error:
                raise AssertionError(f"{owner}.{leaf}: expected {kind} {scale}") from error


# Norms whose epsilon is 1e-6. All others, batch norms too, have 1e-5.
NARROW_EPSILON = {
    "groupmamba": r"^stages\.\d+\.norm$|\.blocks\.\d+\.norm2$|^head\.norm$|^head\.class_block\.norm[12]$",
    "plainmamba": r"^norm$",
}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_norm_has_its_epsilon(name: str) -> None:
    """Most recordings are too coarse to tell 1e-5 from 1e-6."""
    pattern = next((x for family, x in NARROW_EPSILON.items() if name.startswith(family)), "^$")
    model = create_small(name, device="meta")
    norms = {key: m for key, m in model.named_modules() if KINDS.get(type(m)) == "norm" or "Norm" in type(m).__name__}
    expected = {key: 1e-6 if re.search(pattern, key) else 1e-5 for key in norms}
    found = {key: m.eps for key, m in norms.items() if hasattr(m, "eps")}
    assert found == {key: eps for key, eps in expected.items() if key in found}
    assert len(found) > 3 and (pattern == "^$") == (1e-6 not in found.values())
    assert {m.momentum for m in norms.values() if isinstance(m, nn.modules.batchnorm._BatchNorm)} <= {0.1}


@pytest.mark.parametrize("mixer", ["Mamba2Mixer", "NonCausalSSD"])
def test_heads_decay_at_rates_of_one_to_sixteen(mixer: str) -> None:
    A = MIXERS[mixer]().A_log.exp()
    assert A.shape == (HEADS,)
    holds_distribution(A - 8.5, "uniform", 7.5 * (1 + 1e-6))


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_start_between_a_thousandth_and_a_tenth(mixer: str) -> None:
    module = MIXERS[mixer]()
    holds_steps(module.dt_proj_bias if mixer == "SelectiveSSM" else module.dt_bias)


def test_steps_have_a_floor() -> None:
    ssm = SelectiveSSM(64, num_orders=2)
    for floor, given in ((1e-4, {}), (1e-3, {"dt_floor": 1e-3})):
        ssm.reset_parameters(dt_min=1e-6, dt_max=1e-5, **given)
        torch.testing.assert_close(F.softplus(ssm.dt_proj_bias), torch.full((2, 64), floor), rtol=1e-3, atol=0)
    ssm.reset_parameters(dt_min=1e-2, dt_max=1.0)
    holds_steps(ssm.dt_proj_bias, 1e-2, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_rates_are_float32_in_half_precision(dtype: torch.dtype) -> None:
    ssm = SelectiveSSM(4, d_state=16, num_orders=2)
    expected = -torch.exp(ssm.A_log.to(dtype).float())
    half = ssm.to(dtype)
    assert half.A_log.dtype == dtype and half.A.dtype == torch.float32
    assert torch.equal(half.A, expected)
    assert ssm.double().A.dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("name", SMALLEST)
def test_every_scan_of_a_model_in_half_precision_takes_its_decay_in_float32(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.dtype] = []
    for module in ("layers.selective_ssm", "layers.mamba2", "layers.path_ssm"):
        watch(monkeypatch, f"backbones.{module}.selective_scan", taken)
    watch(monkeypatch, "backbones.layers.mamba2.ssd", taken)
    watch(monkeypatch, "backbones.layers.noncausal_ssd.ssd_noncausal", taken)
    model = create_small(name).eval().bfloat16()
    y = model(images().bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert set(taken) == {torch.float32}


def watch(monkeypatch: pytest.MonkeyPatch, path: str, taken: list[torch.dtype]) -> None:
    """Notes the dtype of A, the third argument of every scan."""
    module, _, name = path.rpartition(".")
    function = getattr(__import__(module, fromlist=[name]), name)

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        taken.append(args[2].dtype)
        return function(*args, **kwargs)

    monkeypatch.setattr(path, noting)


@pytest.mark.parametrize(("dim", "rank"), [(16, 1), (17, 2), (40, 3), (48, 3)])
def test_ranks_of_step_sizes_are_rounded_up(dim: int, rank: int) -> None:
    """A sixteenth of the width of the map, not of the inner one; of a group's in GroupMamba."""
    dd = {"device": "meta"}
    layers: list[Any] = [
        MambaMixer(dim, **dd).ssm,
        MambaMixer(dim, expand=4, **dd).ssm,
        SS2D(dim, **dd).ssm,
        SS2D(dim, ssm_ratio=1.0, **dd).ssm,
        MultiScaleSS2D(dim, **dd).ssm_full,
        MultiScaleSS2D(dim, **dd).ssm_low,
        StructureAwareSSM(dim, **dd).ssm,
        GroupMambaLayer(4 * dim, **dd).ssm,
        PlainMambaMixer(dim, Scan(SNAKE), **dd).ssm,
        SelectiveSSM(2 * dim, **dd),
    ]
    assert [x.dt_rank for x in layers] == [rank] * len(layers)
    assert [x.dt_proj_weight.shape[-1] for x in layers] == [rank] * len(layers)
    assert [x.x_proj_weight.shape[1] for x in layers] == [rank + 2 * x.d_state for x in layers]


def test_a_rank_that_is_given_is_taken() -> None:
    assert MambaMixer(40, dt_rank=5, device="meta").ssm.dt_rank == 5
    assert SS2D(40, dt_rank=5, device="meta").ssm.dt_rank == 5
    assert SelectiveSSM(80, dt_rank=5, device="meta").dt_rank == 5


@pytest.mark.parametrize("name", SMALLEST)
def test_a_classifier_put_in_place_starts_as_the_first_did(name: str) -> None:
    model = create(name, **MODELS[name])
    model.reset_classifier(200)
    classifiers = model.get_classifier()
    std = 0.01 if name.startswith("plainmamba") else 0.02
    for fc in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        holds_distribution(fc.weight, "normal", std)
        assert fc.out_features == 200 and not fc.bias.any()
