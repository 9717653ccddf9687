"""CUDA graphs: the kernels of a whole pass, forward or backward, launched by one call.

In eager mode the host launches hundreds of kernels per pass, one by one; on a fast GPU that takes longer than the
kernels themselves. A graph records the launches once and replays them::

    model = backbones.cuda_graphs(timm.create_model("vim_tiny").cuda())

The model stays what it was: same class, parameters, state dict, methods. Only ``model(image)`` is replayed.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from backbones.ops.tracing import all_modules, captured, copies, has_hooks, tree_map

_MOST_GRAPHS = 4  # training and inference, each with two sets of trained parameters; every graph keeps its activations
_WARMUP = 3  # passes before a capture: they compile kernels and let cuDNN choose

_logger = logging.getLogger(__name__)


def cuda_graphs(model: nn.Module, example: Tensor | None = None, *, amp: torch.dtype | None = None) -> nn.Module:
    """Lets ``model`` replay CUDA graphs of its forward and backward passes; returns ``model`` itself.

    A graph is captured at the first call in training mode and at the first without gradients, and again when parameters
    are frozen or moved, or when a module changes its mode. Drop path and dropout draw anew at every replay. What a
    graph cannot do runs in eager mode, and that is logged once: another shape than the first image's (such as a last,
    smaller batch), gradients of the image, hooks inside the model, gradient checkpointing.

    State dicts, weight averages, gradient clipping and accumulation work as usual. Wrap the model in
    ``DistributedDataParallel`` afterwards. Double backward is not supported.

    Args:
        model: any model on a GPU that is called with one image (b, in_chans, height, width) and returns a tensor or a
            list of tensors, such as a registered model, ``features_only`` or not.
        example: an image of the shape that is going to be replayed; None waits for the first call. With it, the graph
            of the current mode is captured at once.
        amp: autocast to this dtype; None follows the autocast region of each call.

    Raises:
        ValueError: ``model`` or ``example`` is not on a GPU, or ``model`` has graphs already.
    """
    if isinstance(model.__dict__.get("forward"), _ReplayedForward):
        raise ValueError(f"model: this {type(model).__name__} has CUDA graphs already")
    where = {x.device.type for x in model.parameters()} | ({example.device.type} if example is not None else set())
    if where - {"cuda"}:
        raise ValueError(f"model, example: got tensors on {', '.join(sorted(where))}, expected cuda alone")
    replayed = _ReplayedForward(model, amp)
    # Captured nodes of accumulation belong to the streams of a capture. PyTorch 2.10 and newer warn of that.
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    if example is not None:
        with torch.set_grad_enabled(model.training):
            replayed.prepare(example)
    model.forward = replayed
    return model


class _ReplayedForward:
    """Stands for ``model.forward``: replays a graph where there can be one, else runs the model."""

    def __init__(self, model: nn.Module, amp: torch.dtype | None) -> None:
        self.model, self.amp = model, amp
        self.image: tuple[torch.Size, torch.dtype] | None = None
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReplayedForward:
        copied = _ReplayedForward(memo[id(self.model)], self.amp)  # graphs read this model's parameters, not the copy's
        copied.image = self.image
        return copied

    def __reduce__(self) -> tuple:
        return _ReplayedForward, (self.model, self.amp)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._reason(args, kwargs)
        if reason is None:
            return self.prepare(args[0])(args[0])
        if reason not in self.told:
            self.told.add(reason)
            _logger.warning("%s runs without its CUDA graph: %s", type(self.model).__name__, reason)
        with self._autocast(torch.is_autocast_cache_enabled()):
            return self._eager(*args, **kwargs)

    def prepare(self, image: Tensor) -> _Graph:
        """The graph for ``image`` and the model's present state, captured if there is none yet."""
        self.image = self.image or (image.shape, image.dtype)
        key = self._key(image)
        graph = self.graphs.get(key)
        if graph is None:
            with self._autocast(cache_enabled=False), _unchanged(self.model), _uncollected():
                graph = _Graph(self._eager, self.model, image)
            self.graphs[key] = graph
            if len(self.graphs) > _MOST_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return graph

    @property
    def _eager(self) -> Callable[..., Any]:
        return type(self.model).forward.__get__(self.model)

    def _autocast(self, cache_enabled: bool) -> torch.autocast:
        enabled = self.amp is not None or torch.is_autocast_enabled("cuda")
        dtype = self.amp or torch.get_autocast_dtype("cuda")
        return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=cache_enabled)

    def _reason(self, args: tuple, kwargs: dict[str, Any]) -> str | None:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_cuda:
            return "it was not called with one image on a GPU"
        image = args[0]
        if self.image is not None and self.image != (image.shape, image.dtype):
            return f"images are {_named(image.shape, image.dtype)}, the graph is for {_named(*self.image)}"
        if image.requires_grad and torch.is_grad_enabled():
            return "the image requires a gradient"
        if torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling():
            return "it is captured or compiled as a part of something else"
        may_checkpoint = self.model.training and torch.is_grad_enabled()
        for module in all_modules(self.model):
            if has_hooks(module) and module is not self.model:
                name = next(name for name, found in self.model.named_modules() if found is module)
                return f"{name} has hooks, which a graph would not call"
            if may_checkpoint and _checkpoints(module):
                return "gradient checkpointing is on"
        return None

    def _key(self, image: Tensor) -> tuple:
        modules = all_modules(self.model)
        parameters = [x for module in modules for x in module._parameters.values() if x is not None]
        buffers = [x for module in modules for x in module._buffers.values() if x is not None]
        trained = tuple([x.requires_grad for x in parameters]) if torch.is_grad_enabled() else ()
        amp = self.amp or (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None)
        modes = tuple([module.training for module in modules])
        places = tuple([x.data_ptr() for x in (*parameters, *buffers)])
        return image.device, amp, torch.are_deterministic_algorithms_enabled(), modes, trained, places


