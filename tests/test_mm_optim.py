"""Weight decay groups and bfloat16 training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine")

from mmengine.optim import OptimWrapper, build_optim_wrapper

from backbones.mm import ImageClassifier

NETWORK = {"name": "test_vit", "img_size": 16, "patch_size": 8, "num_classes": 4}


def wrapper(model: nn.Module, kind: str = "OptimWrapper") -> OptimWrapper:
    return build_optim_wrapper(
        model,
        {
            "type": kind,
            "constructor": "TimmOptimWrapperConstructor",
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05},
            "clip_grad": {"max_norm": 1.0},
        },
    )


def test_every_parameter_is_in_the_right_group() -> None:
    model = ImageClassifier(network=NETWORK, loss={"type": "LabelSmoothingCrossEntropy"})
    decays = {id(p): group["weight_decay"] for group in wrapper(model).optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name in ("network.pos_embed", "network.cls_token")
        assert decays[id(parameter)] == (0 if free else 0.05), name
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
    free = [group["params"] for group in wrapper(detector).param_groups if group["weight_decay"] == 0]
    assert {id(p) for p in free[0]} == {id(detector["backbone"].A_log), id(detector["head"].bias)}


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
