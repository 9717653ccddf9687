"""Weight decay groups, layer-wise learning rates and bfloat16 training."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine")

from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS

from backbones.mm import ImageClassifier, UserError

NETWORK = {"name": "test_vit", "img_size": 16, "patch_size": 8, "num_classes": 4}


def wrapper(model: nn.Module, kind: str = "OptimWrapper", **paramwise: Any) -> OptimWrapper:
    return build_optim_wrapper(
        model,
        {
            "type": kind,
            "constructor": "TimmOptimWrapperConstructor",
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05},
            "clip_grad": {"max_norm": 1.0},
            "paramwise_cfg": paramwise,
        },
    )


def settings(model: nn.Module, key: str, **paramwise: Any) -> dict[str, float]:
    """The optimizer's ``key``, such as "lr", of every parameter."""
    values = {
        id(p): group[key] for group in wrapper(model, **paramwise).optimizer.param_groups for p in group["params"]
    }
    assert len(values) == len(list(model.parameters()))
    return {name: values[id(p)] for name, p in model.named_parameters()}


def test_every_parameter_is_in_the_right_group() -> None:
    model = ImageClassifier(network=NETWORK, loss={"type": "LabelSmoothingCrossEntropy"})
    decays = settings(model, "weight_decay")
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name in ("network.pos_embed", "network.cls_token")
        assert decays[name] == (0 if free else 0.05), name
    assert model.network.pos_embed.ndim == 3  # spared for its name, not its shape


def test_groups_of_a_nested_backbone() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(2, 2))
            self.weight = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self) -> set[str]:
            return {"A_log"}

    detector = nn.ModuleDict({"backbone": Backbone(), "head": nn.Linear(2, 2)})
    decays = settings(detector, "weight_decay")
    assert {name for name, decay in decays.items() if decay == 0} == {"backbone.A_log", "head.bias"}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_norms_and_biases_decay_where_asked() -> None:
    decays = settings(Detector(), "weight_decay", norm_decay_mult=0.5, bias_decay_mult=2.0)
    assert decays == pytest.approx(
        {f"{part}.0.weight": 0.05 for part in ("backbone", "head")}
        | {f"{part}.0.bias": 0.1 for part in ("backbone", "head")}
        | {f"{part}.1.{kind}": 0.025 for part in ("backbone", "head") for kind in ("weight", "bias")}
    )


def test_custom_keys_scale_what_they_name() -> None:
    keys = {"backbone": {"lr_mult": 0.1}, "backbone.0": {"lr_mult": 0.5, "decay_mult": 3.0}}
    rates = settings(Detector(), "lr", custom_keys=keys)
    decays = settings(Detector(), "weight_decay", custom_keys=keys)
    expected = {"backbone.0": 5e-4, "backbone.1": 1e-4, "head.0": 1e-3, "head.1": 1e-3}
    assert rates == pytest.approx({name: expected[name.rpartition(".")[0]] for name in rates})
    assert decays["backbone.0.weight"] == decays["backbone.0.bias"] == pytest.approx(0.15)
    assert decays["backbone.1.weight"] == decays["head.0.bias"] == 0 and decays["head.0.weight"] == 0.05


