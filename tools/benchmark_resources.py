"""Compiles every Triton configuration that a scan or convolution may choose, without a GPU.

    python tools/benchmark_resources.py [--targets sm_80 sm_90 gfx942] [--states 1 16] [--csv FILE]

Tabulates registers a thread, bytes of shared memory, bytes spilled to local memory and barriers, for the training
kernels in bfloat16 and float32. Exits with 1 if anything spills.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from backbones.ops.depthwise import triton as depthwise
from backbones.ops.scan.triton.common import carry_kernel, segment_ends_kernel, sum_orders_kernel
from backbones.ops.scan.triton.config import Config, backward_config, backward_window_config, forward_config
from backbones.ops.scan.triton.kernels_backward import backward_kernel
from backbones.ops.scan.triton.kernels_forward import forward_kernel

TARGETS = ("sm_80", "sm_90", "gfx942")
KERNELS = {
    "forward": forward_kernel,
    "backward": backward_kernel,
    "segment ends": segment_ends_kernel,
    "carry": carry_kernel,
    "sum over orders": sum_orders_kernel,
    "convolution": depthwise.gather_kernel,
    "convolution weight": depthwise.weight_kernel,
}
COLUMNS = (
    "kernel", "mode", "dtype", "configuration", "target", "registers", "shared", "spilled", "barriers",
)  # fmt: skip
# float32 whatever the tokens' dtype; of the convolution, what the mode says
_FLOAT32 = {
    "A", "D", "bias", "starts", "states", "adjoints", "scratch", "dB", "dC", "dA", "dD", "dbias", "ends", "totals",
    "weight", "sums",
}  # fmt: skip
_TOKENS = {"u", "delta", "B", "C", "y", "grad", "du", "ddelta", "x", "V", "g", "dx"}
# Strides that are multiples of 16 elements in every model of this library, as Triton finds at the launch.
_ALIGNED = {f"{x}_{axis}" for x in ("u", "d", "y", "g", "du", "dd") for axis in "blk"} | {"c"}


@dataclass(frozen=True)
class Job:
    """One kernel as a launch would specialise it."""

    kernel: str
    mode: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    float32: tuple[str, ...] = ()  # more arguments that are float32 here
    unaligned: tuple[str, ...] = ()
    target: str = ""


def jobs(states: Sequence[int]) -> Iterator[Job]:
    """Everything that is to be compiled for one target."""
    yield from _scans(states)
    yield Job("carry", "", "fp32", dict(REVERSE=False, BLOCK=64, U=8), 1)
    for dtype in ("bf16", "fp32"):
        yield Job("sum over orders", "", dtype, dict(ROWS=16, BLOCK_C=128), 4)
        yield from _convolutions(dtype)


def _scans(states: Sequence[int]) -> Iterator[Job]:
    common = dict(HAS_ORDERS=True, HAS_BIAS=True, SOFTPLUS=True, WIDE=False)
    forward = dict(HAS_D=True, HAS_STARTS=False, SAVE=True, EMIT=True, BY_STEP=False, WINDOW=False, RESET=False)
    backward = dict(
        HAS_D=True, HAS_STATES=True, HAS_ADJOINTS=False, GRAD_BY_STEP=False, BY_STEP=False, ATOMIC=False,
        WINDOW=False, RESET=False,
    )  # fmt: skip
    seen = set()
    # Channels so many that every width of a block is chosen for one of them, on a GPU that they fill.
    for n, c, dtype in itertools.product(states, (32, 64, 128), ("bf16", "fp32")):
        config = forward_config(n, c, 4096, 132)
        if (config, dtype) in seen:
            continue
        seen.add((config, dtype))

        def job(kernel: str, mode: str, config: Config, constants: dict[str, Any], dtype: str = dtype) -> Job:
            tile = dict(N=config.N, BLOCK_C=config.BLOCK_C, U=config.U)
            return Job(kernel, mode, dtype, common | constants | tile, config.num_warps)

        yield job("forward", "", config, forward)
        yield job("forward", "segment", config, forward | dict(HAS_STARTS=True))
        window = dict(WINDOW=True, RESET=True, SAVE=False, HAS_D=False)
        yield job("forward", "window", config, forward | window)
        ends = dict(ADJOINT=False, X_BY_STEP=False)
        yield job("segment ends", "", replace(config, U=4), ends)
        config = backward_config(n, c, 4096, 132)
        yield job("segment ends", "adjoint", replace(config, U=4), ends | dict(ADJOINT=True))
        yield job("backward", "", config, backward)
        yield job("backward", "atomic", config, backward | dict(ATOMIC=True))
        yield job("backward", "segment", config, backward | dict(HAS_ADJOINTS=True))
        window = dict(WINDOW=True, RESET=True, HAS_STATES=False, HAS_D=False)
        yield job("backward", "window", backward_window_config(config), backward | window)


def _convolutions(dtype: str) -> Iterator[Job]:
    for taps, c in ((4, 384), (9, 96), (9, 192), (9, 768), (49, 96)):
        rows, channels = depthwise.tile(10**4, c, depthwise.GATHERED)
        shape = dict(J=taps, BLOCK_M=rows, BLOCK_C=channels, UNROLL=min(taps, depthwise.TAPS), WIDE=False)
        one = dict(summed=1, HAS_BIAS=True, SILU=True, SLOPE=False)
        yield Job("convolution", "", dtype, shape | one, 4)
        yield Job("convolution", "slope", dtype, shape | one | dict(SLOPE=True), 4, float32=("y",))
        back = dict(orders=1, HAS_BIAS=False, SILU=False, SLOPE=False)
        yield Job("convolution", "back", dtype, shape | back, 4, float32=("x",))
        rows, channels = depthwise.tile(10**4, c, depthwise.SUMMED)
        shape = dict(J=taps, BLOCK_M=rows, BLOCK_C=channels, TAPS=min(taps, depthwise.TAPS), WIDE=False)
        yield Job("convolution weight", "", dtype, shape, 4, float32=("g",))


def gpu_target(name: str) -> GPUTarget:
    """sm_90 or gfx942 as Triton names it."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def compile_kernel(job: Job) -> Any:
    """The compiled kernel, specialised as a launch with aligned pointers and channel strides would specialise it."""
    kernel = KERNELS[job.kernel]
    constants = dict(job.constants)
    used = {
        "D": "HAS_D", "starts": "HAS_STARTS", "states": "SAVE" if "SAVE" in constants else "HAS_STATES",
        "adjoints": "HAS_ADJOINTS", "bias": "HAS_BIAS",
    }  # fmt: skip
    if job.kernel == "convolution":
        used["grad"] = "SLOPE"
    signature, attrs, values = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in used and not constants.get(used[name], True):
            signature[name], values[name] = "constexpr", None
        elif name == "table" or (name == "orders" and not job.kernel.startswith("convolution")):
            signature[name] = "*i32"
        elif name in _FLOAT32 or name in job.float32:
            signature[name] = "*fp32"
        else:
            signature[name] = f"*{job.dtype}" if name in _TOKENS else "i32"
        aligned = signature[name].startswith("*") or name in _ALIGNED
        if aligned and name not in job.unaligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attrs)
    options = dict(num_warps=job.warps, enable_fp_fusion=True)
    return triton.compile(source, target=gpu_target(job.target), options=options)


