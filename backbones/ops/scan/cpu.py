"""The `cpu` backend: a C++ kernel with a plain C interface (`csrc/`), bound by ctypes.

SIMD lanes run across channels, states stay in registers, softplus, exp and D are fused, and backward recomputes the
states between saved ones. The library knows nothing of Python or PyTorch, so one binary serves every version of both.
Results are bitwise the same for any number of threads.
`BACKBONES_CPU_ISA` (avx512, avx2 or baseline) forces a lower instruction set than the best that this CPU has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.ops.scan.projection import projection_gradients

CHUNK = 64  # steps between two saved states; kChunk in csrc/scan.h
LIBRARY = Path(__file__).parents[1] / ("_scan_cpu" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_OUT = {"sum": 0, "per_order": 1, "per_step": 2}
_CALL = struct.Struct("=47q")  # `Call` in csrc/scan.h
CONV_CALL = struct.Struct("=24q")  # `ConvCall` in csrc/depthwise.h
GATE_CALL = struct.Struct("=13qd")  # `GateCall` and `NormCall` in csrc/pointwise.h
NORM_CALL = struct.Struct("=11qd")
_ORDER_OUT_OF_RANGE, _NO_MEMORY = 1, 2


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    if not LIBRARY.exists():
        return (
            f"the compiled kernel {LIBRARY.name} is missing in {LIBRARY.parent}; "
            "install a C++17 compiler (g++ or clang++) and reinstall ssm-backbones"
        )
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the compiled kernel {LIBRARY.name} does not load ({error}); reinstall ssm-backbones on this machine"
    another = f"the compiled kernel {LIBRARY.name} belongs to another version; reinstall ssm-backbones"
    for operator, call in (("scan", _CALL), ("depthwise", CONV_CALL), ("gate", GATE_CALL), ("rms_norm", NORM_CALL)):
        try:
            forward, backward, call_size = (
                getattr(lib, f"backbones_{operator}_{name}") for name in ("forward", "backward", "call_size")
            )
        except AttributeError:
            return another
        for function in (forward, backward):
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
        call_size.argtypes, call_size.restype = [], ctypes.c_int64
        if call_size() != call.size:
            return another
    lib.backbones_scan_select.argtypes, lib.backbones_scan_select.restype = [ctypes.c_char_p], ctypes.c_int64
    lib.backbones_scan_isa.argtypes, lib.backbones_scan_isa.restype = [], ctypes.c_char_p
    lib.backbones_scan_read.argtypes, lib.backbones_scan_read.restype = [ctypes.c_void_p, *[ctypes.c_int64] * 2], None
    lib.backbones_scan_exp2.argtypes, lib.backbones_scan_exp2.restype = (
        [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3],
        None,
    )
    _select(lib, os.environ.get("BACKBONES_CPU_ISA", ""))
    return lib


def _select(lib: ctypes.CDLL, isa: str) -> None:
    status = lib.backbones_scan_select(isa.encode())
    if status:
        what = "is not one of avx512, avx2, baseline" if status == 1 else "is not supported by this CPU or build"
        raise ValueError(f"BACKBONES_CPU_ISA={isa!r} {what}")


def _loaded() -> ctypes.CDLL:
    lib = _library()
    if isinstance(lib, str):
        raise RuntimeError(lib)
    return lib


def instruction_set() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""
    return _loaded().backbones_scan_isa().decode()


def exp2(x: Tensor, rounds: int = 1) -> Tensor:
    """2^x of contiguous float32 by the kernel's own code, computed ``rounds`` times: what its rate is measured with.

    Every thread takes an equal part of ``x``; what is left of an uneven division stays 0.
    """
    threads = torch.get_num_threads()
    y = torch.zeros_like(x)
    _loaded().backbones_scan_exp2(x.data_ptr(), y.data_ptr(), x.numel() // threads, rounds, threads)
    return y


def read(x: Tensor) -> None:
    """Reads contiguous float32, every thread an equal part: what the rate of memory is measured with."""
    threads = torch.get_num_threads()
    _loaded().backbones_scan_read(x.data_ptr(), x.numel() // threads, threads)


def unavailable_reason() -> str | None:
    """None when the kernel runs here, else one line that says why not and what would help.

    Raises ValueError when `BACKBONES_CPU_ISA` names no instruction set of this CPU.
    """
    lib = _library()
    return lib if isinstance(lib, str) else None


def states_shape(b: int, t: int, k: int, c: int, n: int) -> tuple[int, ...]:
    """Shape of what `forward` saves for `backward`: the state at the start of every chunk but the first."""
    return (b, k, (t - 1) // CHUNK, n, c)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of the batch, token and order axes of (b, l, c) or (b, l, k, c)."""
    if x is None:
        return (0, 0, 0)
    strides = x.stride()
    return (strides[0], strides[1], strides[2] if len(strides) == 4 else 0)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _call(
    function: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, delta_softplus: bool, out: str, local_window: int,
    grad: Tensor | None, results: tuple[int, ...],
) -> None:  # fmt: skip
    b, l = u.shape[:2]
    k, c, n = A.shape
    t = l if orders is None else orders.shape[1]
    status = function(
        _CALL.pack(
            b, l, t, k, c, n, u.dtype == torch.bfloat16, u.dim() == 3, delta_softplus, _OUT[out], local_window,
            torch.get_num_threads(), u.data_ptr(), delta.data_ptr(), B.data_ptr(), C.data_ptr(), _pointer(grad),
            *_strides(u), *_strides(delta), *_strides(B), *_strides(C), *_strides(grad),
            A.data_ptr(), _pointer(D), _pointer(delta_bias), _pointer(dt_weight),
            0 if dt_weight is None else dt_weight.shape[2], _pointer(orders), *results,
        )
    )  # fmt: skip
    if status == _ORDER_OUT_OF_RANGE:
        assert orders is not None
        found = orders[(orders < 0) | (orders >= l)][0].item()
        raise ValueError(f"orders: found token {found}, expected 0..{l - 1} (delta has {l} tokens)")
    if status == _NO_MEMORY:
        raise MemoryError("selective_scan: no memory for the kernel's scratch space")


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, delta_softplus: bool, out: str, local_window: int, save: bool,
    visits: list[bool] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and, when `save`, the states for `backward`. Raises ValueError for an order outside 0..l-1."""
    u, delta, B, C = _rows(u), _rows(delta), _rows(B), _rows(C)
    b, l = u.shape[:2]
    k, c, n = A.shape
    t = l if orders is None else orders.shape[1]
    y = u.new_empty({"sum": (b, l, c), "per_order": (b, l, k, c), "per_step": (b, t, k, c)}[out])
    # A window moves the saved states to its multiples, which may leave slots at the end unused.
    shape = states_shape(b, t, k, c, n) if save else (0,)
    states = (A.new_zeros if local_window > 1 else A.new_empty)(shape)
    results = (y.data_ptr(), states.data_ptr(), *[0] * 7)
    _call(
        _loaded().backbones_scan_forward,
        u,
        delta,
        A,
        B,
        C,
        D,
        orders,
        delta_bias,
        dt_weight,
        delta_softplus,
        out,
        local_window,
        None,
        results,
    )
    return y, states


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, orders: Tensor | None,
    delta_bias: Tensor | None, dt_weight: Tensor | None, states: Tensor, delta_softplus: bool, out: str,
    local_window: int, visits: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, delta_bias and dt_weight, contiguous; (0,)-shaped for absent arguments."""
    grad, u, delta, B, C = _rows(grad), _rows(u), _rows(delta), _rows(B), _rows(C)
    du, dB, dC = (x.new_empty(x.shape) for x in (u, B, C))
    dA = A.new_empty(A.shape)
    # Of the projected step sizes, where there is a projection.
    ddelta = delta.new_empty(delta.shape) if dt_weight is None else A.new_empty((*delta.shape[:3], A.shape[1]))
    dD = A.new_empty((0,) if D is None else D.shape)
    dbias = A.new_empty((0,) if delta_bias is None else delta_bias.shape)
    results = (0, *(x.data_ptr() for x in (states, du, ddelta, dB, dC, dA, dD, dbias)))
    _call(
        _loaded().backbones_scan_backward,
        u,
        delta,
        A,
        B,
        C,
        D,
        orders,
        delta_bias,
        dt_weight,
        delta_softplus,
        out,
        local_window,
        grad,
        results,
    )
    if dt_weight is None:
        return du, ddelta, dA, dB, dC, dD, dbias, A.new_empty((0,))
    ddelta, ddt_weight = projection_gradients(ddelta, delta, dt_weight)
    return du, ddelta, dA, dB, dC, dD, dbias, ddt_weight
