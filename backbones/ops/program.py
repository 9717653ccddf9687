"""Recorded calls as programs of the compiled library (`csrc/program.cpp`), which runs them with no Python in between.

A tensor that only such calls read is no tensor any more, but a place in one piece of memory that all of them share.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.ops import native
from backbones.ops.tracing import arguments_of, changes_arguments, is_random, returns_of, written_by
from backbones.ops.triton_host import Enqueued, bits, cdiv, current_stream

_END, _LAUNCH, _PRODUCT, _SCALED_PRODUCT, _OPERATOR, _GELU = range(6)  # `Instruction` in csrc/program.cpp
_VALUE, _TENSOR, _OPTIONAL, _LIST = range(4)  # `Argument`
_DONE, _NO_CONTEXT = -1, -2  # `Result`
_MOST = 64  # arguments of one instruction
_ALIGNMENT = 512  # bytes, as PyTorch's allocator has it

_aten = torch.ops.aten
_PRODUCTS = {
    **dict.fromkeys((_aten.mm.default, _aten.mm.out), "mm_out"),
    **dict.fromkeys((_aten.bmm.default, _aten.bmm.out), "bmm_out"),
    **dict.fromkeys((_aten.addmm.default, _aten.addmm.out, _aten.addmm_.default), "addmm_out"),
    **dict.fromkeys((_aten.baddbmm.default, _aten.baddbmm.out, _aten.baddbmm_.default), "baddbmm_out"),
}
_GELUS = {_aten.gelu.default: "gelu_out", _aten.gelu_backward.default: "gelu_backward_grad_input"}
_WRITING: dict[Any, Any] = {  # operators that write where they are told
    _aten.cat.default: _aten.cat.out,
    _aten.mean.dim: _aten.mean.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.sum.dim_IntList: _aten.sum.IntList_out,
    _aten.threshold_backward.default: _aten.threshold_backward.grad_input,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies, and how.

    Attributes:
        buffer: the name of the first tensor of its storage; "" where ``offset`` is an address.
        offset: bytes from where that begins.
    """

    buffer: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, buffer: str, offset: int = 0) -> Place:
        """Of x."""
        return cls(buffer, offset, x.dtype, tuple(x.shape), x.stride())

    @property
    def size(self) -> int:
        """Bytes from its first element to behind its last."""
        last = sum([(side - 1) * step for side, step in zip(self.shape, self.stride, strict=True)])
        return (last + 1) * self.dtype.itemsize if all(self.shape) else 0

    def overlaps(self, other: Place) -> bool:
        """Whether both may have memory in common, taking each as whole from its first element to its last."""
        return self.buffer == other.buffer and (
            self.offset < other.offset + other.size and other.offset < self.offset + self.size
        )

    def covers(self, other: Place) -> bool:
        """Whether both are the same elements in the same order, however they are shaped."""
        dense = [_is_contiguous(x.shape, x.stride) for x in (self, other)]
        return all(dense) and (self.buffer, self.offset, self.size) == (other.buffer, other.offset, other.size)


Word = int | Place  # a place stands for the number of an address, and the bytes behind it


@dataclass(frozen=True, slots=True)
class Instruction:
    """One call as the library runs it.

    Attributes:
        name: in messages.
        words: what is written down.
        writes: the buffers that it may change.
    """

    name: str
    words: list[Word]
    writes: frozenset[str]

    def touches(self) -> frozenset[str]:
        """The buffers that it reads or writes."""
        return frozenset([word.buffer for word in self.words if isinstance(word, Place)])