def test_custom_keys_and_layers_multiply() -> None:
    model = ImageClassifier(network=NETWORK, loss={"type": "LabelSmoothingCrossEntropy"})
    plain, scaled = (
        settings(model, "lr", layer_decay=0.5, custom_keys=keys) for keys in ({}, {"patch_embed": {"lr_mult": 0.1}})
    )
    assert all(scaled[name] == pytest.approx(x * (0.1 if "patch_embed" in name else 1)) for name, x in plain.items())


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({"custom_keys": {"bakbone": {"lr_mult": 0.1}}}, "no parameter has 'bakbone' in its name"),
        ({"custom_keys": {"backbone": {"lr": 0.1}}}, "custom_keys: 'backbone' is {'lr': 0.1}, expected dict"),
        ({"norm_decay": 0}, "paramwise_cfg: got .'norm_decay'., expected nothing but bias_decay_mult"),
    ],
)
def test_mistyped_settings_are_named(paramwise: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrapper(Detector(), **paramwise)


@pytest.mark.parametrize(
    ("kind", "arch", "matrices"),
    [
        ("VMamba", "vmamba_tiny_s1l8", {"A_log", "D", "dt_proj_bias"}),
        ("Vim", "vim_tiny", {"A_log", "D", "dt_proj_bias", "conv_bias", "pos_embed", "cls_token"}),
        ("GroupMamba", "groupmamba_tiny", {"A_log", "D", "dt_proj_bias"}),
    ],
)
def test_state_space_parameters_do_not_decay(kind: str, arch: str, matrices: set[str]) -> None:
    with torch.device("meta"):
        detector = nn.ModuleDict({"backbone": MODELS.build({"type": kind, "arch": arch}), "head": nn.Linear(2, 2)})
        decays = settings(detector, "weight_decay")
    free = {name for name, decay in decays.items() if decay == 0}
    assert free == {n for n, p in detector.named_parameters() if p.ndim == 1 or n.rsplit(".", 1)[-1] in matrices}
    spared = {name.rsplit(".", 1)[-1] for name, p in detector.named_parameters() if p.ndim > 1 and name in free}
    assert spared == matrices


def test_layers_of_a_classifier() -> None:
    """timm counts the stem, each block (the final norm with the last) and the classifier."""
    model = ImageClassifier(
        network={"name": "vim_tiny", "depth": 3, "num_classes": 4}, loss={"type": "BinaryCrossEntropy"}
    )
    rates = settings(model, "lr", layer_decay=0.5)
    for part, power in {
        "pos_embed": 4,
        "cls_token": 4,
        "patch_embed": 4,
        "blocks.0": 3,
        "blocks.2": 1,
        "norm": 1,
        "head": 0,
    }.items():
        found = {
            rate for name, rate in rates.items() if name.startswith(f"network.{part}.") or name == f"network.{part}"
        }
        assert found == {1e-3 * 0.5**power}, part


def test_layers_of_a_pruned_backbone_in_a_detector() -> None:
    """Blocks behind the last output do not count; out of the backbone's model the rate is whole."""
    with torch.device("meta"):
        backbone = MODELS.build({"type": "Vim", "arch": "vim_tiny", "out_indices": (1, 4)})
        detector = nn.ModuleDict({"backbone": backbone, "neck": nn.Conv2d(2, 2, 1)})
        rates = settings(detector, "lr", layer_decay=0.9)
        decays = settings(detector, "weight_decay", layer_decay=0.9)
    assert rates["neck.weight"] == rates["backbone.out_norms.4.weight"] == 1e-3
    assert rates["backbone.model.blocks.4.norm.weight"] == pytest.approx(1e-3 * 0.9)
    assert rates["backbone.model.blocks.0.norm.weight"] == pytest.approx(1e-3 * 0.9**5)
    assert rates["backbone.model.pos_embed"] == pytest.approx(1e-3 * 0.9**6)
    assert decays["backbone.model.blocks.0.mixer.ssm.A_log"] == decays["neck.bias"] == 0
    assert decays["backbone.model.blocks.0.mixer.in_proj.weight"] == decays["neck.weight"] == 0.05


def test_rates_grow_along_a_hierarchical_backbone() -> None:
    with torch.device("meta"):
        backbone = MODELS.build({"type": "EfficientVMamba", "arch": "efficientvmamba_tiny"})
        rates = settings(backbone, "lr", layer_decay=0.9)
    blocks: dict[tuple[int, int], set[float]] = defaultdict(set)
    for name, rate in rates.items():
        if match := re.match(r"model\.stages\.(\d+)\.blocks\.(\d+)", name):
            blocks[int(match[1]), int(match[2])].add(rate)
    assert all(len(found) == 1 for found in blocks.values())
    found = [blocks[key].pop() for key in sorted(blocks)]
    assert found == [pytest.approx(1e-3 * 0.9 ** (10 - i)) for i in range(10)]
    assert rates["model.stem.proj.weight"] == pytest.approx(1e-3 * 0.9**11)
    assert rates["model.downsamples.1.reduction.weight"] == found[4]  # as the first block that it leads to
    assert rates["out_norms.0.weight"] == 1e-3


def test_frozen_parameters_are_left_out() -> None:
    backbone = MODELS.build({"type": "Vim", "arch": "vim_tiny", "out_indices": (1,), "frozen_stages": 1})
    groups = wrapper(backbone, layer_decay=0.9).optimizer.param_groups
    optimized = {id(p) for group in groups for p in group["params"]}
    assert optimized == {id(p) for p in backbone.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({"dwconv_decay_mult": 0.0}, r"paramwise_cfg: got \['dwconv_decay_mult'\], expected nothing but"),
        ({"layer_decay": 1.5}, r"layer_decay: got 1.5, expected a factor within \(0, 1\]"),
        ({"layer_decay": 0.5}, "layer_decay: the model holds no timm model"),
    ],
)
def test_bad_settings_say_what_to_do(paramwise: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrapper(nn.Linear(2, 2), **paramwise)


def test_bfloat16_forward_and_float32_weights() -> None:
    model = ImageClassifier(network=NETWORK, loss={"type": "LabelSmoothingCrossEntropy"})
    dtypes: list[torch.dtype] = []
    model.network.patch_embed.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    optimizer = wrapper(model, "BFloat16OptimWrapper")
    data = {"inputs": torch.rand(8, 3, 16, 16), "targets": torch.arange(8) % 4}
    losses: list[Tensor] = [model.train_step(data, optimizer)["loss"].detach() for _ in range(15)]
    assert dtypes[0] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < losses[0]
