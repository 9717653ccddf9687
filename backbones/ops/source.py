"""The source of recorded programs: a line of Python for each call, or one for all those that the library runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from backbones.ops.program import Instruction, Place, Program, one_by_one, shared_memory
from backbones.ops.triton_host import is_hooked


@dataclass(eq=False, slots=True)
class Call:
    """One recorded call.

    Attributes:
        function: how the source names it.
        stays: even if nobody reads what it makes.
        changes: may write into what it reads.
        reads: names of tensors.
        arguments: as the source has them.
        makes: names of its results, unless those are among the arguments.
        places: the same, with None for what is no tensor.
        unpacks: the results are a list.
        idles: "view" or "memory", which is all that it makes, and computes nothing; or None.
        instruction: how the library runs it.
    """

    function: str
    stays: bool
    changes: bool = False
    reads: list[str] = field(default_factory=list)
    arguments: str = ""
    makes: list[str] = field(default_factory=list)
    places: list[str | None] = field(default_factory=list)
    unpacks: bool = False
    idles: str | None = None
    instruction: Instruction | None = None

    def line(self) -> str:
        """Of the source."""
        call = f"{self.function}({self.arguments})"
        if not self.makes:
            return call
        names = ", ".join([name or "_" for name in self.places or self.makes])
        return f"{names}{',' if self.unpacks else ''} = {call}"


@dataclass(frozen=True, slots=True)
class Line:
    """Of the source, with the names of the tensors in it."""

    text: str
    names: Sequence[str]


def source(parameters: Sequence[str], constants: Sequence[str], lines: Sequence[Line], end: Line) -> str:
    """A function ``program``, which lets go of tensors behind the last line that names them."""
    kept = {*end.names, *parameters}
    written = [end.text]
    for line in reversed(lines):
        freed = [name for name in dict.fromkeys(line.names) if name not in kept]
        written.append(line.text + (f"; del {', '.join(freed)}" if freed else ""))
        kept.update(line.names)
    given = [*parameters, "*", *constants] if constants else parameters
    return f"def program({', '.join(given)}):\n    " + "\n    ".join(reversed(written)) + "\n"


def alive(calls: Sequence[Call], results: Sequence[str]) -> list[Call]:
    """Calls without those that nobody needs."""
    needed, found = set(results), []
    for call in reversed(calls):
        if call.stays or needed.intersection(call.makes):
            found.append(call)
            needed.update(call.reads)
    return found[::-1]


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """Where results lie that nothing is to read but another recording: all in one tensor.

    Each of them would take the host as long as a small launch: to allocate, to save for a backward pass, to look at.

    Attributes:
        places: in that tensor; None for results of their own.
    """

    places: tuple[Place | None, ...]

    def unpack(self, results: Sequence[Tensor | None], packed: Tensor) -> list[Tensor | None]:
        """All results."""
        packed = packed.contiguous()  # hooks on saved tensors may have copied it
        pairs = zip(results, self.places, strict=True)
        return [x if place is None else _part(packed, place) for x, place in pairs]


def _part(packed: Tensor, place: Place) -> Tensor:
    part = packed[place.offset : place.offset + place.size].view(place.dtype)
    return part.as_strided(place.shape, place.stride)


def part_of(base: Tensor, place: Place) -> Tensor:
    """What lies at a place within the memory of ``base``, of whose dtype it is."""
    return base.as_strided(place.shape, place.stride, base.storage_offset() + place.offset // place.dtype.itemsize)


class Composition:
    """Lines in which Python makes only what it reads or returns itself, and the library runs what it can.

    Python's calls move in front of those of the library behind which they stand, as far as they have no memory in
    common, so that the library runs as many as can be at once.

    Args:
        calls: those that are alive.
        results: how the source names them, some of which are constants or None.
        inputs: names.
        packs: the first of the results that may be packed, see `Packed`.
        places: of all tensors, by name.
        device: on which they are.
        kept: tensors that instructions know by their addresses.
        constant: how the source names something that is not made within.
        parts: inputs for which None may be given, for they lie within the last one, and where.

    Attributes:
        packed: where results lie that are packed, if any are.
    """

    def __init__(
        self, calls: Sequence[Call], results: Sequence[str], inputs: Sequence[str], packs: int | None,
        places: dict[str, Place], device: torch.device, kept: Sequence[Tensor], constant: Callable[[Any], str],
        parts: dict[str, Place],
    ) -> None:  # fmt: skip
        self._calls, self._results, self._places = calls, results, places
        self._inputs, self._parts = [name for name in inputs if name not in parts], parts
        self._device, self._kept, self._constant = device, kept, constant
        self._packed, self._readers = self._all_packed(len(results) if packs is None else packs)
        self._renamed = self._all_renamed()
        instructions = [call.instruction for call in calls if call.instruction is not None]
        sizes = {name: place.size for name, place in places.items() if place.buffer == name and not self._has(name)}
        sizes = {name: size for name, size in sizes.items() if name not in parts}
        packed = dict.fromkeys([places[name].buffer for name in results if name in self._packed])
        *begins, size = one_by_one([sizes.pop(name) for name in packed])
        self._packed_size = max(size, 1) if packed else 0  # all of them may be empty
        offsets, size = shared_memory(instructions, sizes)
        self._size = max(size, 1) if offsets else 0
        self._offsets = {name: ("memory", begin) for name, begin in offsets.items()}
        self._offsets.update({name: ("packed", begin) for name, begin in zip(packed, begins, strict=True)})
        self._offsets.update({name: (self._inputs[-1], place.offset) for name, place in parts.items()})
        self.packed = None
        if packed:
            self.packed = Packed(tuple([self._place_in_packed(name) for name in results]))
        self._lines: list[Line] = []
        self._pending: list[Instruction] = []
        self._pointers: dict[str, str] = {}  # of inputs

    def lines(self, otherwise: str) -> tuple[list[Line], Line]:
        """And the last of them. For addresses or hooks other than the recording knows, ``otherwise`` is called."""
        for call in self._calls:
            if call.instruction is not None:
                self._make(call)
                self._pending.append(call.instruction)
            elif call.idles is None:
                if self._meets(call):
                    self._run()
                self._add(call.line(), *call.reads, *call.makes)
            elif call.idles == "memory":
                self._make(call)
            elif any(map(self._has, call.makes)) and not self._renamed.keys() & set(call.reads):
                self._add(call.line(), *call.reads, *call.makes)
        self._run()
        return [*self._begin(otherwise), *self._lines], self._end()

    def _has(self, name: str) -> bool:
        """Whether Python has this tensor."""
        return name in self._readers or name in self._inputs

    def _all_packed(self, first: int) -> tuple[set[str], dict[str, list[Call | None]]]:
        """Which results are packed: those from ``first`` on whose memory Python has no tensor in. And who reads those
        that it has, see `_all_readers`.
        """
        calls = [call for call in self._calls if call.instruction is not None or call.idles == "memory"]
        ours = {name for call in calls for name in call.makes}
        packed = {x for x in self._results[first:] if x in self._places and self._places[x].buffer in ours}
        packed -= {*self._results[:first]}
        while True:
            readers = self._all_readers([x for x in self._results if x in self._places and x not in packed])
            taken = {self._places[name].buffer for name in readers}
            others = {name for name in packed if self._places[name].buffer in taken}
            if not others:
                return packed, readers
            packed -= others

    def _all_readers(self, results: Sequence[str]) -> dict[str, list[Call | None]]:
        """Who reads each tensor that Python has; None is the end."""
        made = {name for call in self._calls if call.instruction is None and call.idles is None for name in call.makes}
        readers: dict[str, list[Call | None]] = {name: [None] for name in results}
        for call in reversed(self._calls):
            names: Iterable[str] = call.reads
            if call.instruction is not None:
                names = call.instruction.touches() & made
            elif call.idles == "memory" or (call.idles and readers.keys().isdisjoint(call.makes)):
                names = ()
            for name in names:
                readers.setdefault(name, []).append(call)
        return readers

    def _all_renamed(self) -> dict[str, str]:
        """Tensors that are there for one view of all their elements, which is made in their place."""
        renamed: dict[str, str] = {}
        for call in self._calls:
            for name in call.makes if call.instruction is not None or call.idles == "memory" else ():
                reader, *more = self._readers.get(name, (None,))
                if reader is None or more or reader.idles != "view":
                    continue
                view, *others = reader.makes
                if not others and self._places[view].covers(self._places[name]):
                    renamed[name] = view
        return renamed

    def _add(self, text: str, *names: str) -> None:
        self._lines.append(Line(text, names))

    def _make(self, call: Call) -> None:
        """Memory for what a call makes, if Python has it."""
        for name in filter(self._has, call.makes):
            name = self._renamed.get(name, name)
            place = self._places[name]
            self._lines.append(self._empty(name, place.shape, place.stride, place.dtype))

    def _empty(self, name: str, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Line:
        empty, kind, device = map(self._constant, (torch.empty_strided, dtype, self._device))
        return Line(f"{name} = {empty}({[*shape]}, {[*stride]}, dtype={kind}, device={device})", (name,))

    def _meets(self, call: Call) -> bool:
        """Whether one of Python's calls must wait for the instructions that are pending."""
        touched = {self._places[name].buffer for name in call.reads}
        pending = [x.touches() if call.changes else x.writes for x in self._pending]
        return not touched.isdisjoint(frozenset().union(*pending))

    def _run(self) -> None:
        """Those that are pending."""
        if not self._pending:
            return
        touched = sorted(frozenset().union(*[x.touches() for x in self._pending]) - {""})
        names: dict[str, str] = {}  # of the tensors whose addresses are given, by buffers
        for name in touched:
            held, _ = self._offsets.get(name, (self._renamed.get(name, name), 0))
            names.setdefault(held if name in self._offsets else name, held)
        program = Program(self._pending, [*names], self._offsets, self._device, self._kept)
        addresses = [
            self._pointers.setdefault(x, f"p{len(self._pointers)}") if x in self._inputs else f"{x}.data_ptr()"
            for x in names.values()
        ]
        text = f"{self._constant(program)}({', '.join(addresses)})"
        self._add(text, *[name for name in names.values() if name not in self._inputs])
        self._pending = []

    def _begin(self, otherwise: str) -> list[Line]:
        lines = [Line(f"{pointer} = {name}.data_ptr()", (name,)) for name, pointer in self._pointers.items()]
        odd = f"({' | '.join(self._pointers.values())}) & 15 or " if self._pointers else ""
        lines.append(Line(f"if {odd}{self._constant(is_hooked)}(): return {otherwise}", ()))
        for name, size in (("memory", self._size), ("packed", self._packed_size)):
            if size:
                lines.append(self._empty(name, (size,), (1,), torch.uint8))
        for name, place in self._parts.items():
            if self._has(name):
                given, part = self._inputs[-1], self._constant(_part)
                lines.append(Line(f"{name} = {part}({given}, {self._constant(place)})", (name, given)))
        return lines

    def _end(self) -> Line:
        returned = ["None" if name in self._packed else name for name in self._results]
        names = [name for name in returned if name in self._places]
        if self.packed is not None:
            returned += ("packed", self._constant(self.packed))
            names.append("packed")
        return Line(f"return {', '.join(returned)},", names)

    def _place_in_packed(self, name: str) -> Place | None:
        if name not in self._packed:
            return None
        place = self._places[name]
        return replace(place, offset=self._offsets[place.buffer][1] + place.offset)
