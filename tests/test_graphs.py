"""CUDA graphs where there is no GPU: what is refused. What they compute is in test_gpu.py."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.graphs import _ReplayedForward
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


class _OnGPU(Tensor):
    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def _reason(model: nn.Module, image: Tensor) -> str | None:
    return _ReplayedForward(model, None)._reason((image.as_subclass(_OnGPU),), {})


@pytest.fixture
def _not_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("_not_capturing")
@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_inside_a_model_are_named(hook: str) -> None:
    model = create_small("vmamba_tiny_s1l8")
    name, module = [found for found in model.named_modules() if isinstance(found[1], nn.Linear)][-2]
    handle = getattr(module, hook)(lambda *_: None)
    assert _reason(model, images()) == f"{name} has hooks, which a graph would not call"
    handle.remove()
    getattr(model, hook)(lambda *_: None)  # PyTorch calls those of the model itself around the replay
    assert _reason(model, images()) is None


@pytest.mark.usefixtures("_not_capturing")
def test_checkpointing_is_seen_in_training_and_in_any_module() -> None:
    model = create_small("vmamba_tiny_s1l8").train()
    wrapped = nn.Sequential(model)
    assert _reason(wrapped, images()) is None
    model.set_grad_checkpointing()
    assert _reason(wrapped, images()) == "gradient checkpointing is on"
    with torch.no_grad():
        assert _reason(wrapped, images()) is None
    assert _reason(wrapped.eval(), images()) is None

    class Always(nn.Identity):
        grad_checkpointing = True

    assert _reason(nn.Sequential(Always()).train(), images()) == "gradient checkpointing is on"


def test_what_asks_for_another_graph() -> None:
    model = create_small("vmamba_tiny_s1l8").train()
    replayed = _ReplayedForward(model, None)

    def key() -> tuple:
        return replayed._key(images())

    seen = [key()]
    assert key() == seen[0]
    last = list(model.modules())[-1]
    last.eval()
    seen.append(key())
    last.train()
    parameter = list(model.parameters())[-1]
    parameter.requires_grad_(False)
    seen.append(key())
    parameter.requires_grad_(True)
    with torch.no_grad():
        seen.append(key())
    parameter.data = parameter.data.clone()
    seen.append(key())
    model.register_buffer("more", torch.zeros(1))
    seen.append(key())
    assert len(set(seen)) == len(seen)
