"""Writes down what is done with tensors, as the source of a function that does it again."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from backbones.ops import native
from backbones.ops.program import Place, Writer
from backbones.ops.source import Call, Composition, Line, alive, source
from backbones.ops.tracing import TorchDispatchMode, changes_arguments, is_random, storage_of, written_by
from backbones.ops.triton_host import Launch, launches

Tensors = Sequence[Tensor | None]
Program = Callable[..., tuple[Tensor | None, ...]]
_CONSTANT = re.compile(r"\bc\d+\b")  # in the source
_FEW = 2  # calls that the library runs, for which it is not worth while

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
_EMPTY = (
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
)  # fmt: skip
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)  # with a transposed weight they are a linear layer


class Recorder(TorchDispatchMode):
    """Writes down what is done while it is entered: by PyTorch's operators, and by launches that tell it."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self._names: Any = WeakTensorKeyDictionary()
        self._places: dict[str, Place] = {}
        self._addresses: dict[str, int] = {}
        self._storages: dict[str, int] = {}
        self._beginnings: dict[str, str] = {}  # of views, the tensor that begins at the same address
        self._parts: dict[Any, str] = {}  # tensors by where they begin, their shapes and strides
        self._transposed: dict[str, str] = {}
        self._values: dict[str, Any] = {}  # what the source names besides tensors made within
        self._constants: dict[Any, str] = {}  # their names
        self._kept: list[Tensor] = []  # constants that instructions know by their addresses
        self._calls: list[Call] = []
        self._differs = False
        self._inputs = [self._name(x) for x in inputs]
        first: Any = inputs[0]
        self._device: torch.device = first.device
        self._writer = None if isinstance(native.host(self._device), str) else Writer(self._device, self._place)
        self._is_odd = any([x is not None and x.data_ptr() & 15 for x in inputs])

    def __enter__(self) -> Recorder:
        self._outer, launches.listener = launches.listener, self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        launches.listener = self._outer
        super().__exit__(*raised)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = self._parts_of(operator, args, kwargs)
        if parts is not NotImplemented:
            return parts
        results = operator(*args, **kwargs)
        made = results if isinstance(results, list | tuple) else (results,)
        if not all([isinstance(x, Tensor) for x in made]) and results is not None:
            self._differs = True  # it reads numbers, and another call may read others
            return results
        if operator is _aten.as_strided.default and len(args) > 3:
            self._differs = True  # it counts from where the storage begins, which another call's tensors may not do
        changes = changes_arguments(operator)
        if changes and not all([x in self._names for x in written_by(operator, args, kwargs)]):
            self._differs = True  # it writes to what is neither given nor made here
        call = Call(self._constant(_FUNCTIONS.get(operator, operator)), changes or is_random(operator), changes)
        given = [self._source(x, call) for x in args]
        if kwargs:
            named = {name: x for name, x in kwargs.items() if name != "pin_memory" or x}
            given += [f"{name}={self._source(x, call)}" for name, x in named.items()]
        elif operator in _PRODUCTS and given[-1] in self._transposed and (len(args) == 2 or args[0].dim() == 1):
            *bias, x, weight = given
            given = [x, self._transposed[weight], *bias]
            call = Call(self._constant(F.linear), False, reads=[name for name in given if name in self._places])
        call.arguments = ", ".join(given)
        self._calls.append(call)
        if not changes:  # else the results are among the arguments
            call.unpacks = isinstance(results, list | tuple)
            call.makes = [self._result(x, call) for x in made]
            if all([self._places[name].buffer != name for name in call.makes]):
                call.idles = "view"
            elif operator in _EMPTY:
                call.idles = "memory"
        if call.idles is None and self._writer is not None:
            call.instruction = self._writer.operator(operator, args, kwargs, made)
        if operator is _aten.t.default:
            self._transposed[self._names[results]] = given[0]
        return results

    def _parts_of(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """What a composite operator returns by those that it is made of; else NotImplemented. Only in inference mode do
        they arrive whole.
        """
        if not torch.is_inference_mode_enabled():
            return NotImplemented
        TorchDispatchMode.__enter__(self)
        try:
            return operator.decompose(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def launch(self, launch: Launch, tensors: Tensors) -> None:
        """``launch(*tensors)`` read and wrote at their addresses; it wrote to none that lives longer."""
        call = Call(self._constant(launch.run), True, True)
        given = [self._source(x, call) for x in tensors]
        call.reads = [self._beginnings.get(name, name) for name in call.reads]
        call.arguments = ", ".join([self._beginnings.get(name, name) for name in given])
        if self._writer is not None and (enqueued := launch.enqueued(*tensors)) is not None:
            call.instruction = self._writer.launch(enqueued)
        self._calls.append(call)

    def program(self, results: Tensors, packs: int | None) -> Program | None:
        """The recording as a function of the inputs, whose attribute ``source`` shows it. None where another
        call may do something else. For ``packs`` see `Recordings.call`.
        """
        if self._differs:
            return None
        last = Call("return", True)
        returned = [self._source(x, last) for x in results]
        end = Line(f"return {', '.join(returned)},", last.reads)
        calls = alive(self._calls, last.reads)
        program = self._function([Line(call.line(), [*call.reads, *call.makes]) for call in calls], end)
        if self._is_odd or sum([call.instruction is not None for call in calls]) < _FEW:
            return program
        composition = Composition(
            calls, returned, self._inputs, packs, self._places, self._device, self._kept, self._constant
        )  # fmt: skip
        return self._function(*composition.lines(f"{self._constant(program)}({', '.join(self._inputs)})"))

    def _function(self, lines: Sequence[Line], end: Line) -> Program:
        used = {name for line in (*lines, end) for name in _CONSTANT.findall(line.text)}
        values = {name: x for name, x in self._values.items() if name in used}
        text = source(self._inputs, [*values], lines, end)
        made: dict[str, Any] = {}
        exec(_compiled(text), made)
        program = made.pop("program")  # or each would keep the other alive
        program.__kwdefaults__, program.source = values, text
        return program

    def _name(self, x: Tensor | None) -> str:
        name = f"v{len(self._beginnings)}"
        self._beginnings[name] = name
        if x is not None:
            self._names[x] = self._parts[name, x.shape, x.stride()] = name
            self._addresses[name], self._storages[name] = x.data_ptr(), storage_of(x)
            self._places[name] = Place.of(x, name)
        return name

    def _result(self, x: Tensor, call: Call) -> str:
        """The name of what ``call`` made of tensors that it read. A view that there was before keeps its name."""
        name = self._name(x)
        for read in call.reads:
            if self._storages[read] == self._storages[name]:
                first, distance = self._places[read], self._addresses[name] - self._addresses[read]
                self._places[name] = Place.of(x, first.buffer, first.offset + distance if x.numel() else 0)
            if self._addresses[read] == self._addresses[name] != 0 and self._places[read].dtype == x.dtype:
                begin = self._beginnings[name] = self._beginnings[read]
                self._names[x] = self._parts.setdefault((begin, x.shape, x.stride()), name)
        return name

    def _source(self, x: Any, call: Call) -> str:
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

    def _place(self, x: Tensor) -> Place:
        """Where an instruction finds x."""
        name = self._names.get(x)
        if name is not None:
            return self._places[name]
        self._kept.append(x)
        return Place.of(x, "", x.data_ptr())

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
