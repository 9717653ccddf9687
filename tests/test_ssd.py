"""State-space duality, causal and not, against sums written out in double precision and against the selective scan."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.export import to_onnx
from backbones.ops import selective_scan, ssd, ssd_noncausal
from tests.tolerances import OPERATOR, SAME_FUNCTION


@dataclass(frozen=True)
class Case:
    """One call of the operator; ``steps`` None is the identity order."""

    b: int = 2
    length: int = 21
    heads: int = 4
    width: int = 3
    groups: int = 2
    n: int = 5
    chunk: int = 8
    steps: int | None = None
    bias: bool = True
    skip: bool = True
    softplus: bool = True

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Arguments of ``ssd`` as leaves that require gradients."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        dt = normal(self.b, self.length, self.heads)
        tensors: dict[str, Any] = {
            "x": normal(self.b, self.length, self.heads, self.width),
            "dt": dt if self.softplus else 0.3 * dt.abs(),
            "A": -torch.exp(normal(self.heads)),
            "B": normal(self.b, self.length, self.groups, self.n),
            "C": normal(self.b, self.length, self.groups, self.n),
            "D": normal(self.heads) if self.skip else None,
            "dt_bias": normal(self.heads).abs() if self.bias else None,
        }
        tensors = {key: None if x is None else x.to(dtype).requires_grad_() for key, x in tensors.items()}
        if self.steps is not None:
            tensors["orders"] = torch.randint(0, self.length, (self.steps,), generator=generator)
        return tensors

    def options(self) -> dict[str, Any]:
        return {"dt_softplus": self.softplus, "chunk": self.chunk}


PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "one group": replace(PLAIN, groups=1),
    "a group each": replace(PLAIN, groups=4, length=16),
    "no D, no bias, no softplus": replace(PLAIN, skip=False, bias=False, softplus=False),
    "one step": replace(PLAIN, length=1),
    "one of everything": Case(b=1, length=1, heads=1, width=1, groups=1, n=1),
    "two steps": replace(PLAIN, length=2),
    "whole chunks": replace(PLAIN, length=24),
    "one chunk": replace(PLAIN, length=8),
    "a step over": replace(PLAIN, length=17),
    "chunks of one": replace(PLAIN, chunk=1),
    "a chunk longer than the sequence": replace(PLAIN, chunk=64),
    "many chunks": Case(b=1, length=301, heads=2, width=2, groups=1, n=3, chunk=2),
    "blocks of blocks": Case(b=1, length=4225, heads=1, width=1, groups=1, n=1, chunk=1),
    "repeats and skips": replace(PLAIN, steps=33),
    "few visits": replace(PLAIN, steps=3),
}
SHORT = [name for name, case in CASES.items() if case.length < 40]


def written_out(x, dt, A, B, C, D=None, orders=None, dt_bias=None, dt_softplus=True, chunk=0):  # type: ignore
    """Every output as a sum over all earlier visits, from the definition's closed form."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    orders = torch.arange(x.shape[1]) if orders is None else orders
    u, dt, B, C = (y[:, orders] for y in (x, dt, B, C))
    B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (B, C))
    reached = (dt * A).cumsum(1)
    weights = torch.einsum("bihn,bjhn->bijh", C, B) * dt.unsqueeze(1)
    decays = reached.unsqueeze(2) - reached.unsqueeze(1)
    earlier = torch.ones(u.shape[1], u.shape[1]).tril().bool()[None, :, :, None]
    weights = weights * decays.masked_fill(~earlier, -torch.inf).exp()
    y = torch.einsum("bijh,bjhp->bihp", weights, u)
    y = y if D is None else y + D[:, None] * u
    return torch.zeros_like(x).index_add(1, orders, y)


