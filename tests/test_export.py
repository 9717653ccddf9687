"""backbones.export and its command: ONNX in onnxruntime and torch.export programs, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import onnxruntime

from backbones.export import export_onnx, export_program, to_onnx
from backbones.ops import selective_scan, ssd
from backbones.patterns import CROSS, MULTI_SCALE
from backbones.weights.rules import to_official
from tests.scripts import load_tool
from tests.small_models import SMALLEST, create_small, is_plain

# torch.export.load reads tensors from a buffer of the archive.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")

ROOT = Path(__file__).parents[1]
# float32 in another order of summation, through at most ten layers; the largest error seen is 1.4e-6.
TOLERANCE = 1e-5
FLAT = {"depths": (1, 1, 1, 1)}
# One of every generation of every family, at a size that is odd, not square, or both.
MODELS = {
    **{name: ((48, 32), {"depth": 2}) if is_plain(name) else ((50, 37), FLAT) for name in SMALLEST},
    "vim_tiny": ((48, 32), {"depth": 1}),
    "lbvim_tiny": ((64, 80), {"depth": 2}),
    "lbvim_528": ((32, 48), {"depth": 1}),
    "vanilla_vmamba_tiny": ((40, 33), FLAT),
    "vmamba_tiny_s1l8": ((33, 50), FLAT),
    "msvmambav3_tiny": ((33, 50), FLAT),
    "groupmamba_tiny": ((45, 50), FLAT),
    "localvim_tiny": ((50, 32), {"depth": 2}),
    "localvim_tiny_midcls": ((48, 48), {"depth": 2}),
    "adventurer_tiny": ((48, 32), {"depth": 4}),
    "plainmamba_l1": ((50, 33), {"depth": 2}),
}
del MODELS["plainmamba_l2"]  # which is plainmamba_l1, but wider
QUICK = "vim_tiny"


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def create(name: str, size: tuple[int, int], **arguments: object) -> nn.Module:
    if is_plain(name):
        arguments["img_size"] = size
    return timm.create_model(name, num_classes=10, scan_backend="naive", **arguments).eval()


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_onnx_agrees_for_any_batch_size(name: str, tmp_path: Path) -> None:
    size, arguments = MODELS[name]
    model = create(name, size, **arguments)
    path = tmp_path / "model.onnx"
    export_onnx(model, torch.zeros(1, 3, *size), path)
    graph = onnx.load(path)
    assert {x.domain for x in graph.opset_import} == {""}  # no custom operator
    assert not {"Loop", "Scan", "If", "ScatterND"} & {node.op_type for node in graph.graph.node}
    assert [x.name for x in (*graph.graph.input, *graph.graph.output)] == ["image", "logits"]
    for batch in (1, 3):
        image = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected = model(image)
        torch.testing.assert_close(run_onnx(path, image)[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_plain_exports_name_the_way_out(name: str, dynamo: bool, tmp_path: Path) -> None:
    model = create_small(name).eval()
    with pytest.raises(
        (ValueError, torch.onnx.errors.OnnxExporterError), match=r"`ssm-backbones export` and backbones\.export"
    ):
        torch.onnx.export(model, (torch.zeros(2, 3, 64, 64),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    assert not list(tmp_path.iterdir())


class Scan(nn.Module):
    """The operator alone, on 7 tokens."""

    def __init__(self, orders: Tensor | None, shared: bool = False, **options: object) -> None:
        super().__init__()
        k = 1 if orders is None else len(orders)
        self.options = {"orders": orders, "backend": "naive", **options}
        self.u_width = () if shared else (k,)
        self.A = nn.Parameter(-torch.rand(k, 4, 3))
        self.D = nn.Parameter(torch.randn(k, 4))
        self.bias = nn.Parameter(torch.rand(k, 4))

    def inputs(self, batch: int, length: int = 7) -> tuple[Tensor, ...]:
        k = len(self.A)
        u = torch.randn(batch, length, *self.u_width, 4)
        return u, torch.rand(batch, length, k, 4), *torch.randn(2, batch, length, k, 3)

    def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(u, delta, self.A, B, C, self.D, delta_bias=self.bias, **self.options)


SCANS = {
    "no orders": (None, {}),
    "no orders, per order": (None, {"out": "per_order"}),
    "sum, u shared": ("cross", {"shared": True}),
    "per order": ("cross", {"out": "per_order", "delta_softplus": False}),
    "repeated tokens, sum": ("walk", {}),
    "repeated tokens, per step": ("walk", {"out": "per_step"}),
    "window that does not divide": ("walk", {"local_window": 4}),
    "window longer than the scan": (None, {"local_window": 16, "shared": True}),
}


@pytest.mark.parametrize("case", SCANS)
def test_operator_in_onnx(case: str, tmp_path: Path) -> None:
    which, options = SCANS[case]
    orders = {None: None, "cross": CROSS.orders(1, 7), "walk": MULTI_SCALE.orders(7, 1)}[which]
    scan = Scan(orders, **options).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(scan, scan.inputs(2), dynamic_shapes=({0: batch},) * 4)
    path = tmp_path / "scan.onnx"
    to_onnx(program, ["u", "delta", "B", "C"]).save(path)
    inputs = scan.inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(path, *inputs)[0], scan(*inputs), rtol=0, atol=TOLERANCE)


class Duality(nn.Module):
    """State-space duality along an order that visits some of 7 tokens twice and one never."""

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        orders = torch.tensor([3, 0, 1, 6, 6, 2, 5, 0])
        return ssd(x, dt, -torch.arange(1.0, 4.0), B, C, torch.ones(3), orders=orders, chunk=3)


def test_duality_in_onnx(tmp_path: Path) -> None:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 7, 3, 4), torch.rand(batch, 7, 3), *torch.randn(2, batch, 7, 1, 5)

    layer, path = Duality().eval(), tmp_path / "duality.onnx"
    batch = torch.export.Dim("batch")
    to_onnx(torch.export.export(layer, inputs(2), dynamic_shapes=({0: batch},) * 4), ["x", "dt", "B", "C"]).save(path)
    assert not {"Loop", "Scan", "If", "ScatterND"} & {node.op_type for node in onnx.load(path).graph.node}
    x = inputs(3)
    torch.testing.assert_close(run_onnx(path, *x)[0], layer(*x), rtol=0, atol=TOLERANCE)


def test_program_is_saved_reloaded_and_equal(tmp_path: Path) -> None:
    size, arguments = MODELS["efficientvmamba_tiny"]
    model = create("efficientvmamba_tiny", size, **arguments)
    program = export_program(model, torch.zeros(1, 3, *size))
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3):
        image = torch.randn(batch, 3, *size)
        with torch.no_grad():
            assert torch.equal(reloaded(image), program.module()(image))
            torch.testing.assert_close(reloaded(image), model(image), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda m: m.train(), "in training mode"), (lambda m: m.double(), "has parameters of torch.float64")],
)
def test_models_that_cannot_be_exported_are_refused(change, message: str, tmp_path: Path) -> None:
    model = change(create(QUICK, (32, 32), depth=1))
    with pytest.raises(ValueError, match=message):
        export_onnx(model, torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("export")


def call(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return tool.main([str(x) for x in arguments], "export.py")


@pytest.mark.slow
def test_tool_exports_a_checkpoint_both_ways(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("efficientvmamba_tiny", num_classes=5).eval()
    torch.save({"model": to_official(model.state_dict(), model.key_rules)}, "official.pth")
    arguments = ["--checkpoint", "official.pth", "--num-classes", 5, "--img-size", 64, 48, "--onnx", "a.onnx"]
    assert call(tool, monkeypatch, "efficientvmamba_tiny", *arguments, "--pt2", "a.pt2") == 0
    printed = capsys.readouterr().out
    assert "a.onnx: " in printed
    assert "a.pt2: " in printed
    assert "random weights" not in printed
    image = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(Path("a.onnx"), image)[0], model(image), rtol=0, atol=TOLERANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.pt2", "official.pth"]


@pytest.mark.slow
def test_tool_writes_programs_of_feature_maps(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "maps.pt2"
    assert call(tool, monkeypatch, "efficientvmamba_tiny", "--img-size", 33, "--features", "--pt2", path) == 0
    assert "random weights" in capsys.readouterr().out
    maps = torch.export.load(path).module()(torch.randn(2, 3, 33, 33))
    assert [x.shape[1] for x in maps] == [48, 96, 192, 384]


def test_outputs_that_differ_are_not_written(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        tool, "export_program", lambda model, image: export_program(nn.Sequential(model, nn.Softplus()), image)
    )
    path = tmp_path / "model.pt2"
    assert call(tool, monkeypatch, "efficientvmamba_tiny", "--img-size", 32, "--pt2", path) == 2
    assert "model.pt2: not written, its outputs differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("tolerances", "written"), [(0.3, True), (-0.3, True), (3, False), (-3, False), (float("nan"), False)]
)
def test_an_error_of_the_tolerances_size_is_seen(
    tool: ModuleType, tolerances: float, written: bool, batch: int, tmp_path: Path
) -> None:
    """The limit is 1e-4 of the largest output, for one image and for three; what is no number is over it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    def run(images: Tensor) -> list[Tensor]:
        logits = model(images).detach()
        if len(images) == batch:
            logits[-1, -1] += tolerances * 1e-4 * logits.abs().max()
        return [logits]

    path = tmp_path / "model.pt2"
    arguments = (path, model, torch.randn(3, 3, 2, 2), lambda model, image, path: path.write_text(""), lambda path: run)
    if written:
        tool._write(*arguments)
    else:
        with pytest.raises(tool.ExportError, match=r"model\.pt2: not written, its outputs differ from PyTorch's by "):
            tool._write(*arguments)
    assert [x.name for x in tmp_path.iterdir()] == (["model.pt2"] if written else [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vim_tini", "--onnx", "a.onnx"], ["unknown model 'vim_tini'", "vim_tiny"]),
        (["vim_tiny"], ["nothing to write"]),
        (["vim_tiny", "--onnx", "a.pb"], ["--onnx: got a.pb", ".onnx"]),
        (["vim_tiny", "--pt2", "nowhere/a.pt2"], ["in a folder that exists"]),
        (["vim_tiny", "--pt2", "a.pt2", "--img-size", "8"], ["at least 32 pixels"]),
        (["vim_tiny", "--pt2", "a.pt2", "--checkpoint", "absent.pth"], ["no weight file at absent.pth"]),
        (["vim_tiny", "--pt2", "a.pt2", "--checkpoint", "page.pth"], ["page.pth: a web page"]),
        (["vim_tiny", "--pt2", "a.pt2", "--scan-backend", "cuda"], ["--scan-backend cuda: no such backend"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_mistakes_get_one_line_and_nothing_is_written(
    tool: ModuleType, arguments: list[str], words: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("page.pth").write_text("<html>")
    assert call(tool, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: ")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["page.pth"]
