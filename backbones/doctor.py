"""Looks at this installation and says what runs, what does not, and which command would change that.

    ssm-backbones doctor

The exit status is 0 if all is well. What is optional and absent (OpenMMLab, Triton where there is no GPU) is well; what
is broken, too old or slower than it should be is not.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor

import backbones
from backbones import ops
from backbones.ops import native, selective_scan
from backbones.patterns import CROSS

PIP = f"{sys.executable} -m pip install"
TOLERANCE = 1e-5  # RMS error over RMS value in float32: some 50 roundings
_OPENMMLAB = {  # distribution: what must import for it to be of use; backbones.mm stands in for mmcv's operators
    "mmengine": "mmengine.runner",
    "mmcv": "backbones.mm, mmcv.ops",
    "mmdet": "backbones.mm, mmdet.apis",
    "mmseg": "backbones.mm, mmseg.apis",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: "ok", "absent" for what is optional, or "problem".
        text: what was found.
        fix: a command that would help, if there is one.
    """

    status: str
    text: str
    fix: str | None = None


def check_packages() -> Iterator[Finding]:
    """The library itself and what it needs, against the versions that it asks for."""
    try:
        required = [Requirement(x) for x in metadata.requires("ssm-backbones") or ()]
    except metadata.PackageNotFoundError:
        folder = Path(backbones.__file__).parents[1]
        yield Finding("problem", f"ssm-backbones is not installed, only imported from {folder}", f"{PIP} {folder}")
        return
    for requirement in required:
        if requirement.marker is None:
            yield _check_requirement(requirement)


def _check_requirement(requirement: Requirement) -> Finding:
    name = requirement.name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("problem", f"{name} is missing", f'{PIP} "{requirement}"')
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("problem", f"{name} {version}, needed is {requirement.specifier}", f'{PIP} "{requirement}"')
    needed = f" (needed is {requirement.specifier})" if requirement.specifier else ""
    return Finding("ok", f"{name} {version}{needed}")


def check_openmmlab() -> Iterator[Finding]:
    """Training, detection and segmentation: whether the packages that are there import and ask for what is here."""
    distributions = metadata.packages_distributions()
    there = [module for module in _OPENMMLAB if module in distributions]
    together = _import_problem([_OPENMMLAB[module] for module in there])
    for module, needed in _OPENMMLAB.items():
        if module not in there:
            yield Finding("absent", module, f'{PIP} "ssm-backbones[mm]"')
            continue
        name = distributions[module][0]
        text = f"{module} {metadata.version(name)} ({name}){_operators(module)}"
        if reason := together and _import_problem([needed]):
            fix = f"{PIP} --force-reinstall --no-deps --no-cache-dir {name}"
            yield Finding("problem", f"{text}: cannot import {needed}: {reason}", fix)
        else:
            yield Finding("ok", text)
        yield from _unmet(name)


def _operators(module: str) -> str:
    """Whose operators detection heads run on, for mmcv's line."""
    if module != "mmcv":
        return ""
    folders = getattr(importlib.util.find_spec("mmcv"), "submodule_search_locations", None)
    compiled = PathFinder.find_spec("mmcv._ext", folders) is not None
    return ", with its compiled operators" if compiled else ", without compiled operators: torchvision's stand in"