def resources(compiled: Any, target: GPUTarget) -> tuple[int, int, int, int]:
    """(registers, shared bytes, spilled bytes, barriers)."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
        # Scalar registers spill into lanes of vector registers; what reaches memory is the private segment.
        spilled = found["private_segment_fixed_size"]
        return found["vgpr_count"], compiled.metadata.shared, spilled, len(re.findall(r"\bs_barrier\b", text))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        arch = f"sm_{target.arch}" + ("a" if target.arch >= 90 else "")
        command = [str(tool), "-v", f"--gpu-name={arch}", str(ptx), "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    if registers is None or not spills:
        raise ValueError(f"ptxas: no line of registers and spills in its report: {report!r}")
    barriers = len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", compiled.asm["ptx"]))
    return int(registers[1]), compiled.metadata.shared, sum(map(int, spills)), barriers


def measure(job: Job) -> tuple[Any, ...]:
    """One row of the table."""
    found = resources(compile_kernel(job), gpu_target(job.target))
    shape = {key: job.constants[key] for key in ("N", "J", "R", "BLOCK_M", "BLOCK_C", "U") if key in job.constants}
    configuration = " ".join(f"{key}={value}" for key, value in shape.items()) + f" warps={job.warps}"
    return job.kernel, job.mode, job.dtype, configuration, job.target, *found


def table(targets: Sequence[str], states: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Rows of ``COLUMNS``, as they are compiled, several at a time."""
    todo = [replace(job, target=target) for target in targets for job in jobs(states)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(measure, todo)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="sm_90|gfx942")
    parser.add_argument("--states", nargs="+", type=int, default=[1, 16], help="states of a channel, n")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)

    line = "{:18} {:8} {} {:34} {:7} {:4} registers {:6} B shared {:4} B spilled {:3} barriers"
    rows = []
    for row in table(options.targets, options.states):
        rows.append(row)
        print(line.format(*row), flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            file.write(f"# compiled ahead of time by triton {triton.__version__}, without a GPU\n")
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    spilling = sum(row[-2] > 0 for row in rows)
    print(f"{len(rows)} compiled, {spilling} with spills (triton {triton.__version__})")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