class _Graph:
    """One captured pass, and the backward pass where a parameter requires a gradient."""

    def __init__(self, forward: Callable[[Tensor], Any], model: nn.Module, image: Tensor) -> None:
        self.image = image.detach().clone()
        named = [(name, x) for name, x in model.named_parameters() if x.requires_grad and torch.is_grad_enabled()]
        self.trained = [x for _, x in named]
        self.replays = 0
        if self.trained:
            body, names = _Body(forward, model), [f"model.{name}" for name, _ in named]

            def run(image: Tensor, *parameters: Tensor) -> Any:
                return functional_call(body, dict(zip(names, parameters, strict=True)), (image,))

            # Captured on aliases: the parameters' own nodes of accumulation belong to the streams of eager passes.
            aliases = [x.detach().requires_grad_() for x in self.trained]
            arguments = (self.image, *aliases)
            self.forward: Any = captured(run, arguments, _WARMUP)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                forward(self.image)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = forward(self.image)

    def __call__(self, image: Tensor) -> Any:
        """What the model returns; outputs are the caller's own, the next replay does not touch them."""
        self.replays += 1
        if not self.trained:
            self.image.copy_(image)
            self.graph.replay()
            return tree_map(torch.clone, self.outputs)
        _own_gradients(self.trained)
        return tree_map(lambda y: _Fresh.apply(y, self, self.replays), self.forward(image, *self.trained))


class _Body(nn.Module):
    """A model's eager forward, without the hooks of the model itself."""

    def __init__(self, forward: Callable[[Tensor], Any], model: nn.Module) -> None:
        super().__init__()
        self.model, self.eager = model, forward

    def forward(self, image: Tensor) -> Any:
        return self.eager(image)


class _Fresh(torch.autograd.Function):
    """A copy of an output. Its backward refuses a pass whose activations a later replay has overwritten."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, graph: _Graph, replay: int) -> Tensor:
        ctx.graph, ctx.replay = graph, replay
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.replay != ctx.graph.replays:
            raise RuntimeError(
                "backward of a pass whose activations are gone: with CUDA graphs the model must not run again in this "
                "mode between a forward pass and its backward pass"
            )
        return grad, None, None


def _checkpoints(module: nn.Module) -> bool:
    # Asking a module for what it lacks takes longer than all else that is asked of it.
    known = "grad_checkpointing" in vars(module) or hasattr(type(module), "grad_checkpointing")
    return known and bool(module.grad_checkpointing)


def _own_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients that wait to be added to are copied: autograd left them in the graph's buffers."""
    waiting = [(x, x.grad) for x in parameters if x.grad is not None]
    if waiting:
        for (parameter, _), copy in zip(waiting, copies([grad for _, grad in waiting]), strict=True):
            parameter.grad = copy


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Batch statistics and random numbers are after the passes of a capture what they were before."""
    buffers = [(x, x.clone()) for x in model.buffers()]
    state = torch.cuda.get_rng_state()
    yield
    for buffer, before in buffers:
        buffer.copy_(before)
    torch.cuda.set_rng_state(state)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected within: a graph that is destroyed invalidates the capture of another one, and a model
    with graphs is a cycle, which waits for the collector. What is garbage already goes first, with its memory.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _named(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, shape))} in {str(dtype).removeprefix('torch.')}"
