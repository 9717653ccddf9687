"""CUDA graphs where there is no GPU: what is refused. What they compute is in test_gpu.py."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import backbones
from backbones.mm import CudaGraphsHook, UserError
from backbones.ops.tracing import captured
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


def _make_of_old(function: Any, arguments: tuple, num_warmup_iters: int, allow_unused_input: bool) -> str:
    return torch.cuda.graph(None).capture_error_mode


def _make_of_new(
    function: Any,
    arguments: tuple,
    num_warmup_iters: int,
    allow_unused_input: bool,
    capture_error_mode: str = "global",
) -> str:
    return torch.cuda.graph(None, capture_error_mode=capture_error_mode).capture_error_mode


@pytest.mark.parametrize("make", [_make_of_old, _make_of_new])
def test_other_threads_cannot_end_a_capture(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    class Graph:
        def __init__(self, cuda_graph: None, capture_error_mode: str = "global") -> None:
            self.capture_error_mode = capture_error_mode

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    assert captured(lambda x: x, (images(),), 3) == "thread_local"
    assert torch.cuda.graph is Graph

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", partial(_fails, make))
    with pytest.raises(RuntimeError, match="out of memory"):
        captured(lambda x: x, (images(),), 3)
    assert torch.cuda.graph is Graph


def _fails(make: Any, *args: Any, **kwargs: Any) -> None:
    make(*args, **kwargs)
    raise RuntimeError("out of memory")
