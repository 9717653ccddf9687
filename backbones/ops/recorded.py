"""Operations on tensors that are recorded, and from then on run without what the host decides between them.

Between the launches of a block stand shapes, strides, choices among kernels and keys of what was compiled. For tensors
of one kind all of it comes out the same at every call, and takes the host longer than the launches do. A recording is
what remains: allocations, PyTorch's operations and launches, written down as the source of a Python function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from backbones.ops.remember import remember
from backbones.ops.tracing import TorchDispatchMode, changes_arguments, is_random
from backbones.ops.triton_host import is_capturing, launches

Tensors = Sequence[Tensor | None]
Program = Callable[..., tuple[Tensor | None, ...]]
_MOST = 16  # kinds of calls, after which all begin anew: images may be of ever new sizes
_SEEN = 2  # calls of a kind before its recording, which the next thirty make up for

_aten = torch.ops.aten
_OPERATORS = (
    _aten.addmm.default, _aten.addmm_.default, _aten.as_strided.default, _aten.baddbmm_.default, _aten.bmm.default,
    _aten.bmm.out, _aten.cat.default, _aten.empty_like.default, _aten.empty_strided.default, _aten.mm.default,
    _aten.mm.out, _aten.mul.Tensor, _aten.permute.default, _aten.select.int, _aten.split_with_sizes.default,
    _aten.sum.dim_IntList, _aten.t.default, _aten.transpose.int, _aten.unbind.int, _aten.unsqueeze.default,
    _aten.view.default,
)  # fmt: skip


def _function(operator: Any) -> Callable[..., Any]:
    """PyTorch's function or method for one of its operators, which takes half as long to call."""
    name = operator.__name__.split(".")[0]
    return getattr(torch, name) if hasattr(torch, name) else getattr(Tensor, name)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _aten.gelu.default: F.gelu, **{operator: _function(operator) for operator in _OPERATORS}
}  # fmt: skip
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)  # with a transposed weight they are a linear layer


