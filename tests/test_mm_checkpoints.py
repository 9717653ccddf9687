"""backbones.mm.engine.checkpoints: whole files, safe reading, complete loading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer

from backbones.mm.engine import checkpoints
from backbones.mm.errors import UserError
from backbones.weights import CheckpointError


@pytest.fixture
def backend() -> checkpoints.AtomicBackend:
    return get_file_backend(backend_args={"backend": "atomic"})


def test_failed_write_leaves_the_old_file(
    backend: checkpoints.AtomicBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    backend.put(b"old", path)

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(UserError, match=r"cannot write .*last\.pth: no space"):
            backend.put(b"new", path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]
    assert path.read_bytes() == b"old"
    backend.put(b"new", path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]
    assert path.read_bytes() == b"new"


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.txt"
    checkpoints.write_text(path, "old")
    write = Path.write_text

    def full(file: Path, text: str, **_: object) -> None:
        write(file, text[:1])
        raise OSError("disk full")

    for owner, function, failing in (
        (os, "replace", lambda source, target: full(source, "n")),
        (Path, "write_text", full),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, failing)
            with pytest.raises(UserError, match=r"cannot write .*best\.txt: disk full"):
                checkpoints.write_text(path, "new")
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["best.txt"]
    checkpoints.write_text(path, "new")
    assert path.read_text() == "new"


def test_names_that_stand_there_twice_are_refused() -> None:
    for wrapper in ("module.", "_orig_mod.", "module._orig_mod."):
        content = {"state_dict": {"a.weight": torch.zeros(1), f"{wrapper}a.weight": torch.ones(1)}}
        with pytest.raises(CheckpointError, match=rf"x\.pth: expected every weight once, got a\.weight and {wrapper}a"):
            checkpoints.select_state_dict(content, "x.pth")


@pytest.mark.parametrize("value", [torch.zeros(3, dtype=torch.int8), torch.full((3,), torch.nan)])
def test_values_that_no_weight_has_are_refused(value: torch.Tensor) -> None:
    model = nn.Linear(2, 3)
    weights = {**model.state_dict(), "bias": value}
    with pytest.raises(CheckpointError, match=r"checkpoint x\.pth: .*(bias int8, expected float32|not finite: bias)"):
        checkpoints.load_weights(model, weights, "x.pth")


def test_removal_waits_for_the_next_whole_file(
    backend: checkpoints.AtomicBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = str(tmp_path / "epoch_1.pth"), str(tmp_path / "epoch_2.pth")
    backend.put(b"1", first)
    backend.remove(first)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(UserError, match="killed"):
        backend.put(b"2", second)
    assert Path(first).exists()
    monkeypatch.undo()
    # Another instance, as CheckpointHook uses one to remove and one to write.
    get_file_backend(backend_args={"backend": "atomic"}).put(b"2", second)
    assert not Path(first).exists()
    backend.remove(second)
    backend.put(b"2 again", second)
    assert Path(second).read_bytes() == b"2 again"


def test_plain_values_survive_a_weights_only_file(tmp_path: Path) -> None:
    history = HistoryBuffer([0.5, 0.25], [1, 2])
    state = {
        "loss": history,
        "score": np.float64(0.5),
        "palette": [np.arange(3)],
        "name": "x",
        "pair": (1, None),
    }
    torch.save(checkpoints.to_plain(state), tmp_path / "plain.pth")
    read = checkpoints.read_checkpoint(tmp_path / "plain.pth")
    restored = checkpoints.to_history(read["loss"])
    assert isinstance(restored, HistoryBuffer)
    for expected, actual in zip(history.data, restored.data, strict=True):
        np.testing.assert_array_equal(actual, expected)
    restored.update(0.125)
    assert read["score"] == 0.5
    assert read["palette"][0].tolist() == [0, 1, 2]
    assert (read["name"], read["pair"]) == ("x", (1, None))
    assert checkpoints.to_history({"history": 1}) == {"history": 1}


class Foreign:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-was-run",)


def test_unreadable_files_are_named_and_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = Path("whole.pth")
    torch.save({"state_dict": {"weight": torch.zeros(100)}}, whole)
    Path("truncated.pth").write_bytes(whole.read_bytes()[:-200])
    Path("empty.pth").touch()
    Path("text.pth").write_text("<html>")
    torch.save({"state_dict": Foreign()}, "foreign.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(CheckpointError, match=r"foreign\.pth: refused, it needs the class .*mkdir"):
        checkpoints.read_checkpoint("foreign.pth")
    for name in ("truncated.pth", "empty.pth", "text.pth", "foreign.pth", "list.pth", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            checkpoints.read_checkpoint(name)
    assert not Path("code-was-run").exists()


@pytest.mark.parametrize("content", [{"model": {"weight": torch.zeros(1)}}, {"state_dict": {"weight": 1}}])
def test_file_without_weights_lists_its_entries(content: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.pth.*{next(iter(content))}"):
        checkpoints.select_state_dict(content, "x.pth")


def test_misfits_are_named_and_the_model_is_untouched() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {f"module.{name}": value + 1 for name, value in before.items()}
    weights["module.1.weight"] = torch.zeros(5, 3)
    weights["module.head"] = weights.pop("module.0.bias")
    weights = checkpoints.select_state_dict({"state_dict": weights}, "x.pth")
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_weights(model, weights, "x.pth")
    for word in ("x.pth", "0.bias", "head", "1.weight", "(5, 3)", "(4, 3)"):
        assert word in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ignored_modules_keep_their_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = model[1].weight.clone()
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    weights["1.weight"] = torch.zeros(5, 3)
    assert checkpoints.load_weights(model, weights, "x.pth", ignore=["1"]) == ["1.weight"]
    assert torch.equal(model[0].weight, weights["0.weight"])
    assert torch.equal(model[1].weight, before)


def test_latest_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.find_latest(tmp_path) is None
    for name in ("epoch_2.pth", "epoch_10.pth", "best_accuracy_top1_epoch_11.pth", "epoch_x.pth"):
        (tmp_path / name).touch()
    pointer = tmp_path / "last_checkpoint"
    assert checkpoints.find_latest(tmp_path) == tmp_path / "epoch_10.pth"
    pointer.touch()  # killed between truncation and writing
    assert checkpoints.find_latest(tmp_path) == tmp_path / "epoch_10.pth"
    pointer.write_text("/another/machine/epoch_2.pth")  # the run was moved
    assert checkpoints.find_latest(tmp_path) == tmp_path / "epoch_2.pth"
    pointer.write_text("/another/machine/epoch_11.pth")  # killed before the file was complete
    assert checkpoints.find_latest(tmp_path) == tmp_path / "epoch_10.pth"


def test_a_second_run_is_told_of_the_first_and_a_dead_one_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-host-1.partial").write_bytes(b"half")
    code = f"""
from backbones.mm.engine.checkpoints import lock
with lock({str(tmp_path)!r}):
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        message = rf"another run trains in .* \(process {other.pid} on .* since "
        with pytest.raises(UserError, match=message), checkpoints.lock(tmp_path):
            pass
        other.kill()
    with checkpoints.lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".run.lock").read_text()
    assert [file.name for file in tmp_path.iterdir()] == [".run.lock"]


def test_two_runs_of_one_process_are_kept_apart(tmp_path: Path) -> None:
    with checkpoints.lock(tmp_path):
        message = "another run of this process uses"
        with pytest.raises(UserError, match=message), checkpoints.lock(tmp_path / "." / "x" / ".."):
            pass
    with checkpoints.lock(tmp_path):
        pass


def test_a_work_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write to work directory .*file/run"),
        checkpoints.lock(tmp_path / "file/run"),
    ):
        pass
