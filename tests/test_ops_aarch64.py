"""The C++ kernel compiled for aarch64 and run by an emulator, held against float64 like the native one.

Needs a cross-compiler and QEMU's user mode (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

import ast
import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from backbones.ops import native
from backbones.ops.native import ScanCall
from backbones.ops.scan import cpu
from tests.test_ops_cpu import F32, check, make, make_orders

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"{COMPILER} or {EMULATOR} is not installed"
    ),
]


def build_flags() -> list[str]:
    """The constant FLAGS of setup.py, which cannot be imported without building."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "FLAGS"
    )


class EmulatedLibrary:
    """Stands in for the loaded library: every call runs in the emulator, on copies of the memory that it names."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def backbones_scan_forward(self, call: ScanCall) -> int:
        return self._run(call, backwards=False)

    def backbones_scan_backward(self, call: ScanCall) -> int:
        return self._run(call, backwards=True)

    def _run(self, call: ScanCall, backwards: bool) -> int:
        sizes = {field: size if getattr(call, field) else 0 for field, size in memory_sizes(call).items()}
        addresses = {field: getattr(call, field) for field in sizes}
        sent = ScanCall.from_buffer_copy(call)
        for field, size in sizes.items():
            setattr(sent, field, size)
        given = b"".join(ctypes.string_at(addresses[field], size) for field, size in sizes.items() if size)
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(self.program)]
        answer = subprocess.run(
            command, input=struct.pack("=q", backwards) + bytes(sent) + given, stdout=subprocess.PIPE, check=True
        ).stdout
        at = 8
        for field, size in sizes.items():
            ctypes.memmove(addresses[field], answer[at : at + size], size)
            at += size
        assert at == len(answer)
        return struct.unpack_from("=q", answer)[0]


def memory_sizes(call: ScanCall) -> dict[str, int]:
    """Bytes behind every pointer of a call, in the order in which tests/emulated_driver.cpp reads them."""
    b, l, t, k, c, n, rank, window = (getattr(call, name) for name in ("b", "l", "t", "k", "c", "n", "rank", "window"))
    element = 2 if call.bf16 else 4

    def span(name: str, rows: int, width: int) -> int:
        of_batch, of_token, of_order = (getattr(call, f"s{name}_{axis}") for axis in "blk")
        return ((b - 1) * of_batch + (rows - 1) * of_token + (k - 1) * of_order + width) * element

    image = b * l * (1 if call.u_shared else k) * c
    y = {0: b * l * c, 1: b * l * k * c, 2: b * t * k * c}[call.out]
    chunk = -(-cpu.CHUNK // window) * window if window > 1 else cpu.CHUNK
    states = b * k * (-(-t // chunk) - 1) * n * c
    return {
        "u": span("u", l, c),
        "delta": span("delta", l, rank or c),
        "B": span("B", l, n),
        "C": span("C", l, n),
        "grad": span("grad", t if call.out == 2 else l, c),
        "A": k * c * n * 4,
        "D": k * c * 4,
        "bias": k * c * 4,
        "dt_weight": k * c * rank * 4,
        "orders": k * t * 4,
        "y": y * element,
        "states": states * 4,
        "du": image * element,
        "ddelta": b * l * k * c * (4 if rank else element),
        "dB": b * l * k * n * element,
        "dC": b * l * k * n * element,
        "dA": k * c * n * 4,
        "dD": k * c * 4,
        "dbias": k * c * 4,
    }


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aarch64") / "driver"
    sources = sorted((ROOT / "backbones/ops/csrc").glob("*.cpp"))
    command = [COMPILER, *build_flags(), "-Wall", "-Werror", "-fopenmp", "-DSCAN_ISA=baseline", *map(str, sources)]
    subprocess.run([*command, str(ROOT / "tests/emulated_driver.cpp"), "-o", str(path)], check=True)
    return path


@pytest.fixture(autouse=True)
def _emulated(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = EmulatedLibrary(program)
    monkeypatch.setattr(native, "library", lambda: library)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("n", [1, 7, 16])
def test_float32(n: int, rank: int, window: int) -> None:
    tensors = make(2, 131, 2, 43, n, rank=rank)
    check(tensors, **F32, orders=make_orders("permute", 2, 131), local_window=window)


@pytest.mark.parametrize("out", ["sum", "per_order", "per_step"])
@pytest.mark.parametrize("n", [1, 4])
def test_bfloat16_with_repeats(n: int, out: str) -> None:
    tensors = make(2, 35, 2, 21, n)
    for name in ("u", "delta", "B", "C"):
        tensors[name] = tensors[name].bfloat16()
    check(tensors, 4e-3, 4e-3, orders=make_orders("repeat", 2, 35), out=out)  # 2^-8, as for the native kernel