class Recordings:
    """Of functions of tensors, by the kinds of their calls."""

    def __init__(self) -> None:
        self._kinds: dict[Any, Program | int | None] = {}  # the recording, how many calls there were, or None: never

    def call(
        self, function: Callable[..., tuple[Tensor | None, ...]], tensors: Tensors, *key: Any
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """``function(tensors, *key)``, by its recording from the fourth call of a kind on.

        Args:
            function: returns a tuple of tensors; None may stand there and among the arguments. What it does depends on
                nothing but the kinds of the tensors, the key, and tensors that live longer than the recordings.
            tensors: of the same dtypes, shapes and device at every call with the same key; strides are looked at here.
                The first is one.
            key: hashable.
        """
        strides = tuple([None if x is None else x.stride() for x in tensors])
        kind = (function.__name__, key, strides, torch.are_deterministic_algorithms_enabled())
        found = self._kinds.get(kind, 0)
        if callable(found):
            return found(*tensors)
        first: Any = tensors[0]
        if found == _SEEN and not is_capturing(first):  # whose tables of orders would be made anew at every call
            with Recorder(tensors) as recorder:
                results = function(tensors, *key)
            self._kinds[kind] = recorder.program(results)
            return results
        if found is not None and found < _SEEN:
            remember(self._kinds, kind, found + 1, _MOST)
        return function(tensors, *key)


class Recorder(TorchDispatchMode):
    """Writes down what is done while it is entered: by PyTorch's operators, and by launches that tell it."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self._names: Any = WeakTensorKeyDictionary()
        self._addresses: dict[str, tuple[int, torch.dtype]] = {}
        self._beginnings: dict[str, str] = {}  # of views, the tensor that begins at the same address
        self._parts: dict[Any, str] = {}  # tensors by where they begin, their shapes and strides
        self._transposed: dict[str, str] = {}
        self._values: dict[str, Any] = {}  # what the source names besides tensors made within
        self._constants: dict[Any, str] = {}  # their names
        self._calls: list[_Call] = []
        self._reads_numbers = False
        self._inputs = [self._name(x) for x in inputs]

    def __enter__(self) -> Recorder:
        self._outer, launches.listener = launches.listener, self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        launches.listener = self._outer
        super().__exit__(*raised)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        made = results if isinstance(results, list | tuple) else (results,)
        if not all([isinstance(x, Tensor) for x in made]) and results is not None:
            self._reads_numbers = True
            return results
        changes = changes_arguments(operator)
        call = _Call(self._constant(_FUNCTIONS.get(operator, operator)), changes or is_random(operator))
        given = [self._source(x, call) for x in args]
        if kwargs:
            named = {name: x for name, x in kwargs.items() if name != "pin_memory" or x}
            given += [f"{name}={self._source(x, call)}" for name, x in named.items()]
        elif operator in _PRODUCTS and given[-1] in self._transposed and (len(args) == 2 or args[0].dim() == 1):
            *bias, x, weight = given
            given = [x, self._transposed[weight], *bias]
            call = _Call(self._constant(F.linear), False, [name for name in given if name in self._addresses])
        call.arguments = ", ".join(given)
        self._calls.append(call)
        if changes:  # the results are among the arguments
            return results
        call.unpacks = isinstance(results, list | tuple)
        call.makes = [self._result(x, call) for x in made]
        if operator is _aten.t.default:
            self._transposed[self._names[results]] = given[0]
        return results

    def launch(self, run: Callable[..., None], tensors: Tensors) -> None:
        """``run(*tensors)`` reads and writes at their addresses."""
        call = _Call(self._constant(run), True)
        given = [self._source(x, call) for x in tensors]
        call.reads = [self._beginnings.get(name, name) for name in call.reads]
        call.arguments = ", ".join([self._beginnings.get(name, name) for name in given])
        self._calls.append(call)

    def program(self, results: Tensors) -> Program | None:
        """The recording as a function of the inputs, whose attribute ``source`` shows it. None where numbers were read:
        another call may read others.
        """
        if self._reads_numbers:
            return None
        end = _Call("return", True)
        lines = [f"return {', '.join([self._source(x, end) for x in results])},"]
        kept = {*end.reads, *self._inputs}
        for call in reversed(self._calls):
            if call.stays or kept.intersection(call.makes):
                freed = [name for name in dict.fromkeys([*call.reads, *call.makes]) if name not in kept]
                lines.append(call.line() + (f"; del {', '.join(freed)}" if freed else ""))
                kept.update(call.reads)
        parameters = ", ".join([*self._inputs, "*", *self._values] if self._values else self._inputs)
        source = f"def program({parameters}):\n    " + "\n    ".join(reversed(lines)) + "\n"
        made: dict[str, Any] = {}
        exec(_compiled(source), made)
        program = made.pop("program")  # or each would keep the other alive
        program.__kwdefaults__, program.source = self._values, source
        return program

    def _name(self, x: Tensor | None) -> str:
        name = f"v{len(self._beginnings)}"
        self._beginnings[name] = name
        if x is not None:
            self._names[x] = self._parts[name, x.shape, x.stride()] = name
            self._addresses[name] = x.data_ptr(), x.dtype
        return name

    def _result(self, x: Tensor, call: _Call) -> str:
        """The name of what ``call`` made of tensors that it read. A view that there was before keeps its name."""
        name = self._name(x)
        for read in call.reads:
            if self._addresses[read] == self._addresses[name] != (0, x.dtype):
                begin = self._beginnings[name] = self._beginnings[read]
                self._names[x] = self._parts.setdefault((begin, x.shape, x.stride()), name)
        return name

    def _source(self, x: Any, call: _Call) -> str:
        """How the source names x, which ``call`` reads."""
        if isinstance(x, list | tuple):
            return f"[{', '.join([self._source(each, call) for each in x])}]"
        if isinstance(x, Tensor):
            name = self._names.get(x)
            if name is None:
                return self._constant(x)
            call.reads.append(name)
            return name
        return repr(x) if x is None or isinstance(x, int) else self._constant(x)

    def _constant(self, x: Any) -> str:
        key = id(x) if isinstance(x, Tensor | float) else x
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self._values[self._constants[key]] = x
        return self._constants[key]


@functools.lru_cache(256)
def _compiled(source: str) -> CodeType:
    """Blocks of one kind have one source."""
    return compile(source, "<recorded>", "exec")


class _Call:
    """One line of a program."""

    def __init__(self, function: str, stays: bool, reads: Sequence[str] = ()) -> None:
        self.function, self.stays = function, stays  # even if nobody reads what it makes
        self.arguments = ""
        self.reads = list(reads)
        self.makes: list[str] = []
        self.unpacks = False

    def line(self) -> str:
        call = f"{self.function}({self.arguments})"
        if not self.makes:
            return call
        return f"{', '.join(self.makes)}{',' if self.unpacks else ''} = {call}"
