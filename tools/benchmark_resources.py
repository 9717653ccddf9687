"""Compiles every Triton configuration that a scan may choose, without a GPU, and tabulates what it costs.

    python tools/benchmark_resources.py [--targets sm_80 sm_90 gfx942] [--states 1 16] [--csv FILE]

Registers a thread, bytes of shared memory, bytes spilled to local memory and barriers, for the training kernels in
bfloat16 and float32. Exits with 1 if anything spills.
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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from backbones.ops.triton.common import carry_kernel, segment_ends_kernel, sum_orders_kernel
from backbones.ops.triton.kernels_backward import backward_kernel
from backbones.ops.triton.kernels_forward import forward_kernel
from backbones.ops.triton.launch import Config, backward_config, backward_window_config, forward_config

COLUMNS = (
    "kernel", "dtype", "n", "c", "BLOCK_C", "U", "warps", "target", "registers", "shared", "spilled", "barriers",
)  # fmt: skip
LINE = (
    "{:22} {} n={:<3} c={:<4} BLOCK_C={:<3} U={} warps={} {:7} "
    "{:4} registers {:6} B shared {:5} B spilled {:3} barriers"
)
# float32 whatever the tokens' dtype
_FLOAT32 = {
    "A", "D", "bias", "starts", "states", "adjoints", "scratch", "dB", "dC", "dA", "dD", "dbias", "ends", "totals",
}  # fmt: skip
_TOKENS = {"u", "delta", "B", "C", "y", "grad", "du", "ddelta", "x", "V"}
# Strides that are multiples of 16 elements in every model of this library, as Triton finds at the launch.
_ALIGNED = {"u_b", "u_l", "u_k", "d_b", "d_l", "d_k", "y_b", "y_l", "y_k", "g_b", "g_l", "g_k"} | {
    f"{x}_{axis}" for x in ("du", "dd") for axis in "blk"
}


def cases(states: list[int]) -> Iterator[tuple[str, Any, str, int, int, Config, dict[str, Any]]]:
    """(name, kernel, dtype, n, c, config, constants) of everything that is to be compiled."""
    common = dict(HAS_ORDERS=True, HAS_BIAS=True, SOFTPLUS=True, WIDE=False)
    forward = dict(HAS_D=True, HAS_STARTS=False, SAVE=True, EMIT=True, BY_STEP=False, WINDOW=False, RESET=False)
    backward = dict(
        HAS_D=True, HAS_STATES=True, HAS_ADJOINTS=False, GRAD_BY_STEP=False, BY_STEP=False, ATOMIC=False,
        WINDOW=False, RESET=False,
    )  # fmt: skip
    # Channels so many that every width of a block is chosen for one of them, on a GPU that they fill.
    for n, c, dtype in itertools.product(states, (32, 64, 128), ("bf16", "fp32")):
        config = forward_config(n, c, 4096, 132)
        yield "forward", forward_kernel, dtype, n, c, config, common | forward
        yield "forward segment", forward_kernel, dtype, n, c, config, common | forward | dict(HAS_STARTS=True)
        window = dict(WINDOW=True, RESET=True, SAVE=False, HAS_D=False)
        yield "forward window", forward_kernel, dtype, n, c, config, common | forward | window
        for adjoint in (False, True):
            name = "segment ends" + (" adjoint" if adjoint else "")
            cut = replace(config, U=4)
            yield name, segment_ends_kernel, dtype, n, c, cut, common | dict(ADJOINT=adjoint, X_BY_STEP=False)
        config = backward_config(n, c, 4096, 132)
        yield "backward", backward_kernel, dtype, n, c, config, common | backward
        yield "backward atomic", backward_kernel, dtype, n, c, config, common | backward | dict(ATOMIC=True)
        yield "backward segment", backward_kernel, dtype, n, c, config, common | backward | dict(HAS_ADJOINTS=True)
        window = dict(WINDOW=True, RESET=True, HAS_STATES=False, HAS_D=False)
        config = backward_window_config(config)
        yield "backward window", backward_kernel, dtype, n, c, config, common | backward | window
    fixed = Config(1, 64, 8, 1)
    yield "carry", carry_kernel, "fp32", 1, 96, fixed, dict(REVERSE=False, BLOCK=64)
    for dtype in ("bf16", "fp32"):
        yield "sum over orders", sum_orders_kernel, dtype, 1, 96, Config(1, 128, 1, 4), dict(ROWS=16)


def compile_kernel(kernel: Any, dtype: str, config: Config, constants: dict[str, Any], target: GPUTarget) -> Any:
    """The compiled kernel, specialised as a launch with aligned pointers and channel strides would specialise it."""
    constants = constants | {name: getattr(config, name) for name in ("N", "BLOCK_C", "U")}
    unused = {
        "D": "HAS_D", "starts": "HAS_STARTS", "states": "SAVE" if "SAVE" in constants else "HAS_STATES",
        "adjoints": "HAS_ADJOINTS",
    }  # fmt: skip
    signature, attrs, values = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in unused and not constants.get(unused[name], True):
            signature[name], values[name] = "constexpr", None
        elif name == "orders":
            signature[name] = "*i32"
        elif name in _FLOAT32 or name in _TOKENS:
            signature[name] = "*fp32" if name in _FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in _ALIGNED or name == "c":
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attrs)
    options = dict(num_warps=config.num_warps, enable_fp_fusion=True)
    return triton.compile(source, target=target, options=options)


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--states", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)

    rows = []
    seen = set()
    for target_name in options.targets:
        arch = int(target_name[3:]) if target_name.startswith("sm_") else target_name
        target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
        for name, kernel, dtype, n, c, config, constants in cases(options.states):
            key = (target_name, name, dtype, config)
            if key in seen:
                continue
            seen.add(key)
            measured = resources(compile_kernel(kernel, dtype, config, constants, target), target)
            rows.append((name, dtype, n, c, config.BLOCK_C, config.U, config.num_warps, target_name, *measured))
            print(LINE.format(*rows[-1]), flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    spilling = sum(row[-2] > 0 for row in rows)
    print(f"{len(rows)} compiled, {spilling} with spills (triton {triton.__version__})")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
