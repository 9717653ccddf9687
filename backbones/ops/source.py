"""The source of recorded programs: a line of Python for each call, or one for all those that the library runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backbones.ops.program import Instruction, Place, Program, shared_memory
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
    unpacks: bool = False
    idles: str | None = None
    instruction: Instruction | None = None

    def line(self) -> str:
        """Of the source."""
        call = f"{self.function}({self.arguments})"
        if not self.makes:
            return call
        return f"{', '.join(self.makes)}{',' if self.unpacks else ''} = {call}"


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


class Composition:
    """Lines in which Python makes only what it reads or returns itself, and the library runs what it can.

    Python's calls move in front of those of the library behind which they stand, as far as they have no memory in
    common, so that the library runs as many as can be at once.

    Args:
        calls: those that are alive.
        results: names.
        inputs: names.
        places: of all tensors, by name.
        device: on which they are.
        kept: tensors that instructions know by their addresses.
        constant: how the source names something that is not made within.
    """

    def __init__(
        self, calls: Sequence[Call], results: Sequence[str], inputs: Sequence[str], places: dict[str, Place],
        device: torch.device, kept: Sequence[Tensor], constant: Callable[[Any], str],
    ) -> None:  # fmt: skip
        self._calls, self._inputs, self._places = calls, inputs, places
        self._device, self._kept, self._constant = device, kept, constant
        self._readers = self._all_readers(results)
        self._renamed = self._all_renamed()
        instructions = [call.instruction for call in calls if call.instruction is not None]
        own = {name: place.size for name, place in places.items() if place.buffer == name and not self._has(name)}
        self._offsets, self._total = shared_memory(instructions, own)
        self._lines: list[Line] = []
        self._pending: list[Instruction] = []
        self._pointers: dict[str, str] = {}  # of inputs

    def lines(self, otherwise: str) -> list[Line]:
        """All but the end. Where addresses or hooks are others than the recording knows, ``otherwise`` is called."""
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
        return [*self._begin(otherwise), *self._lines]

    def _has(self, name: str) -> bool:
        """Whether Python has this tensor."""
        return name in self._readers or name in self._inputs

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
        buffers = [name for name in touched if name not in self._offsets]
        program = Program(self._pending, buffers, self._offsets, self._device, self._kept)
        names, addresses = [], []
        for name in buffers:
            if name in self._inputs:
                addresses.append(self._pointers.setdefault(name, f"p{len(self._pointers)}"))
            else:
                names.append(self._renamed.get(name, name))
                addresses.append(f"{names[-1]}.data_ptr()")
        if self._total:
            names.append("memory")
        addresses.append("memory.data_ptr()" if self._total else "0")
        self._add(f"{self._constant(program)}({', '.join(addresses)})", *names)
        self._pending = []

    def _begin(self, otherwise: str) -> list[Line]:
        lines = [Line(f"{pointer} = {name}.data_ptr()", (name,)) for name, pointer in self._pointers.items()]
        odd = f"({' | '.join(self._pointers.values())}) & 15 or " if self._pointers else ""
        lines.append(Line(f"if {odd}{self._constant(is_hooked)}(): return {otherwise}", ()))
        if self._total:
            lines.append(self._empty("memory", (self._total,), (1,), torch.uint8))
        return lines
