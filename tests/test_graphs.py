"""CUDA graphs where there is no GPU: what is refused. What they compute is in test_gpu.py."""

import pytest
import torch

import backbones
from tests.test_models import create_shallow, images


def test_a_model_on_a_cpu_is_refused() -> None:
    model = create_shallow("vim_tiny")
    with pytest.raises(ValueError, match="model, example: got tensors on cpu, expected cuda alone"):
        backbones.cuda_graphs(model)
    with pytest.raises(ValueError, match="got tensors on cpu, meta"):
        backbones.cuda_graphs(model, images().to("meta"))
    assert "forward" not in vars(model)
    assert isinstance(model(images()), torch.Tensor)
