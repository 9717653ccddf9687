"""The compiled library: where it lies, how it is loaded, and the records that its functions read.

It computes for the `cpu` backend, and runs recorded programs for a GPU's host. It (`csrc/`) has a plain C interface and
is built without Python or PyTorch, so one binary serves every version of both; what it calls of PyTorch it is told at
run time. This is the only module that uses ctypes. `BACKBONES_CPU_ISA` (avx512, avx2 or baseline) forces a lower
instruction set than the best that this CPU has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import c_char_p, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / ("_scan_cpu" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_OK, _OUT_OF_RANGE, _NO_MEMORY = 0, 1, 2  # `Status` in csrc/parallel.h


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names]


class Record(ctypes.Structure):
    """The argument of a function of the library: its fields are those of a struct in `csrc/`, by name and in order."""

    __slots__ = ()  # else a wrong name would be a new attribute instead of an error
    operator: ClassVar[str]  # in messages
    prefix: ClassVar[str]  # of the operator's functions: prefix_forward, prefix_backward and prefix_call_size


def _strides(*names: str) -> list[tuple[str, Any]]:
    """`Strides` in csrc/scan.h: distances between batches, tokens and orders, in elements."""
    return _integers(*(f"{name}_{axis}" for name in names for axis in "blk"))


class ScanCall(Record):
    """`Call` in csrc/scan.h; the fields of a nested struct carry its name in front."""

    __slots__ = ()
    operator, prefix = "selective_scan", "backbones_scan"
    _fields_ = [
        *_integers("b", "l", "t", "k", "c", "n", "bf16", "u_shared", "softplus", "out", "window", "threads"),
        *_pointers("u", "delta", "B", "C", "grad"),
        *_strides("su", "sdelta", "sB", "sC", "sgrad"),
        *_pointers("A", "D", "bias", "dt_weight"),
        *_integers("rank"),
        *_pointers("orders", "y", "states", "du", "ddelta", "dB", "dC", "dA", "dD", "dbias"),
    ]


class ConvCall(Record):
    """`ConvCall` in csrc/depthwise.h."""

    __slots__ = ()
    operator, prefix = "depthwise_conv", "backbones_depthwise"
    _fields_ = [
        *_integers("b", "l", "m", "k", "c", "j", "bf16", "silu", "threads"),
        *_pointers("x", "grad"),
        *_integers("x_b", "x_l", "grad_k", "grad_b", "grad_m"),
        *_pointers("weight", "bias", "taps", "inverse", "y", "dx", "dweight", "dbias"),
    ]


class GateCall(Record):
    """`GateCall` in csrc/pointwise.h."""

    __slots__ = ()
    operator, prefix = "silu_gate", "backbones_gate"
    _fields_ = [
        *_integers("rows", "c", "threads", "bf16"),
        *_pointers("x", "z", "grad"),
        *_integers("x_row", "z_row", "grad_row"),
        *_pointers("y", "dx", "dz"),
        ("scale", c_double),
    ]


class NormCall(Record):
    """`NormCall` in csrc/pointwise.h."""

    __slots__ = ()
    operator, prefix = "layer_norm", "backbones_norm"
    _fields_ = [
        *_integers("rows", "c", "threads", "centred", "x_bf16", "branch_bf16", "y_bf16", "weight_bf16"),
        *_pointers("x", "branch", "grad", "stream"),
        *_integers("x_row", "branch_row", "grad_row", "stream_row"),
        *_pointers("weight", "bias", "total", "y", "dx", "dbranch", "statistics", "dweight", "dbias"),
        ("eps", c_double),
    ]


class Host(ctypes.Structure):
    """`Host` in csrc/program.cpp: functions of PyTorch and of a GPU's driver by their addresses, and the device."""

    __slots__ = ()
    _fields_ = [
        *_pointers("tensor", "free", "call", "list", "append", "launch", "context"),
        *_integers("version", "device", "index"),
    ]


