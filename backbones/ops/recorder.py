"""Writes down what is done with tensors, as the source of a function that does it again."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from backbones.ops import native
from backbones.ops.program import Place, Writer
from backbones.ops.source import Call, Composition, Line, Packed, alive, part_of, source
from backbones.ops.tracing import (
    TorchDispatchMode,
    changes_arguments,
    is_random,
    reads_numbers,
    storage_of,
    written_by,
)
from backbones.ops.triton_host import Launch, launches

Tensors = Sequence[Tensor | None]
_CONSTANT = re.compile(r"\bc\d+\b")  # in the source
_NAMESPACES = ("aten", "backbones")  # of operators; those of others may talk to other processes
_FEW = 2  # calls that the library runs, for which it is not worth while

_aten = torch.ops.aten
_OPERATORS = (
    _aten.addmm.default, _aten.addmm_.default, _aten.as_strided.default, _aten.baddbmm_.default, _aten.bmm.default,
    _aten.bmm.out, _aten.cat.default, _aten.empty_like.default, _aten.empty_strided.default, _aten.mm.default,
    _aten.mm.out, _aten.mul.Tensor, _aten.permute.default, _aten.select.int, _aten.split_with_sizes.default,
    _aten.sum.dim_IntList, _aten.t.default, _aten.transpose.int, _aten.unbind.int, _aten.unsqueeze.default,
    _aten.view.default,
)  # fmt: skip


class Program(Protocol):
    """A recording, as a function of its inputs.

    Attributes:
        source: of the function.
        packed: where its results lie that are packed, if any are.
    """

    source: str
    packed: Packed | None

    def __call__(self, *inputs: Tensor | None) -> tuple[Any, ...]:
        """Does again what was recorded."""


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
    """Writes down what is done while it is entered: by PyTorch's operators, and by launches that tell it.

    Args:
        inputs: of what is done; the first is a tensor.
        closed: all floating-point numbers that it reads are given or made within. Then it may be entered several times,
            and finds a tensor again by its memory; see `found`.
    """

    hears_launches = True  # see `backbones.ops.tracing.is_watched`

    def __init__(self, inputs: Tensors, closed: bool = False) -> None:
        super().__init__()
        self._closed = closed
        self._buffers: dict[int, list[str]] = {}  # tensors that are no views, by their storage
        self._kept_numbers: list[StorageWeakRef] = []  # no other storage gets the number of one of these
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
        self._differs = self._launched = False
        self._inputs = [self._name(x) for x in inputs]
        for x, name in zip(inputs, self._inputs, strict=True):
            if closed and x is not None:
                self._keep(x, name)
        first: Any = inputs[0]
        self._device: torch.device = first.device
        self._writer = None if isinstance(native.host(self._device), str) else Writer(self._device, self._place)

    @property
    def is_closed(self) -> bool:
        """Whether another call would do the same, as far as is recorded."""
        return not self._differs

    @property
    def has_launched(self) -> bool:
        """Whether it heard of launches."""
        return self._launched

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
        launches.listener = None  # an operator of ours launches by itself
        try:
            results = operator(*args, **kwargs)
        finally:
            launches.listener = self
        made = results if isinstance(results, list | tuple) else (results,)
        if operator.namespace not in _NAMESPACES or reads_numbers(operator, args):
            self._differs = True  # another call may read others
            return results
        if results is not None and not any([isinstance(x, Tensor) for x in made]):
            self._differs |= any([isinstance(x, Tensor) for x in args])
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
            call.places = [self._result(x, call) if isinstance(x, Tensor) else None for x in made]
            call.makes = [name for name in call.places if name is not None]
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
        self._launched = True
        call = Call(self._constant(launch.run), True, True)
        given = [self._source(x, call) for x in tensors]
        call.reads = [self._beginnings.get(name, name) for name in call.reads]
        call.arguments = ", ".join([self._beginnings.get(name, name) for name in given])
        if self._writer is not None and (enqueued := launch.enqueued(*tensors)) is not None:
            call.instruction = self._writer.launch(enqueued)
        self._calls.append(call)

    def found(self, x: Tensor) -> Place | None:
        """Where x lies within what was given or made here, by another name or as another view of it: autograd hands out
        what it saved as new tensors. Only if all that is recorded was ``closed``.
        """
        name = self._names.get(x)
        if name is not None:
            return self._places[name]
        for buffer in self._buffers.get(storage_of(x), ()):
            place = Place.of(x, buffer, x.data_ptr() - self._addresses[buffer])
            if place.offset >= 0 and 0 < place.offset + place.size <= self._places[buffer].size:
                return place
        return None

    def name_of(self, x: Tensor | None) -> str:
        """How programs name a tensor that was given or made here."""
        return self._source(x, Call("return", True))

    def program(self, results: Sequence[Tensor | str | None], packs: int | None) -> Program | None:
        """The recording as a function of the inputs, whose attribute ``source`` shows it. None where another
        call may do something else. For ``packs`` see `Recordings.call`.
        """
        calls, returned, program = self._in_python(results)
        if program is None or not self._is_worthwhile(calls):
            return program
        composition = self._composition(calls, returned, packs, self._inputs, {})
        otherwise = f"{self._constant(program)}({', '.join(self._inputs)})"
        return self._function(*composition.lines(otherwise), self._inputs, composition.packed)

    def _in_python(self, results: Sequence[Tensor | str | None]) -> tuple[list[Call], list[str], Program | None]:
        """Calls that are needed, the names of the results, and a program without the library."""
        last = Call("return", True)
        returned = [x if isinstance(x, str) else self._source(x, last) for x in results]
        last.reads += [x for x in results if isinstance(x, str)]
        if self._differs:
            return [], returned, None
        end = Line(f"return {', '.join(returned)},", last.reads)
        calls = alive(self._calls, last.reads)
        lines = [Line(call.line(), [*call.reads, *call.makes]) for call in calls]
        return calls, returned, self._function(lines, end, self._inputs)

    def _is_worthwhile(self, calls: Sequence[Call]) -> bool:
        """Whether the library can run enough of them."""
        is_odd = any([self._addresses.get(name, 0) & 15 for name in self._inputs])
        return not is_odd and sum([call.instruction is not None for call in calls]) >= _FEW

    def _composition(
        self, calls: Sequence[Call], returned: Sequence[str], packs: int | None, inputs: Sequence[str],
        parts: dict[str, Place],
    ) -> Composition:  # fmt: skip
        return Composition(
            calls, returned, inputs, packs, self._places, self._device, self._kept, self._constant, parts
        )  # fmt: skip

    def _function(
        self, lines: Sequence[Line], end: Line, parameters: Sequence[str], packed: Packed | None = None
    ) -> Program:  # fmt: skip
        used = {name for line in (*lines, end) for name in _CONSTANT.findall(line.text)}
        values = {name: x for name, x in self._values.items() if name in used}
        text = source(parameters, [*values], lines, end)
        made: dict[str, Any] = {}
        exec(_compiled(text), made)
        program = made.pop("program")  # or each would keep the other alive
        program.__kwdefaults__, program.source, program.packed = values, text, packed
        return program

    def _name(self, x: Tensor | None) -> str:
        name = f"v{len(self._beginnings)}"
        self._beginnings[name] = name
        if x is not None:
            self._names[x] = self._parts[name, x.shape, x.stride()] = name
            self._addresses[name], self._storages[name] = x.data_ptr(), storage_of(x)
            self._places[name] = Place.of(x, name)
        return name

    def _keep(self, x: Tensor, name: str) -> None:
        """Has `found` look for views of x."""
        number = storage_of(x)
        if number not in self._buffers:
            self._kept_numbers.append(StorageWeakRef(x.untyped_storage()))
        self._buffers.setdefault(number, []).append(name)

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
        if self._closed and self._places[name].buffer == name:
            self._keep(x, name)
        return name

    def _source(self, x: Any, call: Call) -> str:
        """How the source names x, which ``call`` reads."""
        if isinstance(x, list | tuple):
            return f"[{', '.join([self._source(each, call) for each in x])}]"
        if isinstance(x, Tensor):
            name = self._names.get(x, None) or self._saved_name(x)
            if name is None:
                self._differs |= self._closed and (x.is_floating_point() or x.is_complex())
                return self._constant(x)
            call.reads.append(name)
            return name
        return repr(x) if x is None or isinstance(x, int) else self._constant(x)

    def _saved_name(self, x: Tensor) -> str | None:
        """Of a tensor that is neither given nor made here, but known otherwise."""
        return None

    def _place(self, x: Tensor) -> Place:
        """Where an instruction finds x."""
        name = self._names.get(x, None) or self._saved_name(x)
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


class BackwardRecorder(Recorder):
    """Of a backward pass.

    Args:
        grads: its inputs, besides what it reads of the forward pass.
        forward: the recorder of that, which is ``closed``.

    Attributes:
        saved: what it reads of the forward pass, by the names there.
    """

    def __init__(self, grads: Tensors, forward: Recorder) -> None:
        super().__init__(grads, closed=True)
        self._forward = forward
        self._own: dict[str, str] = {}  # names, by those of the forward pass
        self.saved: list[str] = []

    def passes(
        self, results: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
    ) -> tuple[Program, Program, Program] | None:  # fmt: skip
        """Programs of both passes. None where another call may do something else.

        Args:
            results: of the backward pass.
            outputs: of the forward pass.

        Returns:
            The forward pass, which returns the outputs and then what is saved, see ``packs`` of `Recordings.call`; the
            backward pass as a function of the gradients and what is saved; the same where some of that is packed.
        """
        names = [self._forward.name_of(x) for x in outputs]
        calls, returned, whole = self._in_python(self._apart(results))
        forward = self._forward.program([*names, *self.saved], len(outputs))
        if forward is None or whole is None:
            return None
        packed = forward.packed
        if packed is None:
            backward = self._with_library(calls, returned, whole)
            return forward, backward, backward
        packed = Packed(packed.places[len(outputs) :])
        return forward, whole, self._with_library(calls, returned, whole, packed)

    def _with_library(
        self, calls: Sequence[Call], returned: Sequence[str], whole: Program, packed: Packed | None = None
    ) -> Program:  # fmt: skip
        """``whole`` with as much of it run by the library as can be."""
        grads, saved = self._inputs[: -len(self.saved) or None], [self._own[name] for name in self.saved]
        parameters, given = self._inputs, ", ".join(self._inputs)
        parts: dict[str, Place] = {}
        if packed is not None:
            parameters = [*grads, *saved, "kept"]
            parts = {name: x for name, x in zip(saved, packed.places, strict=True) if x is not None}
            unpack = f"*{self._constant(packed.unpack)}(({', '.join(saved)},), kept)"
            given = ", ".join([*grads, unpack])
        otherwise = f"{self._constant(whole)}({given})"
        if not self._is_worthwhile(calls):
            return self._function([], Line(f"return {otherwise}", ()), parameters) if parts else whole
        composition = self._composition(calls, returned, None, parameters, parts)
        return self._function(*composition.lines(otherwise), parameters)

    def _apart(self, results: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same, copied where two of them have memory in common: whoever gets them may add to them."""
        found: list[Tensor | None] = []
        taken: list[Place] = []
        with self:
            for x in results:
                if x is not None and not any([x is y for y in found]):
                    place = self._place(x)
                    if any([place.overlaps(other) for other in taken]):
                        x = x.clone()
                    taken.append(place)
                found.append(x)
        return found

    def _saved_name(self, x: Tensor) -> str | None:
        place = self._forward.found(x)
        if place is None:
            return None
        base = self._own.get(place.buffer)
        if base is None:
            base = self._own[place.buffer] = self._input_of_forward(place.buffer)
        place = replace(place, buffer=base)
        if place == self._places[base]:
            self._names[x] = base
            return base
        name = self._name(x)
        self._places[name] = place
        self._differs |= place.dtype != self._places[base].dtype
        if place.offset == 0:
            self._beginnings[name] = base
        view = Call(self._constant(part_of), False, reads=[base], makes=[name], idles="view")
        view.arguments = f"{base}, {self._constant(place)}"
        self._calls.append(view)
        return name

    def _input_of_forward(self, buffer: str) -> str:
        """Makes one of the forward pass's tensors an input; returns its name."""
        name = self._name(None)
        place = self._places[name] = replace(self._forward._places[buffer], buffer=name)
        self._parts[name, place.shape, place.stride] = name
        self._addresses[name] = self._forward._addresses[buffer]
        self._storages[name] = self._forward._storages[buffer]
        self._inputs.append(name)
        self.saved.append(buffer)
        return name


@functools.lru_cache(256)
def _compiled(source: str) -> CodeType:
    """Blocks of one kind have one source."""
    return compile(source, "<recorded>", "exec")
