"""Everything that this package uses of PyTorch without PyTorch's promise, behind functions of its own.

Names with an underscore and ``torch.fx.experimental`` may change in any version. Nothing else in the package uses them;
`tests/test_private_torch.py` holds it to that, and each of them to what is assumed of it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._library import simple_registry
from torch.autograd import forward_ad
from torch.fx.experimental import symbolic_shapes
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as RunningNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

_CPU_ALONE = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

__all__ = [
    "BatchNorm",  # of any number of dimensions, over all processes or one
    "RunningNorm",  # and instance norms, which may keep statistics as well
    "State",
    "TorchDispatchMode",
    "Weight",
    "all_modules",
    "arguments_of",
    "below_autograd",
    "captured",
    "casts",
    "changes_arguments",
    "copies",
    "current_gpu",
    "has_gradient_hooks",
    "has_hooks",
    "has_saved_tensor_hooks",
    "has_static_value",
    "identity",
    "is_as_written",
    "is_exporting",
    "is_hooked",
    "is_hooked_before",
    "is_hooked_everywhere",
    "is_random",
    "is_replaced",
    "is_traced",
    "is_transformed",
    "is_watched",
    "kind_of",
    "own_weight",
    "reads_numbers",
    "register_fake",
    "returns_of",
    "runs_eagerly",
    "statically_true",
    "storage_of",
    "tree_map",
    "untraced",
    "written_by",
]


def captured(function: Callable[..., Any], arguments: tuple[Tensor, ...], warmup: int) -> Any:
    """``function`` with its passes captured as CUDA graphs, by ``torch.cuda.make_graphed_callables``.

    The captures are held to the calls of their own thread. By default any thread that asks something of CUDA meanwhile
    ends them with an error, and itself: a loader that pins memory does. PyTorch lets its callers choose from 2.14 on;
    before, the mode is set where it begins a capture.
    """
    cuda: Any = torch.cuda
    make = partial(cuda.make_graphed_callables, function, arguments, warmup, allow_unused_input=True)
    if "capture_error_mode" in signature(cuda.make_graphed_callables).parameters:
        return make(capture_error_mode="thread_local")
    graph = cuda.graph
    cuda.graph = partial(graph, capture_error_mode="thread_local")
    try:
        return make()
    finally:
        cuda.graph = graph


def current_gpu() -> int:
    """The number of the current GPU, for a thread that has used one: `torch.cuda.current_device` looks for that first,
    which takes as long as a tenth of a launch.
    """
    return torch._C._cuda_getDevice()


def is_transformed(*tensors: Any) -> bool:
    """Whether forward-mode differentiation or a gradient of ``torch.func`` follows one of these.

    Both see through plain PyTorch only: an operator would lose the tangent, or have no rule for it.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None:
        return False  # nobody differentiates so: a tenth of a microsecond
    given = [x for x in tensors if isinstance(x, Tensor)]
    if any(torch._C._functorch.is_gradtrackingtensor(x) for x in given):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def runs_eagerly(x: Tensor) -> bool:
    """Whether a kernel outside of ``torch.library`` may compute with ``x``: its numbers are there, and no compiler or
    tracer looks on, which fuse and record PyTorch's own operations.
    """
    return (
        not x.is_meta and x.numel() > 0 and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def is_watched() -> bool:
    """Whether something looks at the operators that run now, such as a counter of operations, or transforms them.

    Modes whose class has ``hears_launches`` do not count: they learn of launches by themselves.
    """
    count = torch._C._len_torch_dispatch_stack()
    if count and not all([hasattr(torch._C._get_dispatch_stack_at(i), "hears_launches") for i in range(count)]):
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether functions see, or change, the gradient of a tensor."""
    return bool(x._backward_hooks)


def has_saved_tensor_hooks() -> bool:
    """Whether hooks see what autograd saves now: some move it elsewhere, and those of checkpoints count it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_traced() -> bool:
    """Whether tensors made now belong to a tracer or function transform, and must not outlive it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    if not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None:
        return False
    probe = torch.empty(0, device="cpu")  # some modes only look on
    return type(probe) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(probe)


@contextmanager
def untraced() -> Iterator[None]:
    """Tensors made within hold numbers, which those of a tracer do not; no tracer records what is done with them."""
    state = torch._C._get_tracing_state()
    if state is not None:
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes(), torch._C._DisableFuncTorch():
            yield
    finally:
        if state is not None:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def below_autograd(op: Any, kernel: Callable[..., Any], keys: Any, *args: Any) -> Any:
    """Runs an operator out of its implementation for autograd that got ``keys``: its ``kernel``, or first what PyTorch
    puts in between, such as a mode that counts operations.
    """
    below = keys & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        # A second round through the dispatcher takes as long as a small kernel.
        return kernel(*args) if below == _CPU_ALONE else op.redispatch(below, *args)


def register_fake(library: torch.library.Library, op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torch.library.register_fake`` for an operator of ``library``, without its look through all loaded modules for
    the name of the caller, which is a quarter of the time that this package takes to import.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{library.ns}::{op}"
        fakes = getattr(simple_registry.singleton.find(name), "fake_impl", None)
        if fakes is None or "lib" not in signature(fakes.register).parameters:  # older versions of PyTorch
            torch.library.register_fake(name, function, lib=library)
        else:
            library._registration_handles.append(fakes.register(function, function.__module__, lib=library))
        return function

    return register


def has_static_value(side: int | torch.SymInt) -> bool:
    """Whether a side is one number for every call of the program that is traced."""
    known = getattr(symbolic_shapes, "has_static_value", None)
    if known is None:  # older versions of PyTorch cannot tell while they compile
        return isinstance(side, int) and not torch.compiler.is_compiling()
    return known(side)


def statically_true(condition: Any) -> bool:
    """Whether ``condition`` is known to hold without adding a guard to the program that is traced."""
    return symbolic_shapes.statically_known_true(condition)


@torch.compiler.assume_constant_result  # traced, PyTorch's own is True whether one exports or not
def is_exporting() -> bool:
    """Whether a program is traced for ``torch.export``; True where PyTorch cannot tell."""
    return getattr(torch.compiler, "is_exporting", lambda: True)()


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Those of its own, by kind."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has hooks of its own that would see a call of it."""
    return any(_hooks(module))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks would see a call of ``module``."""
    return has_hooks(module) or _has_any_global_hook()


def identity(x: Tensor) -> tuple[Any, ...]:
    """A key that two tensors share exactly if they are the same, unmodified part of one storage."""
    version = 0 if x.is_inference() else x._version
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), version


def storage_of(x: Tensor) -> int:
    """A number that tensors in one storage share while it lives."""
    return x.untyped_storage()._cdata


def arguments_of(operator: Any) -> Sequence[Any]:
    """Those of PyTorch's operator, with their names, types and defaults."""
    return operator._schema.arguments


def written_by(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Those of the arguments to which PyTorch's operator writes."""
    found: list[Tensor] = []
    for i, argument in enumerate(arguments_of(operator)):
        if argument.is_write:
            value = args[i] if i < len(args) else kwargs[argument.name]
            found += value if isinstance(value, list | tuple) else (value,)
    return found


def returns_of(operator: Any) -> int:
    """How many results PyTorch's operator has."""
    return len(operator._schema.returns)


def changes_arguments(operator: Any) -> bool:
    """Whether PyTorch's operator writes into tensors that it is given."""
    return operator._schema.is_mutable


def reads_numbers(operator: Any, args: Sequence[Any]) -> bool:
    """Whether what PyTorch's operator returns is a number in a tensor, or has a shape that depends on such."""
    if operator is torch.ops.aten.index.Tensor:
        return any([x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]])
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(operator.tags)


def is_random(operator: Any) -> bool:
    """Whether PyTorch's operator draws numbers."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies of all tensors, in few launches."""
    return torch._foreach_add(list(tensors), 0)


def casts(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of all tensors in a dtype, in few launches."""
    results = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if results:
        torch._foreach_copy_(results, list(tensors))
    return results


def all_modules(module: nn.Module, without: Callable[[nn.Module], bool] | None = None) -> dict[nn.Module, None]:
    """``module.modules()``, as keys in some order: a tenth of the time, most of which goes into their names.

    Modules within are left out, with all that they hold, where ``without`` says so.
    """
    found: dict[nn.Module, None] = {module: None}
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found and not (without and without(child)):
                found[child] = None
                waiting.append(child)
    return found


class State:
    """What calls of a module depend on besides their arguments and parameters: the modules within it, their classes,
    all attributes and buffers, which parameters there are, and whether there are hooks.

    What stands for a parameter for a while, see `Weight`, does not count.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(all_modules(module))
        self._within = modules[1:]  # not the module itself, for which this may be kept
        owns = [vars(each) for each in modules]
        parameters = [own["_parameters"] for own in owns]  # those of a scripted module are no dictionary
        counts = [len(own.keys() - inner.keys()) for own, inner in zip(owns, parameters, strict=True)]
        self._attributes = list(zip(owns, counts, parameters, strict=True))
        self._inner = [own[name] for own in owns for name in ("_modules", "_buffers")]
        self._hooks = [hooks for each in modules for hooks in _hooks(each)]
        self._found = self._look()
        self._has_tensors = any([isinstance(x, Tensor) for x in self._found])

    def holds(self) -> bool:
        """Whether it is still so."""
        found = self._look()
        if self._has_tensors:
            return len(found) == len(self._found) and all(map(is_, found, self._found))
        # Lists take what is the same object as equal, in a tenth of the time. Another one that is equal does the same
        # until it changes, and is looked at by each call.
        try:
            return found == self._found
        except (RuntimeError, TypeError, ValueError):  # tensors and arrays of several numbers
            return False

    def _look(self) -> list[Any]:
        found: list[Any] = [*map(type, self._within)]
        for own, count, parameters in self._attributes:
            if own["_parameters"] is not parameters:  # but maybe equal to it
                return []
            if len(own) == count:
                found += own.values()
            else:  # something stands for parameters
                found += [x for name, x in own.items() if name not in parameters]
            if parameters:
                found += map(type, parameters.values())
        for inner in filter(None, self._inner):
            found += inner.values()
        found += filter(None, self._hooks)
        return found


def own_weight(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that stands under this name in ``module`` itself; not what is computed, nor put in its place."""
    return None if name in vars(module) else module._parameters.get(name)


def is_hooked_before(module: nn.Module) -> bool:
    """Whether something runs before ``module`` does, which may put other weights in place."""
    return bool(module._forward_pre_hooks)


def is_replaced(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs something else than its class says: a function that was set on the instance,
    or what ``module.compile()`` made.
    """
    return "forward" in vars(module) or module._compiled_call_impl is not None


def is_hooked_everywhere() -> bool:
    """Whether hooks would see a call of any module."""
    return bool(_has_any_global_hook())


def is_as_written(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs what its class says and nothing besides, unless `is_hooked_everywhere`."""
    return not has_hooks(module) and not is_replaced(module)


class Weight:
    """Where a module has a parameter, or what stands for it now, or a buffer; and of what kind that was when it was
    found.

    Attributes:
        kind: see `kind_of`.
    """

    __slots__ = ("_kept", "_name", "_own", "kind")

    def __init__(self, module: nn.Module, name: str) -> None:
        self._kept: dict[str, Any] = module._buffers if name in module._buffers else module._parameters
        self._own, self._name = vars(module), name
        self.kind = kind_of(self.now())

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Weight | None:
        """None where the module goes without."""
        found = cls(module, name)
        return found if found.kind else None

    @property
    def dtype(self) -> torch.dtype:
        """As ``kind`` has it."""
        return self.kind[1]

    @property
    def shape(self) -> torch.Size:
        """As ``kind`` has it."""
        return self.kind[2]

    @property
    def is_plain(self) -> bool:
        """Whether it is contiguous, and of no class with operators of its own."""
        return self.kind[0] in (Tensor, nn.Parameter) and self.kind[3]

    def now(self) -> Any:
        """The tensor, as ``getattr(module, name)`` gives it, in a third of the time."""
        return self._own.get(self._name, self._kept.get(self._name))


def kind_of(x: Tensor | None) -> tuple[Any, ...]:
    """The class, dtype and shape of a tensor, whether it is contiguous, and its GPU."""
    return () if x is None else (type(x), x.dtype, x.shape, x.is_contiguous(), x.get_device())
