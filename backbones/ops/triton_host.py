"""The host's side of every launch.

Triton's own ``cdiv`` and ``next_power_of_2`` take microseconds a call, because they serve kernels as well.
"""

import contextlib
import functools
import struct
import threading
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from backbones.ops.remember import MOST, remember
from backbones.ops.scan.triton.common import step_size
from backbones.ops.tracing import current_gpu


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


_VERSION = tuple(int(x) for x in triton.__version__.split(".")[:2])
_CALLS_COMPILED = _VERSION >= (3, 6)  # with all arguments of the signature, constants included
_HAS_KNOWN_LAUNCHER = _VERSION == (3, 6) and torch.version.hip is None
_kept: dict[tuple[Any, ...], "Launch"] = {}
_runtime: Any = getattr(getattr(triton, "knobs", None), "runtime", None)  # whose hooks are looked up at every launch


class _Launches(threading.local):
    """Whom this thread tells of every :class:`Launch` when it is done, by ``listener.launch(launch, tensors)``."""

    listener: Any = None


launches = _Launches()


class Launch:
    """``kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)``, given everything but the tensors.

    Triton examines every argument of every launch for what it specialises a kernel on, and calls two hooks: several
    times the host's time of a native operator. Of numbers and constants it would find the same each time; of tensors of
    known dtypes, only whether their addresses are multiples of 16, which is looked at here.

    Args:
        kernel: takes tensors, numbers and constants, in this order.
        grid: numbers of programs.
        numbers: arguments that are neither tensors nor constants.
        num_warps: warps of a program.
        constants: arguments that the kernel is compiled for, by name.
    """

    __slots__ = ("_calls", "_compiled", "_constants", "_grid", "_keeps", "_kernel", "_num_warps", "_numbers")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int | float, ...], num_warps: int, **constants: Any
    ) -> None:
        self._kernel, self._grid, self._numbers, self._num_warps = kernel, grid, numbers, num_warps
        self._constants = constants
        self._keeps = _CALLS_COMPILED and isinstance(kernel, triton.runtime.JITFunction)
        self._calls: dict[Any, Any] = {}  # see `_key`
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launches on the current GPU. Tensors have the same dtypes at every call, None stands in the same places."""
        self.run(*tensors)
        if launches.listener is not None:
            launches.listener.launch(self, tensors)

    def run(self, *tensors: Tensor | None) -> None:
        """A call of which nobody is told."""
        if not self._keeps:
            self._through_triton(tensors)
            return
        device = current_gpu()
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        key = _key(device, pointers)
        call = self._calls.get(key)
        if call is None or is_hooked():
            self._compiled[key] = compiled = self._through_triton(tensors)
            self._calls[key] = self._call_of(compiled)
        else:
            call(device, pointers)

    def enqueued(self, *tensors: Tensor | None) -> "Enqueued | None":
        """What the driver is told by a launch like this one, which has been before. None where that is unknown."""
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        compiled = self._compiled.get(_key(current_gpu(), pointers)) if self._compiled else None
        if compiled is None or not _HAS_KNOWN_LAUNCHER:
            return None
        launcher, metadata = compiled.run, compiled.metadata
        special = launcher.launch_cooperative_grid or launcher.launch_pdl or launcher.num_ctas != 1
        if special or launcher.global_scratch_size or launcher.profile_scratch_size or 0 in self._grid:
            return None
        values = (*tensors, *self._values())
        parameters: list[Any] = []
        for kind, value in zip(compiled.src.signature.values(), values, strict=True):
            if kind != "constexpr":
                parameters.append(value if isinstance(value, Tensor) else bits(kind, value))
        threads = 32 * metadata.num_warps
        return Enqueued(compiled.function, (*self._grid, 1, 1)[:3], threads, metadata.shared, (*parameters, 0, 0))

    def _through_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """The usual launch, which compiles the kernel; what it returns."""
        return self._kernel[self._grid](*tensors, *self._numbers, **self._constants, num_warps=self._num_warps)

    def _values(self) -> tuple[Any, ...]:
        """All arguments but the tensors, in the kernel's order."""
        names = self._kernel.arg_names[-len(self._constants) :] if self._constants else ()
        return (*self._numbers, *[self._constants[name] for name in names])

    def _call_of(self, compiled: Any) -> Any:
        """How to launch a compiled kernel again, called with the GPU's number and the addresses of the tensors."""
        values = self._values()
        grid = (*self._grid, 1, 1)[:3]
        stream = triton.runtime.driver.active.get_current_stream
        launcher: Any = compiled.run
        if not _HAS_KNOWN_LAUNCHER or launcher.global_scratch_size or launcher.profile_scratch_size:
            run = compiled[grid]
            return lambda device, pointers: run(*pointers, *values)
        enqueue = launcher.launch
        static = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl,
            None, None, compiled.packed_metadata, None, None, None,  # no scratch, no hooks
        )  # fmt: skip
        return lambda device, pointers: enqueue(*grid, stream(device), *static, *pointers, *values)


class Enqueued(NamedTuple):
    """A launch as CUDA's driver is told of it.

    Attributes:
        kernel: the address of the driver's handle.
        grid: numbers of programs.
        threads: of a program.
        shared: bytes of shared memory.
        parameters: tensors, and the bits of numbers.
    """

    kernel: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    parameters: tuple[Any, ...]


def _key(device: int, pointers: list[int]) -> Any:
    """The GPU's number, and which addresses are multiples of 16 unless all are."""
    odd = 0
    for pointer in pointers:
        odd |= pointer
    return (device, *[pointer & 15 == 0 for pointer in pointers]) if odd & 15 else device


def bits(kind: str, value: int | float) -> int:
    """A number as a kernel reads it, at the beginning of a word."""
    return int.from_bytes(struct.pack({"fp32": "<f", "fp64": "<d"}.get(kind, "<q"), value), "little")


def is_hooked() -> bool:
    """Whether someone, such as Triton's profiler, wants to hear of launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[int | float, ...],
    num_warps: int, **constants: Any,
) -> None:  # fmt: skip
    """A :class:`Launch`, made at the first call with such arguments."""
    dtypes = [None if x is None else x.dtype for x in tensors]
    key = (id(kernel), grid, numbers, num_warps, *dtypes, *constants.items())
    found = _kept.get(key)
    if found is None:
        found = remember(_kept, key, Launch(kernel, grid, numbers, num_warps, **constants))
    found(*tensors)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer that the scan's and the convolution's kernels fill comes from here: tests poison and count them.

    `torch.empty` takes half as long again, and twice as long for a `torch.Size`; `torch.empty_like` less.
    """
    return torch.empty_strided(shape, _contiguous(shape), dtype=dtype, device=device)


@functools.lru_cache(MOST)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for side in reversed(shape[1:]):
        strides.append(strides[-1] * max(side, 1))
    return tuple(reversed(strides))


def check_device(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` unless kernels can read x."""
    if not x.is_cuda and isinstance(step_size, triton.runtime.JITFunction):
        raise ValueError(
            f"{name}: got a tensor on {x.device}, expected a GPU for backend 'triton' (or TRITON_INTERPRET=1)"
        )


def is_capturing(x: Tensor) -> bool:
    """Whether what is done with x goes into a CUDA graph, and its results are not there before that runs."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The driver's handle of a GPU's current stream; 0 elsewhere."""
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


_NOWHERE = contextlib.nullcontext()


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's GPU the current one, to which Triton launches."""
    if not x.is_cuda or x.get_device() == current_gpu():
        return _NOWHERE
    return torch.cuda.device(x.device)
