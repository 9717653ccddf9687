"""Which backend runs an operator: one rule for all operators.

A backend that the caller names runs, or the call raises: ``ValueError`` with the reason where it cannot run here,
``NotImplementedError`` where derivatives are asked for that its kernel does not have. Unnamed, the fastest one that
runs on the tensors' device is used. Where that is plain PyTorch for want of a better one, and slow, a warning says why,
once.
"""

import functools
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backbones.ops import native
from backbones.ops.derivatives import WAY_OUT
from backbones.ops.scan import triton
from backbones.ops.tracing import is_transformed

BACKENDS = ("naive", "cpu", "triton")
_logger = logging.getLogger(__name__)
_fallbacks_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Operator:
    """An operator and the backends to choose from.

    Attributes:
        name: in messages, and by which `choose` finds it.
        kernels: the backend with a kernel of its own for each type of device that has one.
        names: backends that a caller may name. Those without a kernel run PyTorch's own operations.
        otherwise: the backend where no kernel runs.
        slow: whether ``otherwise`` is slow enough that its automatic choice is worth a warning, or an error where it
            would be due to derivatives.
    """

    name: str
    kernels: Mapping[str, str]
    names: tuple[str, ...] = BACKENDS
    otherwise: str = "naive"
    slow: bool = False


_SCANS = {"cpu": "cpu", "meta": "cpu", "cuda": "triton"}
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("selective_scan", _SCANS, slow=True),
        Operator("depthwise_conv", _SCANS, slow=True),
        Operator("silu_gate", {"cpu": "cpu", "cuda": "triton"}),
        Operator("rms_norm", {"cpu": "cpu", "cuda": "triton"}),
        Operator("layer_norm", {"cpu": "cpu", "cuda": "triton"}),
        Operator("row_sums", {"cuda": "triton"}),
        Operator("state_output", {"cuda": "triton"}),
        Operator("decay_rates", {"cuda": "triton"}),
        Operator("ssd", {}, names=("naive", "chunked"), otherwise="chunked"),
    )
}


def unavailable_reason(backend: str) -> str | None:
    """None where the backend runs on this machine, else one line that says why it does not.

    Raises:
        ValueError: `BACKBONES_CPU_ISA` names no instruction set of this CPU.
    """
    if backend == "cpu":
        return native.unavailable_reason()
    return triton.unavailable_reason() if backend == "triton" else None


@torch.compiler.assume_constant_result  # what runs here does not change, and its probing cannot be traced
def choose(operator: str, backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The backend for tensors on a device: the one named by the caller, or the fastest that runs.

    float64 always takes plain PyTorch, which alone has double precision.

    Raises:
        ValueError: the named backend does not exist or cannot run.
    """
    known = OPERATORS[operator]
    if backend is None:
        backend = known.kernels.get(device_type)
        if backend is None or dtype == torch.float64:
            return known.otherwise
        problem = _problem(backend, device_type, dtype)
        if problem is None:
            return backend
        if known.slow and (operator, problem) not in _fallbacks_told:
            _fallbacks_told.add((operator, problem))
            _logger.warning("%s falls back to the slow %r backend: %s", operator, known.otherwise, problem)
        return known.otherwise
    if backend not in known.names:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(known.names)}, or None")
    problem = _problem(backend, device_type, dtype)
    if problem is not None:
        raise ValueError(f"backend: {backend!r} cannot run here: {problem}")
    return backend


def choose_for(operator: str, backend: str | None, *tensors: Tensor | None) -> tuple[str, bool]:
    """`choose` for the first of these tensors, and whether `is_transformed` holds for any of them.

    Raises:
        ValueError: as `choose`.
        NotImplementedError: a kernel would run, but a derivative is asked for that it does not have.
    """
    first: Any = tensors[0]
    chosen = choose(operator, backend, first.device.type, first.dtype)
    if not is_transformed(*tensors):
        return chosen, False
    known = OPERATORS[operator]
    if chosen in known.kernels.values():
        if backend is not None or known.slow:
            raise NotImplementedError(
                f"{operator}: this backend has no forward-mode derivatives and no torch.func gradients, {WAY_OUT}"
            )
        chosen = known.otherwise
    return chosen, True


@functools.cache
def kernels(name: str) -> ModuleType:
    """The module ``backbones.ops.<name>`` of Triton kernels, imported when first used, because Triton takes long."""
    return importlib.import_module(f"backbones.ops.{name}")


@torch.compiler.assume_constant_result
def has_kernel(operator: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether tensors on a device have a faster backend than plain PyTorch."""
    backend = OPERATORS[operator].kernels.get(device_type)
    return backend is not None and _problem(backend, device_type, dtype) is None


def _problem(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    if backend not in ("cpu", "triton"):
        return None
    if dtype == torch.float64:
        return "it has no double precision (the input is float64)"
    if backend == "cpu" and device_type not in ("cpu", "meta"):
        return f"the tensors are on {device_type}"
    return unavailable_reason(backend)