def _import_problem(modules: list[str]) -> str | None:
    """Why these do not import; in a process of its own, which an operator compiled for another torch may kill."""
    command = [sys.executable, "-W", "ignore", "-c", "".join(f"import {module}\n" for module in modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _unmet(distribution: str) -> Iterator[Finding]:
    """Installed packages of another version than ``distribution`` asks for."""
    for requirement in map(Requirement, metadata.requires(distribution) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # forks and headless builds stand in under other names; that it imports was checked
        if not requirement.specifier.contains(version, prereleases=True):
            text = f"{distribution} wants {requirement}, but {version} is installed"
            yield Finding("problem", text, f'{PIP} "{requirement}"')


def check_backends() -> Iterator[Finding]:
    """Where scans run. It is a problem if none of the fast backends runs, or one is there and broken."""
    try:
        reasons = ops.backends()
    except ValueError as error:  # an instruction set that BACKBONES_CPU_ISA names
        yield Finding("problem", f"cpu: {error}", "unset BACKBONES_CPU_ISA")
        return
    if reasons["cpu"] is None:
        forced = os.environ.get("BACKBONES_CPU_ISA")
        isa = native.instruction_set() + (" (forced by BACKBONES_CPU_ISA)" if forced else "")
        yield Finding(
            "ok", f"cpu: {isa}, {torch.get_num_threads()} of {_cores()} cores (OMP_NUM_THREADS sets how many)"
        )
    elif native.LIBRARY.exists() or reasons["triton"] is not None:
        yield Finding("problem", f"cpu: {reasons['cpu']}", _compiler_command() + _reinstall_command())
    else:
        yield Finding("absent", f"cpu: {reasons['cpu']}", _compiler_command() + _reinstall_command())
    if reasons["triton"] is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU, interpreted and very slow"
        yield Finding("ok", f"triton: {metadata.version('triton')} on {device}")
        if torch.cuda.is_available():
            yield _check_host(native.host(torch.device("cuda", torch.cuda.current_device())))
    elif torch.cuda.is_available():
        yield Finding("problem", f"triton: {reasons['triton']}", f"{PIP} --upgrade triton")
    elif torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
        text = f"triton: there is an NVIDIA driver, but torch {torch.__version__} was built without CUDA"
        yield Finding("problem", text, f"{PIP} --force-reinstall torch torchvision")
    else:
        yield Finding("absent", f"triton: {reasons['triton']}")
    yield Finding("ok", "naive: plain PyTorch, everywhere, slow")


def _check_host(host: native.Host | str) -> Finding:
    """Who runs what blocks do on a GPU once it is recorded."""
    if isinstance(host, str):
        return Finding("absent", f"triton: Python runs recorded blocks, which takes it longer: {host}")
    return Finding("ok", "triton: the compiled library runs recorded blocks")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compiler_command() -> str:
    if any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        return ""
    return {
        "Linux": "sudo apt-get install g++ && ",
        "Darwin": "xcode-select --install && ",
        "Windows": "winget install Microsoft.VisualStudio.2022.BuildTools && ",
    }.get(platform.system(), "")


def _reinstall_command() -> str:
    """Installs the library again from where it came."""
    try:
        origin = json.loads(metadata.distribution("ssm-backbones").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {"url": str(Path(backbones.__file__).parents[1])}
    url = origin.get("url", "ssm-backbones")
    url = f"{origin['vcs_info']['vcs']}+{url}" if "vcs_info" in origin else url.removeprefix("file://")
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"{PIP} --force-reinstall --no-deps --no-cache-dir {editable}{url}"


def check_scans() -> Iterator[Finding]:
    """Values and gradients of every backend against float64, then their speed against the naive one."""
    backends = {name: "cuda" if name == "triton" else "cpu" for name in _running()}
    for name, device in backends.items():
        errors = [_error(name, device, states) for states in (1, 16)]
        if max(errors) <= TOLERANCE:
            yield Finding("ok", f"{name}: values and gradients within {max(errors):.0e} of float64")
        else:
            text = (
                f"{name}: values or gradients are off by {max(errors):.0e} of their size, allowed are {TOLERANCE:.0e}"
            )
            yield Finding("problem", text, None if name == "naive" else _reinstall_command())
    times = {name: _seconds(name, device) for name, device in backends.items()}
    for name, seconds in times.items():
        text = f"{name}: {seconds * 1e3:.2f} ms for a stage of VMamba-T on one image"
        if name == "naive":
            yield Finding("ok", text)
            continue
        ratio = times["naive"] / seconds
        fix = None if ratio > 1 else _reinstall_command()
        yield Finding("ok" if ratio > 1 else "problem", f"{text}, {ratio:.3g} times as fast as naive", fix)


def check_half() -> Iterator[Finding]:
    """Whether half precision pays on this CPU: measured, for not all instructions that it has are fast."""
    seconds = _product_seconds((torch.float32, torch.bfloat16))
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    advice = "--amp and model.to(torch.bfloat16) save time" if ratio < 0.8 else "float32 is no slower"
    text = f"bfloat16: a product takes {ratio:.2g} times as long as in float32, so {advice}{_half_instructions()}"
    yield Finding("ok", text)


def _half_instructions() -> str:
    """The instructions for bfloat16 that this CPU has, where PyTorch can tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return ""
    found = sorted(name for name, there in torch.cpu.get_capabilities().items() if "bf16" in name and there)
    return f" (instructions: {', '.join(found) or 'none'})"


def _product_seconds(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, float]:
    """Medians of a product of VMamba-T's third stage on eight images, from one interleaved run."""
    operands = {dtype: (torch.ones(1568, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)) for dtype in dtypes}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    for _ in range(7):
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            torch.mm(x, weight)
            times[dtype].append(time.perf_counter() - start)
    return {dtype: statistics.median(each[2:]) for dtype, each in times.items()}


def _running() -> list[str]:
    """Backends to test; the interpreter of Triton would take minutes."""
    try:
        reasons = ops.backends()
    except ValueError:  # check_backends has told
        return ["naive"]
    there = [name for name, reason in reasons.items() if reason is None]
    return [name for name in there if name != "triton" or torch.cuda.is_available()]


def _inputs(height: int, width: int, batch: int, channels: int, states: int, device: str) -> dict[str, Any]:
    """Arguments of a scan along four orders, in the value ranges of a trained model."""
    generator = torch.Generator().manual_seed(0)
    length = height * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, 4, channels),
        "A": -torch.arange(1.0, states + 1, device=device).expand(4, channels, states).contiguous(),
        "B": normal(batch, length, 4, states),
        "C": normal(batch, length, 4, states),
        "D": normal(4, channels),
        "orders": CROSS.orders(height, width, device),
        "delta_bias": 0.7 * normal(4, channels) - 4.5,
    }


def _error(backend: str, device: str, states: int) -> float:
    """The largest relative RMS error among the output and all gradients."""
    inputs = _inputs(5, 7, 2, 20, states, device)
    found = _with_gradients(inputs, backend)
    exact = _with_gradients({name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}, "naive")
    # Not max(), which would drop a NaN.
    errors = [((x - y).square().mean() / y.square().mean()).sqrt() for x, y in zip(found, exact, strict=True)]
    return torch.stack(errors).nan_to_num(torch.inf).max().item()


def _with_gradients(inputs: dict[str, Any], backend: str) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    y = selective_scan(**leaves, backend=backend)
    wave = torch.linspace(-3, 3, y.numel(), device=y.device, dtype=y.dtype).cos().view_as(y)
    differentiable = [x for x in leaves.values() if x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, differentiable, wave)]


@torch.no_grad()
def _seconds(backend: str, device: str) -> float:
    """Median of the runs that fit into a third of a second, three at least."""
    inputs = _inputs(28, 28, 1, 192, 1, device)
    times: list[float] = []
    selective_scan(**inputs, backend=backend)
    end = time.perf_counter() + 0.3
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        selective_scan(**inputs, backend=backend)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Packages": check_packages,
    "OpenMMLab (optional: training, detection, segmentation)": check_openmmlab,
    "Backends of the selective scan": check_backends,
    "Self-test": check_scans,
    "Half precision": check_half,
}


def main(argv: Sequence[str] | None = None, prog: str = "doctor") -> int:
    """Prints the report; 0 if all is well, else 1."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    system = f"{platform.system()} {platform.machine()}"
    print(f"ssm-backbones {backbones.__version__}, Python {platform.python_version()}, {system}")
    problems = []
    for title, check in CHECKS.items():
        print(f"\n{title}", flush=True)
        for finding in check():
            print(f"  {finding.status:8} {finding.text}", flush=True)
            if finding.status == "absent" and finding.fix:
                print(f"  {'':8} to get it: {finding.fix}")
            if finding.status == "problem":
                problems.append(finding)
    if not problems:
        print("\nAll is well.")
        return 0
    print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}:")
    for finding in problems:
        print(f"  {finding.text}")
        print(f"    run: {finding.fix}" if finding.fix else "    please report it, with all of the above")
    return 1


if __name__ == "__main__":
    sys.exit(main())
