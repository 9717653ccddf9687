"""Tools as modules, what runs in processes of its own, and their environment."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[1]


def load_tool(name: str) -> ModuleType:
    """The module ``backbones.commands.<name>``, of which optional packages may be missing."""
    return importlib.import_module(f"backbones.commands.{name}")


def call_tool(name: str, *arguments: object) -> None:
    """Calls a command in this process as its script in ``tools/`` does.

    Raises:
        SystemExit: it ended with another status than 0.
    """
    if status := load_tool(name).main([str(x) for x in arguments], f"{name}.py"):
        raise SystemExit(status)


def environment_of_two(*folders: Path) -> dict[str, str]:
    """The environment of two processes that train together and import from ``folders``, too.

    Where there are two GPUs, they take one each, with TF32 off; they cannot share one.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, folders), *sys.path]),
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    if torch.cuda.device_count() < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def run_in_the_interpreter(file: str, markers: str = "not slow") -> None:
    """A file's tests in a process with TRITON_INTERPRET=1, which has to be set before Triton is first imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", markers, file],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
