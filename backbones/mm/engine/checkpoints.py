"""Training checkpoints: written whole, read without running code, loaded in full, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from backbones.mm.errors import UserError
from backbones.weights import CheckpointError, Weights
from backbones.weights.files import WRAPPERS, load, select
from backbones.weights.loading import load as load_into
from backbones.weights.sources import fetch, locate

_LOCK = ".run.lock"
_locked: set[Path] = set()


class AtomicBackend(LocalBackend):
    """Local files for ``CheckpointHook(backend_args=dict(backend="atomic"))``.

    A file appears under its name only when it is complete. ``CheckpointHook`` removes the old checkpoint
    before it writes the new one; here a removal waits for the next successful write, so that at every
    moment at least one whole checkpoint is on disk.
    """

    _outdated: ClassVar[set[str]] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` to ``filepath`` by way of a temporary file in the same folder."""
        # A name of this process: what a killed one leaves behind goes when the next run locks the folder.
        partial = Path(filepath).with_name(f".checkpoint-{socket.gethostname()}-{os.getpid()}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, filepath)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise UserError(f"cannot write {filepath}: {error}; the checkpoints before it are whole") from error
        self._outdated.discard(str(filepath))
        while self._outdated:
            Path(self._outdated.pop()).unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Mark ``filepath`` for removal after the next :meth:`put`."""
        self._outdated.add(str(filepath))


register_backend("atomic", AtomicBackend, force=True)


def require_folder(work_dir: str | Path) -> None:
    """Make the folder ``work_dir``, if there is none.

    Raises:
        UserError: it cannot be made, or nothing can be written there.
    """
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise UserError(f"cannot write to work directory {work_dir}: {error.strerror}") from error


@contextlib.contextmanager
def lock(work_dir: str | Path, verb: str = "trains") -> Iterator[None]:
    """Keep other runs out of ``work_dir``; the system lifts the lock of a process that dies.

    Args:
        verb: what this run does there, for the message that another gets.

    Raises:
        UserError: another run uses the folder, or nothing can be written there.
    """
    # The system's lock is the process's: it would let a second run of this process in, and end with the first of both.
    folder = Path(work_dir).resolve()
    if folder in _locked:
        raise UserError(f"another run of this process uses {work_dir}: choose another --work-dir")
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(work_dir, _LOCK), "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock)
    except OSError as error:
        raise UserError(f"cannot write to work directory {work_dir}: {error}") from error
    with file:
        try:
            # Unlike flock's, this lock does not pass to data loading workers, which may outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            what, _, holder = file.read().strip().partition(": ")
            raise UserError(
                f"another run {what or 'works'} in {work_dir} ({holder}): choose another --work-dir"
            ) from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{verb}: process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        for partial in Path(work_dir).glob(".checkpoint*.partial"):
            partial.unlink(missing_ok=True)
        _locked.add(folder)
        try:
            yield
        finally:
            _locked.remove(folder)


def write_text(path: str | Path, text: str) -> None:
    """Replace the small text file ``path`` in one step.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a PyTorch checkpoint that holds tensors and plain Python values only.

    Args:
        path: a file, a folder, a URL or a repository, see :func:`backbones.weights.sources.locate`.
        map_location: see ``torch.load``.

    Raises:
        CheckpointError: no such file, a truncated or foreign file, or a pickle that holds other objects.
    """
    hint = "download it by hand and give its path"
    checkpoint = load(fetch(locate(str(path), ""), str(path), hint), map_location)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint


def select_state_dict(checkpoint: Mapping[str, Any], source: str | Path) -> Weights:
    """The weights of a checkpoint, without the prefixes that ``DistributedDataParallel`` and ``compile`` add.

    Raises:
        CheckpointError: there are none, or one stands there twice.
    """
    return select(checkpoint, f"checkpoint {source}", ("state_dict",), WRAPPERS)


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: str | Path, ignore: Sequence[str] = ()
) -> list[str]:
    """As :func:`backbones.weights.loading.load`; ``source`` says in the message where the weights come from."""
    try:
        return load_into(module, weights, ignore)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {source}: {error}") from None


def find_latest(work_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    mmengine's ``last_checkpoint`` is not written atomically and holds an absolute path, so it may be empty
    after a kill or stale after a move; then the highest epoch or iteration on disk counts.
    """
    folder = Path(work_dir)
    pointer = folder / "last_checkpoint"
    if pointer.is_file() and (name := Path(pointer.read_text().strip()).name):
        latest = folder / name
        if latest.is_file():
            return latest
    numbered = _numbered(folder)
    return max(numbered, key=lambda path: numbered[path]) if numbered else None


def find_before(checkpoint: str | Path) -> Path | None:
    """The newest checkpoint of the same run that is older than ``checkpoint`` and can be read, or None."""
    numbered = _numbered(Path(checkpoint).parent)
    last = numbered.get(Path(checkpoint))
    older = [path for path, number in numbered.items() if last is not None and number < last]
    for path in sorted(older, key=lambda path: -numbered[path]):
        with contextlib.suppress(CheckpointError):
            read_checkpoint(path)
            return path
    return None


def _numbered(folder: Path) -> dict[Path, int]:
    """Epoch or iteration of the checkpoints in ``folder``."""
    steps = {path: re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem) for path in folder.glob("*_*.pth")}
    return {path: int(match[1]) for path, match in steps.items() if match}


def to_plain(value: Any) -> Any:
    """Replace NumPy values and mmengine's histories by tensors and Python numbers, recursively.

    A plain checkpoint can be read with ``torch.load(path, weights_only=True)`` anywhere.
    """
    if isinstance(value, HistoryBuffer):
        history, count = value.data
        return {"history": torch.from_numpy(history), "count": torch.from_numpy(count)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item) for item in value)
    return value


def to_history(value: Any) -> Any:
    """Undo :func:`to_plain` for one of mmengine's histories."""
    if isinstance(value, dict) and value.keys() == {"history", "count"}:
        return HistoryBuffer(value["history"].cpu().numpy(), value["count"].cpu().numpy())
    return value
