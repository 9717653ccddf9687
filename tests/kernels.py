"""Where tests of Triton kernels run: on a GPU, else in Triton's interpreter, which a process has to ask for first."""

import pytest
import torch
from torch import Tensor

import backbones.ops.scan.triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = backend.unavailable_reason() is None
needs_kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU or TRITON_INTERPRET=1: see test_in_the_interpreter")
# Of the interpreter's own making.
quiet = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def error(x: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected, in double precision."""
    assert x.shape == expected.shape
    return ((x.detach().cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
