"""The host's side of every launch.

Triton's own ``cdiv`` and ``next_power_of_2`` take microseconds a call, because they serve kernels as well.
"""

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from backbones.ops.scan.triton.common import step_size


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


# Since then a compiled kernel is called with all arguments of the signature, constants included.
_CALLS_COMPILED = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6)
_MOST_KEPT = 8192
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[int | float, ...],
    num_warps: int, **constants: Any,
) -> None:  # fmt: skip
    """``kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)``, for kernels with arguments in that order.

    Triton examines every argument of every launch for what it specialises a kernel on: three times the host's time of a
    native operator. Here whatever that depends on is a key, under which the compiled kernel is kept and called: the
    numbers themselves, the dtype of a tensor, and whether its address is a multiple of 16.
    """
    if not (_CALLS_COMPILED and isinstance(kernel, triton.runtime.JITFunction)):
        kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)
        return
    device = torch.cuda.current_device()
    seen = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
    key = (id(kernel), device, numbers, num_warps, *seen, *constants.items())
    found = _compiled.get(key)
    if found is None:
        if len(_compiled) >= _MOST_KEPT:  # images of ever new sizes
            _compiled.clear()
        compiled = kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, values = found
    compiled[(*grid, 1, 1)](*tensors, *numbers, *values)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer that the kernels fill comes from here: tests poison and count them."""
    return torch.empty(shape, dtype=dtype, device=device)


def check_device(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` unless kernels can read x."""
    if not x.is_cuda and isinstance(step_size, triton.runtime.JITFunction):
        raise ValueError(
            f"{name}: got a tensor on {x.device}, expected a GPU for backend 'triton' (or TRITON_INTERPRET=1)"
        )


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's GPU the current one, to which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
