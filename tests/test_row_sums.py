"""Weighted sums of rows: their tables against PyTorch's interpolation, and the kernel against float64."""

from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.fused.row_sums import naive
from backbones.patterns import MULTI_SCALE
from backbones.patterns.resampling import Tables, upsampling
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytestmark = quiet
SIZES = [((2, 3), (4, 6)), ((3, 4), (5, 7)), ((1, 5), (1, 9)), ((1, 1), (2, 1)), ((4, 4), (7, 8))]


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__)


def dense(table: Tensor, weights: Tensor, length: int) -> Tensor:
    """(m, length), the matrix that the tables stand for."""
    matrix = torch.zeros(table.shape[1], length + 1)  # where -1 is the last column
    for rows, weight in zip(table.long(), weights, strict=True):
        matrix[torch.arange(len(rows)), rows] += weight
    return matrix[:, :length]


def check_transposed(tables: Tables, length: int) -> None:
    assert [x.dtype for x in tables] == [torch.int32, torch.float32] * 2
    outputs = tables[0].shape[1]
    torch.testing.assert_close(dense(*tables[2:], outputs), dense(*tables[:2], length).T, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("size", "new_size"), SIZES, ids=str)
def test_tables_are_those_of_interpolation(size: tuple[int, int], new_size: tuple[int, int], mode: str) -> None:
    x = torch.randn(2, size[0] * size[1], 3)
    expected = F.interpolate(x.unflatten(1, size).permute(0, 3, 1, 2), new_size, mode=mode)
    expected = expected.permute(0, 2, 3, 1).flatten(1, 2)
    tables = upsampling(size, new_size, mode)
    check_transposed(tables, x.shape[1])
    torch.testing.assert_close(naive.forward(x, torch.zeros_like(expected), *tables[:2]), expected)


@pytest.mark.parametrize(("size", "new_size"), SIZES, ids=str)
def test_tables_sum_the_steps_of_a_cell(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    cells = size[0] * size[1]
    walks = MULTI_SCALE.orders(*size)[0].view(-1, cells)
    x = torch.randn(2, walks.numel(), 3)
    by_cell = reduce(torch.add, (y[:, walk.argsort()] for y, walk in zip(x.split(cells, 1), walks, strict=True)))
    base = torch.randn(2, new_size[0] * new_size[1], 3)
    tables = upsampling(size, new_size, "bilinear", MULTI_SCALE)
    check_transposed(tables, x.shape[1])
    found = naive.forward(x, base, *tables[:2])
    torch.testing.assert_close(found, naive.forward(by_cell, base, *upsampling(size, new_size, "bilinear")[:2]))
    tables = upsampling(size, new_size, "bilinear", MULTI_SCALE, joined=True)
    check_transposed(tables, base.shape[1] + x.shape[1])
    torch.testing.assert_close(naive.forward(torch.cat([base, x], 1), None, *tables[:2]), found)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c", "strided"), [(5, False), (96, True)])
@pytest.mark.parametrize(("size", "new_size"), SIZES, ids=str)
def test_kernel(size: tuple[int, int], new_size: tuple[int, int], c: int, strided: bool, dtype: torch.dtype) -> None:
    from backbones.ops.fused.row_sums.operator import _RowSums

    tables = upsampling(size, new_size, "bilinear", MULTI_SCALE)
    shapes = [(2, tables[2].shape[1], c), (2, tables[0].shape[1], c), (2, tables[0].shape[1], c)]
    given = [torch.randn(*shape[:2], 2 * c if strided else c)[..., :c].to(dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in given[:2]]
    expected = naive.forward(*exact, *tables[:2])
    wanted = (expected, *torch.autograd.grad(expected, exact, given[2].double()))
    x, base = (x.to(DEVICE).requires_grad_() for x in given[:2])
    y = _RowSums.apply(x, base, *(table.to(DEVICE) for table in tables))
    found = (y, *torch.autograd.grad(y, (x, base), given[2].to(DEVICE)))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert error(a, b.detach()) <= OPERATOR[str(dtype).removeprefix("torch.")]
