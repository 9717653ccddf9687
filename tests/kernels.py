"""Where tests of Triton kernels run: on a GPU, else in Triton's interpreter, which a process has to ask for first."""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

import backbones.ops.scan.triton as backend
from backbones.ops import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = backend.unavailable_reason() is None
needs_kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU or TRITON_INTERPRET=1: see test_in_the_interpreter")
# Of the interpreter's own making.
quiet = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def error(x: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected, in double precision."""
    assert x.shape == expected.shape
    return ((x.detach().cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def launch_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has recorded programs launch kernels in the interpreter as they do on a GPU, where nothing is to be done for it:
    from the compiled library, here by a driver that knows addresses and numbers alone.
    """
    host = native.host(torch.device("cpu"))
    if DEVICE == "cuda" or isinstance(host, str):
        return
    from backbones.ops.triton_host import Enqueued, Launch

    launches: list[tuple[Launch, list[Any]]] = []

    def enqueued(launch: Launch, *tensors: Tensor | None) -> Enqueued:
        launches.append((launch, [None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors]))
        return Enqueued(len(launches), (1, 1, 1), 32, 0, tuple(x for x in tensors if x is not None))

    def driver(kernel: int, *args: Any) -> int:
        launch, kinds = launches[kernel - 1]
        pointers = iter(ctypes.cast(args[8], ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64))))
        launch.run(*[None if kind is None else _tensor_at(next(pointers)[0], *kind) for kind in kinds])
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
    function = kind(driver)
    host = native.Host.from_buffer_copy(host)
    host.launch = ctypes.cast(function, ctypes.c_void_p).value
    monkeypatch.setattr(native, "host", lambda device: host)
    monkeypatch.setattr(Launch, "enqueued", enqueued)
    monkeypatch.setattr(Launch, "_driver", function, raising=False)  # or it would be gone before it is called


def _tensor_at(address: int, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    elements = sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) + 1
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)