RECORDS: tuple[type[Record], ...] = (ScanCall, ConvCall, GateCall, NormCall)
# Argument and result types of the functions that read no record.
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "backbones_scan_select": ([c_char_p], c_int64),
    "backbones_scan_isa": ([], c_char_p),
    "backbones_scan_read": ([c_void_p, c_int64, c_int64], None),
    "backbones_scan_exp2": ([c_void_p, c_void_p, c_int64, c_int64, c_int64], None),
    "backbones_program_host_size": ([], c_int64),
    "backbones_program_run": ([ctypes.POINTER(Host), c_char_p, c_char_p, c_void_p], c_int64),
}


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none.

    Raises:
        ValueError: `BACKBONES_CPU_ISA` names no instruction set of this CPU.
    """
    if not LIBRARY.exists():
        return (
            f"the compiled kernel {LIBRARY.name} is missing in {LIBRARY.parent}; "
            "install a C++17 compiler (g++ or clang++) and reinstall ssm-backbones"
        )
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the compiled kernel {LIBRARY.name} does not load ({error}); reinstall ssm-backbones on this machine"
    declared = dict(_FUNCTIONS)
    for record in RECORDS:
        declared[f"{record.prefix}_call_size"] = ([], c_int64)
        for direction in ("forward", "backward"):
            declared[f"{record.prefix}_{direction}"] = ([ctypes.POINTER(record)], c_int64)
    another = f"the compiled kernel {LIBRARY.name} belongs to another version; reinstall ssm-backbones"
    for name, (arguments, result) in declared.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            return another
        function.argtypes, function.restype = arguments, result
    sizes = {f"{record.prefix}_call_size": ctypes.sizeof(record) for record in RECORDS}
    sizes["backbones_program_host_size"] = ctypes.sizeof(Host)
    if any(getattr(lib, name)() != size for name, size in sizes.items()):
        return another
    select(lib, os.environ.get("BACKBONES_CPU_ISA", ""))
    return lib


def select(lib: ctypes.CDLL, isa: str) -> None:
    """Chooses an instruction set by its name; "" is the best that this CPU has.

    Raises:
        ValueError: no such instruction set, or not on this CPU.
    """
    status = lib.backbones_scan_select(isa.encode())
    if status:
        what = "is not one of avx512, avx2, baseline" if status == 1 else "is not supported by this CPU or build"
        raise ValueError(f"BACKBONES_CPU_ISA={isa!r} {what}")


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    lib = library()
    if isinstance(lib, str):
        raise RuntimeError(lib)
    return lib


def unavailable_reason() -> str | None:
    """None when the kernel runs here, else one line that says why not and what would help.

    Raises:
        ValueError: `BACKBONES_CPU_ISA` names no instruction set of this CPU.
    """
    lib = library()
    return lib if isinstance(lib, str) else None


def run(direction: str, record: Record) -> bool:
    """Runs the "forward" or "backward" pass that ``record`` describes. False: a table names what is out of range.

    Raises:
        MemoryError: there is none for the kernel's scratch space.
    """
    status = getattr(loaded(), f"{record.prefix}_{direction}")(record)
    if status == _NO_MEMORY:
        raise MemoryError(f"{record.operator}: no memory for the kernel's scratch space")
    return status == _OK


def pointer(x: Tensor | None) -> int | None:
    """Where the elements of x are; None is null."""
    return None if x is None else x.data_ptr()


def instruction_set() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""
    return loaded().backbones_scan_isa().decode()


def exp2(x: Tensor, rounds: int = 1) -> Tensor:
    """2^x of contiguous float32 by the kernel's own code, computed ``rounds`` times: what its rate is measured with.

    Every thread takes an equal part of ``x``; what is left of an uneven division stays 0.
    """
    threads = torch.get_num_threads()
    y = torch.zeros_like(x)
    loaded().backbones_scan_exp2(x.data_ptr(), y.data_ptr(), x.numel() // threads, rounds, threads)
    return y


def read(x: Tensor) -> None:
    """Reads contiguous float32, every thread an equal part: what the rate of memory is measured with."""
    threads = torch.get_num_threads()
    loaded().backbones_scan_read(x.data_ptr(), x.numel() // threads, threads)


# PyTorch's C functions that `Host` names, in its order; they are there from 2.10 on, whose conventions are followed.
_OF_TORCH = (
    "aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object", "torch_call_dispatcher",
    "torch_new_list_reserve_size", "torch_list_push_back",
)  # fmt: skip
_VERSION = 2 << 56 | 10 << 48


@functools.cache
def host(device: torch.device) -> Host | str:
    """What recorded programs call, and where their tensors are; or why they cannot be run on this device."""
    lib, torch_library = library(), _of_torch("cpu")
    if isinstance(lib, str):
        return lib
    if torch_library is None:
        return "PyTorch's library is not called libtorch_cpu.so, as on Linux"
    found = [_address(torch_library, name) for name in _OF_TORCH]
    if not all(found):
        return f"PyTorch {torch.__version__} lacks C functions that 2.10 has"
    if device.type == "cpu":
        found += [None, None]
    else:
        driver = None if torch.version.hip else _opened("libcuda.so.1")
        if device.type != "cuda" or driver is None:
            return "there is no driver of NVIDIA's for a GPU"
        found += [_address(driver, name) for name in ("cuLaunchKernel", "cuCtxGetCurrent")]
    kind = getattr(torch_library, f"aoti_torch_device_type_{device.type}")()
    return Host(*found, _VERSION, kind, device.index or 0)


def torch_function(name: str, device: torch.device) -> int | None:
    """The address of a C function of PyTorch's for tensors on a device, such as "mm_out"; None where there is none."""
    return _address(_of_torch(device.type), f"aoti_torch_{device.type}_{name}")


_TENSOR, _TEXT = "RKNS_6TensorE", "St17basic_string_viewIcSt11char_traitsIcEE"
# C++ functions, whose names tell their arguments: C functions that take a text leave a copy of it behind at every call.
_GELUS = {
    "gelu_out": f"_ZN2at4_ops8gelu_out4callE{_TENSOR}{_TEXT}RS2_",
    "gelu_backward_grad_input": f"_ZN2at4_ops24gelu_backward_grad_input4callE{_TENSOR}S4_{_TEXT}RS2_",
}


def gelu_function(name: str) -> int | None:
    """The address of PyTorch's function for the GELU or its gradient, None where it has none of these arguments."""
    return _address(_of_torch("cpu"), _GELUS[name])


def dtype_number(dtype: torch.dtype) -> int:
    """A dtype as PyTorch's C functions know it."""
    function = getattr(_of_torch("cpu"), f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")
    return function()


def run_program(host: Host, words: bytes, addresses: bytes, stream: int) -> int:
    """Runs a program on a stream, see `backbones_program_run` in csrc/program.cpp."""
    return loaded().backbones_program_run(host, words, addresses, stream)


def _address(lib: ctypes.CDLL | None, name: str) -> int | None:
    function = getattr(lib, name, None)
    return None if function is None else ctypes.cast(function, c_void_p).value


@functools.cache
def _of_torch(device: str) -> ctypes.CDLL | None:
    """PyTorch's library for a kind of device; only where libraries are called as on Linux."""
    return _opened(str(Path(torch.__file__).parent / "lib" / f"libtorch_{device}.so"))


def _opened(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
