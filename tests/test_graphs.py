"""CUDA graphs where there is no GPU: what is refused. What they compute is in test_gpu.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import backbones
from backbones.mm import CudaGraphsHook, UserError
from tests.small_models import create_small, images


def test_a_model_on_a_cpu_is_refused() -> None:
    model = create_small("vim_tiny")
    with pytest.raises(ValueError, match="model, example: got tensors on cpu, expected cuda alone"):
        backbones.cuda_graphs(model)
    with pytest.raises(ValueError, match="got tensors on cpu, meta"):
        backbones.cuda_graphs(model, images().to("meta"))
    assert "forward" not in vars(model)
    assert isinstance(model(images()), torch.Tensor)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "Linear has no network and no backbone"),
        (nn.ModuleDict({"network": nn.Linear(1, 1)}), "expected cuda alone"),
        (nn.ModuleDict({"backbone": nn.Linear(1, 1)}), "expected cuda alone"),
    ],
)
def test_the_hook_says_what_it_cannot_replay(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CudaGraphsHook().before_train(SimpleNamespace(model=model))