class Writer:
    """Writes instructions for tensors on a device.

    Args:
        device: of all tensors.
        place: of a tensor.
    """

    def __init__(self, device: torch.device, place: Callable[[Tensor], Place]) -> None:
        self._device, self._place = device, place

    def launch(self, enqueued: Enqueued) -> Instruction | None:
        """A kernel's launch."""
        kernel, grid, threads, shared, parameters = enqueued
        words: list[Word] = [_LAUNCH, kernel, *grid, threads, shared, len(parameters)]
        for x in parameters:
            words += (_TENSOR, self._place(x)) if isinstance(x, Tensor) else (_VALUE, x)
        touched = frozenset([word.buffer for word in words if isinstance(word, Place)])
        return Instruction("a launch", words, touched) if len(parameters) <= _MOST else None

    def operator(
        self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Sequence[Tensor]
    ) -> Instruction | None:
        """One of PyTorch's operators, and what it made. None for those that the library does not know."""
        if operator in _PRODUCTS:
            return self._product(operator, args, kwargs, made)
        if operator in _GELUS:
            return self._gelu(operator, args, kwargs, made)
        if operator is _aten.zeros.default:
            operator, args, kwargs = _aten.zero_.default, made, {}
        elif operator in _WRITING:
            operator, kwargs = _WRITING[operator], {**kwargs, arguments_of(_WRITING[operator])[-1].name: made[0]}
        elif not changes_arguments(operator) or is_random(operator):
            return None
        try:
            return self._operator(operator, args, kwargs)
        except _UnknownError:
            return None

    def _product(
        self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Sequence[Tensor]
    ) -> Instruction | None:
        name = _PRODUCTS[operator]
        function = native.torch_function(name, self._device)
        if function is None:
            return None
        out = kwargs.get("out", args[0] if changes_arguments(operator) else made[0])
        words: list[Word] = [_PRODUCT if len(args) == 2 else _SCALED_PRODUCT, function]
        for x in (out, *args):
            words += self._tensor(x)
        if len(args) == 3:
            words += [bits("fp64", kwargs.get(factor, 1)) for factor in ("beta", "alpha")]
        return Instruction(name, words, frozenset([self._place(out).buffer]))

    def _gelu(
        self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Sequence[Tensor]
    ) -> Instruction | None:
        function = native.gelu_function(_GELUS[operator])
        if function is None or kwargs.get("approximate", "none") != "none":
            return None
        words: list[Word] = [_GELU, function, len(args)]
        for x in (*args, *made):
            words += self._tensor(x)
        return Instruction(operator.name(), words, frozenset([self._place(made[0]).buffer]))

    def _operator(self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Instruction:
        arguments = arguments_of(operator)
        values = [*args, *[kwargs.get(x.name, x.default_value) for x in arguments[len(args) :]]]
        name, _, overload = operator.name().partition(".")
        words: list[Word] = [_OPERATOR, *_text(name), *_text(overload), len(values), returns_of(operator)]
        for argument, value in zip(arguments, values, strict=True):
            words += self._argument(argument.type, value)
        if len(values) > _MOST:
            raise _UnknownError
        writes = frozenset([self._place(x).buffer for x in written_by(operator, args, kwargs)])
        return Instruction(operator.name(), words, writes)

    def _argument(self, kind: Any, value: Any) -> list[Word]:
        match kind.kind():
            case "OptionalType":
                return [_VALUE, 0] if value is None else [_OPTIONAL, *self._argument(kind.getElementType(), value)]
            case "ListType":
                items = value if isinstance(value, list | tuple) else [value]
                inner = kind.getElementType()
                return [_LIST, len(items), *[word for item in items for word in self._argument(inner, item)]]
            case "TensorType" if isinstance(value, Tensor) and value.device == self._device:
                return [_TENSOR, *self._tensor(value)]
            case "IntType" if isinstance(value, torch.dtype):
                return [_VALUE, native.dtype_number(value)]
            case "IntType" | "SymIntType" | "BoolType" if isinstance(value, int):
                return [_VALUE, int(value)]
            case "FloatType":
                return [_VALUE, bits("fp64", value)]
        raise _UnknownError

    def _tensor(self, x: Tensor) -> list[Word]:
        place = self._place(x)
        return [place, native.dtype_number(place.dtype), len(place.shape), *place.shape, *place.stride]


class _UnknownError(Exception):
    """The library cannot be told of such an argument: a scalar, for which PyTorch's C functions have no form, or a
    text, of which they leave a copy behind at every call.
    """


class Program:
    """Instructions, called with addresses.

    Args:
        instructions: in their order.
        buffers: of which the addresses are given, in their order.
        offsets: of those that are parts of one of these, which, and how many bytes behind its beginning.
        device: on which all of it lies.
        kept: what is to live as long.
    """

    def __init__(
        self, instructions: Sequence[Instruction], buffers: Sequence[str], offsets: dict[str, tuple[str, int]],
        device: torch.device, kept: Sequence[Tensor],
    ) -> None:  # fmt: skip
        host = native.host(device)
        assert not isinstance(host, str)
        self._host, self._device, self._kept = host, device, kept
        numbers = {name: i for i, name in enumerate(("", *buffers))}
        words: list[int] = []
        self._names: dict[int, str] = {}  # by where instructions begin
        for instruction in instructions:
            self._names[len(words)] = instruction.name
            for word in instruction.words:
                if isinstance(word, Place):
                    buffer, begin = offsets.get(word.buffer, (word.buffer, 0))
                    words += (numbers[buffer], begin + word.offset)
                else:
                    words.append(word)
        self._words = b"".join([(word & (1 << 64) - 1).to_bytes(8, "little") for word in (*words, _END)])
        self._pack = struct.Struct(f"{len(numbers)}Q").pack

    def __call__(self, *addresses: int) -> None:
        """Runs it on the current stream, given the addresses of the buffers.

        Raises:
            RuntimeError: one of the instructions failed.
        """
        given = self._pack(0, *addresses)
        stream = current_stream(self._device)
        status = native.run_program(self._host, self._words, given, stream)
        if status == _NO_CONTEXT:  # in a thread that has used no GPU yet
            torch.cuda.current_stream(self._device).query()
            status = native.run_program(self._host, self._words, given, stream)
        if status != _DONE:
            raise RuntimeError(f"{self._names.get(status, 'a program')} failed on {self._device}")


def one_by_one(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes begin in one piece of memory, and how large that is."""
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + _aligned(size))
    return begins


def _aligned(size: int) -> int:
    return cdiv(size, _ALIGNMENT) * _ALIGNMENT


def shared_memory(instructions: Sequence[Instruction], sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where each buffer begins in one piece of memory, and how large that is: those that are in use at the same time
    lie apart.
    """
    spans: dict[str, tuple[int, int]] = {}
    for i, instruction in enumerate(instructions):
        for name in instruction.touches() & sizes.keys():
            spans[name] = (spans.get(name, (i, i))[0], i)
    begins: dict[str, int] = {}
    total = 0
    for name in sorted(spans, key=lambda name: (-sizes[name], spans[name])):
        first, last = spans[name]
        taken = sorted([
            (begins[other], begins[other] + sizes[other])
            for other in begins
            if spans[other][0] <= last and first <= spans[other][1]
        ])  # fmt: skip
        begin = 0
        for low, high in taken:
            if begin + sizes[name] <= low:
                break
            begin = max(begin, _aligned(high))
        begins[name] = begin
        total = max(total, begin + sizes[name])
    return begins, total


def _is_contiguous(shape: Iterable[int], stride: Iterable[int]) -> bool:
    expected = 1
    for side, step in reversed([*zip(shape, stride, strict=True)]):
        if side != 1 and step != expected:
            return False
        expected *= side
    return True


def _text(text: str) -> Iterator[int]:
    """Its length, and its characters with at least one zero behind them."""
    yield len(text)
    data = text.encode().ljust((len(text) // 8 + 1) * 8, b"\0")
    yield from struct.unpack(f"<{len(data) // 8}Q", data)