def all_together(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=True):  # type: ignore
    """``ssd_noncausal`` as one attention matrix for each head."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (B, C))
    y = torch.einsum("bihn,bjhn,bjh,bjhp->bihp", C, B, -dt * A, x)
    return y if D is None else y + D[:, None] * x


def gradients(y: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    given = {key: x for key, x in tensors.items() if isinstance(x, Tensor) and x.requires_grad}
    return dict(zip(given, torch.autograd.grad(y, list(given.values()), weights), strict=True))


def assert_near(found: Tensor, expected: Tensor, limit: float) -> None:
    error = (found.double() - expected.double()).square().mean().sqrt()
    assert error <= limit * expected.double().square().mean().sqrt().clamp_min(1e-30)


@pytest.mark.parametrize("backend", ["naive", "chunked", None])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, backend: str | None) -> None:
    case = CASES[name]
    tensors = case.tensors()
    found, expected = ssd(**tensors, **case.options(), backend=backend), written_out(**tensors, **case.options())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = gradients(expected, tensors)
    for key, gradient in gradients(found, tensors).items():
        torch.testing.assert_close(
            gradient, wanted[key], rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_narrow_dtypes_are_summed_in_float32(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]
    tensors = case.tensors(dtype)
    found = ssd(**tensors, **case.options(), backend=backend)
    assert found.dtype == dtype
    doubles = {
        key: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in tensors.items()
    }
    limit = OPERATOR["float32" if dtype == torch.float32 else "bfloat16"]
    assert_near(found, written_out(**doubles, **case.options()), limit)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_a_step_that_forgets_everything_costs_no_precision_behind_it(backend: str) -> None:
    """Decays of later steps are differences of sums that it makes large."""
    tensors = {key: x if x is None else x.detach() for key, x in replace(PLAIN, length=64, chunk=64).tensors().items()}
    tensors["dt"] = tensors["dt"].abs() * 1e-2
    tensors["dt"][:, 5] = 1e6
    expected = ssd(**tensors, dt_softplus=False, backend="naive")
    single = {key: x if x is None else x.float() for key, x in tensors.items()}
    found = ssd(**single, dt_softplus=False, backend=backend)
    assert_near(found[:, 6:], expected[:, 6:], OPERATOR["float32"])


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("name", ["plain", "repeats and skips", "one step", "chunks of one"])
def test_derivatives_of_second_order(name: str, backend: str) -> None:
    case = replace(CASES[name], b=1, length=min(CASES[name].length, 5), heads=2, width=2, n=2, chunk=2)
    if case.steps is not None:
        case = replace(case, steps=6)
    tensors = case.tensors()
    given = {key: x for key, x in tensors.items() if isinstance(x, Tensor) and x.requires_grad}
    rest = {key: x for key, x in tensors.items() if key not in given}

    def call(*values: Tensor) -> Tensor:
        return ssd(**dict(zip(given, values, strict=True)), **rest, **case.options(), backend=backend)

    assert torch.autograd.gradcheck(call, tuple(given.values()))
    assert torch.autograd.gradgradcheck(call, tuple(given.values()))


def test_it_is_a_selective_scan_whose_channels_share_their_decay() -> None:
    case = replace(PLAIN, groups=1)
    t = case.tensors()
    wide = {key: t[key].repeat_interleave(case.width, dim=-1) for key in ("dt", "A", "D", "dt_bias")}
    expected = selective_scan(
        t["x"].flatten(2),
        wide["dt"].unsqueeze(2),
        wide["A"][None, :, None].expand(1, -1, case.n),
        t["B"],
        t["C"],
        wide["D"][None],
        delta_bias=wide["dt_bias"][None],
    )
    torch.testing.assert_close(ssd(**t, chunk=8).flatten(2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_any_strides(backend: str) -> None:
    tensors = PLAIN.tensors()
    strided = {}
    for key, x in tensors.items():
        if isinstance(x, Tensor):
            spread = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
            spread[..., 0] = x.detach()
            strided[key] = spread[..., 0].transpose(0, -1).contiguous().transpose(0, -1)
            assert x.dim() == 1 or not strided[key].is_contiguous()
    found = ssd(**strided, chunk=8, backend=backend)
    torch.testing.assert_close(found, ssd(**tensors, chunk=8, backend=backend), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [ssd, ssd_noncausal])
def test_no_images_at_all(function: Any) -> None:
    tensors = replace(PLAIN, b=0).tensors()
    y = function(**tensors)
    assert y.shape == tensors["x"].shape
    assert not gradients(y, tensors)["A"].any()


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_nan_reaches_every_later_output_and_no_other_image(backend: str) -> None:
    tensors = {key: x if x is None else x.detach() for key, x in PLAIN.tensors().items()}
    tensors["x"][0, 10] = torch.nan
    found = ssd(**tensors, chunk=5, backend=backend)
    assert found[0, 10:].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("function", [ssd, ssd_noncausal])
def test_shapes_without_values(function: Any) -> None:
    tensors = {key: x if x is None else x.detach().to("meta") for key, x in PLAIN.tensors().items()}
    assert function(**tensors).shape == tensors["x"].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    tensors = PLAIN.tensors(dtype)
    expected, together = ssd(**tensors), ssd_noncausal(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd(**tensors), expected)
        assert torch.equal(ssd_noncausal(**tensors), together)


@pytest.mark.parametrize("name", SHORT)
def test_a_sum_over_all_tokens(name: str) -> None:
    case = replace(CASES[name], steps=None)
    tensors = case.tensors()
    found = ssd_noncausal(**tensors, dt_softplus=case.softplus)
    expected = all_together(**tensors, dt_softplus=case.softplus)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = gradients(expected, tensors)
    for key, gradient in gradients(found, tensors).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-9, atol=1e-9)
    narrow = {key: x if x is None else x.detach().bfloat16() for key, x in tensors.items()}
    doubles = {key: x if x is None else x.double() for key, x in narrow.items()}
    y = ssd_noncausal(**narrow, dt_softplus=case.softplus)
    assert y.dtype == torch.bfloat16
    assert_near(y, all_together(**doubles, dt_softplus=case.softplus), OPERATOR["bfloat16"])


def test_all_tokens_have_derivatives_of_second_order() -> None:
    tensors = replace(PLAIN, b=1, length=4, heads=2, width=2, groups=1, n=2).tensors()
    names = list(tensors)
    assert torch.autograd.gradgradcheck(
        lambda *values: ssd_noncausal(**dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


class Layer(torch.nn.Module):
    """The operators as a module, on fixed weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return ssd(x, dt, A, B, C, D, **self.options) + ssd_noncausal(x, dt, A, B, C, D)


def arguments(b: int = 2) -> tuple[Tensor, ...]:
    tensors = replace(PLAIN, b=b, bias=False).tensors(torch.float32)
    return tuple(tensors[key].detach() for key in ("x", "dt", "A", "B", "C", "D"))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_compiles_whole(backend: str) -> None:
    torch.compiler.reset()
    layer = Layer(chunk=8, backend=backend, orders=torch.randperm(21))
    leaves = [x.requires_grad_() for x in arguments()]
    expected = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    found = torch.autograd.grad(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves).square().sum(), leaves
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiles_to_code() -> None:
    torch.compiler.reset()
    layer, inputs = Layer(chunk=8), arguments()
    found = torch.compile(layer, fullgraph=True)(*inputs)
    torch.testing.assert_close(found, layer(*inputs), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


def test_exports_with_any_batch_size(tmp_path: Path) -> None:
    batch = {0: torch.export.Dim("batch")}
    layer = Layer(chunk=8).eval()
    program = torch.export.export(layer, arguments(), dynamic_shapes=(batch, batch, None, batch, batch, None))
    inputs = arguments(b=3)
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)

    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    names = ["x", "dt", "A", "B", "C", "D"]
    to_onnx(program, names).save(tmp_path / "ssd.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ssd.onnx")
    found = session.run(None, {name: y.numpy() for name, y in zip(names, inputs, strict=True)})[0]
    np.testing.assert_allclose(found, layer(*inputs).numpy(), rtol=1e-4, atol=1e-4)


def test_operations_are_those_of_the_matrix_products() -> None:
    b, length, heads, width, groups, n, chunk = 2, 48, 4, 3, 2, 5, 8
    case = Case(b, length, heads, width, groups, n, chunk)
    with FlopCounterMode(display=False) as counter:
        ssd(**case.tensors(), chunk=chunk)
    chunks = length // chunk
    within = b * chunks * (groups * chunk * chunk * n + heads * chunk * chunk * width)
    between = b * heads * n * width * (2 * length + chunks**2)
    assert counter.get_total_flops() == 2 * (within + between)
    with FlopCounterMode(display=False) as counter:
        ssd_noncausal(**case.tensors())
    assert counter.get_total_flops() == 2 * (2 * b * length * heads * width * n)


GOOD = {key: x if x is None else x.detach() for key, x in PLAIN.tensors().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: got NoneType, expected a tensor"),
        ({"x": GOOD["x"][0]}, r"x: got shape \(21, 4, 3\), expected 4 dimensions \(b, l, h, p\)"),
        ({"x": GOOD["x"][:, :0]}, r"x: got an empty tensor of shape \(2, 0, 4, 3\)"),
        ({"x": GOOD["x"].long()}, "x: got dtype torch.int64, expected a real floating dtype"),
        ({"dt": GOOD["dt"][:, :-1]}, r"dt: got shape \(2, 20, 4\), expected \(2, 21, 4\) = \(b, l, h\)"),
        ({"A": GOOD["A"].to("meta")}, "A: got a tensor on meta, expected cpu, where x is"),
        ({"A": GOOD["A"][None]}, r"A: got shape \(1, 4\), expected \(4,\) = \(h\)"),
        ({"B": GOOD["B"][:, :, 0]}, r"B: got shape \(2, 21, 5\), expected 4 dimensions"),
        ({"B": GOOD["B"].repeat(1, 1, 2, 1)[:, :, :3]}, "B: got 3 groups, expected a number that divides the 4 heads"),
        ({"C": GOOD["C"][..., 1:]}, r"C: got shape \(2, 21, 2, 4\), expected \(2, 21, 2, 5\)"),
        ({"D": GOOD["D"][1:]}, r"D: got shape \(3,\), expected \(4,\)"),
        ({"dt_bias": GOOD["dt_bias"][1:]}, r"dt_bias: got shape \(3,\), expected \(4,\)"),
        ({"orders": torch.arange(21)[None]}, r"orders: got shape \(1, 21\), expected \(t,\)"),
        ({"orders": torch.arange(22)}, r"orders: found token 21, expected 0..20 \(x has 21 tokens\)"),
        ({"orders": torch.arange(21) - 1}, "orders: found token -1, expected 0..20"),
        ({"orders": torch.rand(21)}, "orders: got dtype torch.float32, expected int32 or int64"),
        ({"chunk": 0}, "chunk: got 0, expected a number of steps >= 1"),
        ({"backend": "fast"}, "backend: got 'fast', expected one of naive, chunked, or None"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**GOOD, **change})
    if not change.keys() & {"orders", "chunk", "backend"}:
        with pytest.raises(ValueError, match=message):
            ssd_noncausal(**{**GOOD, **change})
