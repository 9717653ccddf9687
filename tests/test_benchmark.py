"""The benchmark: what it refuses, what it computes from its times, and the file that it writes."""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from backbones.commands import benchmark
from backbones.commands.bench import gpu, measure, models, operator, tokens
from backbones.commands.bench.shapes import SHAPES, Shape
from backbones.ops import native

needs_kernel = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
TINY = Shape("a test", 2, 2, 8, 5, 4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "a", TINY)
    monkeypatch.setattr(operator, "limits", lambda rounds: {"read bytes/s": 1e10, "exp2/s": 1e9})


def last(tables: Iterable[measure.Rows]) -> measure.Rows:
    """The whole of a table that grows."""
    *_, rows = tables
    return rows


def op_arguments(*extra: str):
    return benchmark.parse_args(["op", "--shapes", "a", "--rounds", "1", *extra])


@needs_kernel
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_agree_with_each_other(dtype: str) -> None:
    tables = operator.bench_op(op_arguments("--dtype", dtype), Progress(disable=True))
    rows = {row["backend"]: row for row in last(tables)}
    assert rows.keys() == {"textbook", "naive", "cpu", "cpu, window 4", "cpu, window 16"}
    assert rows["textbook"]["times textbook"] == 1 and rows["naive"]["times naive"] == 1
    row = rows["cpu"]
    assert row["times textbook"] == pytest.approx(rows["textbook"]["forward ms"] / row["forward ms"])
    assert row["backward over forward"] == pytest.approx(row["forward + backward ms"] / row["forward ms"] - 1)
    floor = TINY.floor(2 if dtype == "bfloat16" else 4, 1e10, 1e9)
    assert row["over the floor"] == pytest.approx(row["forward ms"] / 1e3 / floor)
    assert row["peak MiB forward"] is None


def test_the_floor_is_the_slower_of_memory_and_exponentials() -> None:
    # 2 * 5 tokens: u and y of 8 channels, delta of 2 * 8, B and C of 2 * 4 each; (4 + 2.2) exponentials of 160 steps.
    assert TINY.floor(4, 1.0, 1e99) == 10 * (8 + 8 + 16 + 16) * 4
    assert TINY.floor(4, 1e99, 1.0) == pytest.approx(160 * 6.2)


@needs_kernel
@pytest.mark.usefixtures("tiny")
def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operator.selective_scan

    def wrong(*args, backend, **kwargs):
        return right(*args, backend=backend, **kwargs) * (1.0001 if backend == "cpu" else 1)

    monkeypatch.setattr(operator, "selective_scan", wrong)
    monkeypatch.setattr(operator, "medians", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(measure.ParityError, match=r"cpu: not timed, its relative error of 1\.0e-04 exceeds 1e-05"):
        last(operator.bench_op(op_arguments(), Progress(disable=True)))


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, scan_backend: str | None = None) -> torch.nn.Module:
        return torch.nn.Identity() if scan_backend else torch.nn.Softmax(-1)

    monkeypatch.setattr(models.timm, "create_model", create)
    with pytest.raises(measure.ParityError, match="vim_tiny: not timed"):
        models.check_model("vim_tiny", torch.nn.Softmax(-1), torch.randn(2, 3), {})


def test_fewer_tokens_are_timed_beside_all_of_them() -> None:
    args = argparse.Namespace(names=["vim_tiny"], sizes=[64], batch=1, rounds=1)
    rows = last(tokens.bench_tokens(args, Progress(disable=True)))
    assert rows[0] | {"ms per image": 0} == {
        "model": "vim_tiny", "size": 64, "mode": "none", "tokens": 17, "operations": 1, "time": 1, "ms per image": 0
    }  # fmt: skip
    assert len({row["mode"] for row in rows}) == len(rows)
    assert [row["tokens"] for row in rows[1:5]] == [11, 9, 7, 5] and rows[4]["operations"] < rows[1]["operations"] < 1
    args.names = ["vmamba_tiny_s1l8"]
    with pytest.raises(measure.ParityError, match="vmamba_tiny_s1l8: not timed, it is not a plain model"):
        last(tokens.bench_tokens(args, Progress(disable=True)))


def test_what_is_not_timed_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(args, progress):
        raise measure.ParityError("cpu: not timed")

    monkeypatch.setattr(benchmark, "bench_op", refuse)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    assert benchmark.main(["op", "--threads", str(torch.get_num_threads())]) == 2
    assert capsys.readouterr().err == "cpu: not timed\n"


def test_what_is_measured_stands_in_the_file_before_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "op.csv"

    def read() -> list[dict[str, str]]:
        return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("# ")))

    def measure_twice_and_fail(args: argparse.Namespace, progress: Progress) -> Iterator[measure.Rows]:
        rows: measure.Rows = [{"model": "vim_tiny", "mode": "eager", "img_s": 1.0, "peak_mib": None}]
        yield rows
        assert read() == [{"model": "vim_tiny", "mode": "eager", "img_s": "1", "peak_mib": ""}]
        rows[0]["peak_mib"] = 5
        yield rows
        raise measure.ParityError("graphs: not timed")

    monkeypatch.setattr(benchmark, "bench_op", measure_twice_and_fail)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    assert benchmark.main(["op", "--threads", str(torch.get_num_threads()), "--csv", str(path)]) == 2
    assert read() == [{"model": "vim_tiny", "mode": "eager", "img_s": "1", "peak_mib": "5"}]
    printed = capsys.readouterr()
    assert "vim_tiny" in printed.out and printed.err == "graphs: not timed\n"


@pytest.mark.parametrize("arguments", [["op", "--shapes", "z"], ["op", "--rounds", "0"], ["model"], []])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse_args(arguments)
    assert "error: " in capsys.readouterr().err


def test_the_file_states_its_conditions(tmp_path: Path) -> None:
    path = tmp_path / "results" / "op.csv"
    facts = measure.conditions(op_arguments())
    assert facts.keys() >= {"cpu", "instruction set", "threads", "torch", "dtype", "commit"}
    benchmark.write_csv(path, [{"shape": "a", "forward ms": 1.23456, "peak": None}], facts)
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [f"# {key}: {value}" for key, value in facts.items()]
    assert list(csv.DictReader(lines[len(facts) :])) == [{"shape": "a", "forward ms": "1.23", "peak": ""}]


@needs_kernel
def test_exp2_of_the_kernel() -> None:
    x = torch.cat([torch.linspace(-140, 140, 20001), torch.tensor([0.0, -1e30, 1e30])])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, expected = native.exp2(x), torch.exp2(x.double())
    finally:
        torch.set_num_threads(before)
    normal = (expected > 2.0**-125) & (expected < 2.0**127)
    assert ((found.double() - expected).abs() / expected)[normal].max() < 2e-7  # 3 units of half a rounding
    assert found[-3:].tolist() == [1, 0, torch.inf]
    assert (found[expected < 2.0**-126] < 2.0**-125).all()


@needs_kernel
def test_limits_are_rates() -> None:
    found = measure.limits(1)
    assert all(1e7 < rate < 1e13 for rate in found.values())


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_the_output() -> None:
    shape = SHAPES["a"]
    output = shape.b * shape.length * shape.c * 4 / 2**20
    assert 0.8 * output <= measure.peak_memory("a", "float32", "cpu", backward=False) < 2 * output


def test_tables_of_models_fit_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    others = [name.split("_")[0] for name in models.COMPANIONS]
    row: dict[str, object] = {"model": "swin_tiny_patch4_window7_224"}
    for kind in models.KINDS:
        row |= {f"{kind} img/s": 12.5, **{f"{kind} over {other}": 0.125 for other in others}}
    monkeypatch.setattr(benchmark, "console", benchmark.Console(width=80))
    benchmark.show([row], {"threads": 2})
    printed = capsys.readouterr().out
    assert printed.count("swin_tiny_patch4_window7_224") == len(models.KINDS)
    for text in ("inference", "training", *others):
        assert text in printed, printed


class Scripted:
    """In place of a model on a GPU. Graphs of one compute something else, and training of another does not fit."""

    def __init__(self, name: str, mode: str, batch: int, size: int) -> None:
        self.name, self.mode, self.images = name, mode, range(batch)

    def ready(self, kind: str) -> Callable[[], object]:
        return getattr(self, kind)

    def infer(self) -> torch.Tensor:
        return torch.full((2, 3), 2.0 if (self.name, self.mode) == ("lbvim_tiny", "graphs") else 1.0)

    def train(self) -> None:
        if self.name == "vmamba_tiny_s1l8" and len(self.images) > gpu.HOST_BATCH:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nSee the documentation")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """A GPU that there is not; gives name, mode and batch of what is made, in this order."""
    made: list[tuple[str, str, int]] = []

    def contestant(name: str, mode: str, batch: int, size: int) -> Scripted:
        made.append((name, mode, batch))
        return Scripted(name, mode, batch, size)

    def kernels(call: Callable[[], object]) -> tuple[int, float]:
        call()
        return 7, 1.5

    monkeypatch.setattr(gpu, "Contestant", contestant)
    monkeypatch.setattr(gpu, "_kernels", kernels)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 20)
    return made


def copies(tables: Iterable[measure.Rows]) -> Iterator[dict[tuple[object, object], dict[str, object]]]:
    """Rows by model and mode, as they are when a table comes."""
    for rows in tables:
        yield {(row["model"], row["mode"]): dict(row) for row in rows}


def measured(row: dict[str, object]) -> int:
    """Cells that are not blank, but model and mode."""
    return sum(value is not None for value in row.values()) - 2


def test_models_on_a_gpu_are_complete_in_the_order_of_their_names(
    scripted: list[tuple[str, str, int]], capsys: pytest.CaptureFixture
) -> None:
    names = ["vim_tiny", "deit_tiny_patch16_224"]
    args = benchmark.parse_args(["gpu", *names, "--batch", "8"])
    host, turns, *alone = copies(args.run(args, Progress(disable=True, console=Console(stderr=True))))
    keys = [("vim_tiny", "eager"), ("vim_tiny", "graphs"), ("deit_tiny_patch16_224", "eager")]
    assert [[*table] for table in (host, turns, *alone)] == [keys] * 5
    assert [tuple(row) for row in host.values()] == [gpu.COLUMNS] * 3
    assert [measured(row) for row in host.values()] == [4] * 3  # launches and the host
    assert [measured(row) for row in turns.values()] == [6, 4, 6]  # eager mode's images a second
    assert [[measured(row) for row in table.values()] for table in alone] == [[9, 4, 6], [9, 9, 6], [9, 9, 9]]
    assert alone[-1][keys[1]]["peak_training_mib"] == 4 and alone[-1][keys[1]]["gpu_training_ms"] == 1.5
    assert scripted == [(*key, 2) for key in keys] + [(*keys[0], 8), (*keys[2], 8)] + [(*key, 8) for key in keys]
    assert re.search(r"^ +\d+ s  vim_tiny, graphs: first calls of 8 images in training$", capsys.readouterr().err, re.M)


@pytest.mark.usefixtures("scripted")
def test_what_cannot_be_measured_on_a_gpu_is_blank_and_said_to_be(capsys: pytest.CaptureFixture) -> None:
    args = benchmark.parse_args(["gpu", "lbvim_tiny", "vmamba_tiny_s1l8", "--batch", "8"])
    tables = copies(args.run(args, Progress(disable=True, console=Console(stderr=True))))
    kept: list[dict[tuple[object, object], dict[str, object]]] = []
    with pytest.raises(measure.ParityError, match=r"gpu: not timed, as said above: lbvim_tiny, graphs$"):
        kept.extend(tables)
    found = {key: measured(row) for key, row in kept[-1].items()}
    assert found == {
        ("lbvim_tiny", "eager"): 9, ("lbvim_tiny", "graphs"): 0,
        ("vmamba_tiny_s1l8", "eager"): 6, ("vmamba_tiny_s1l8", "graphs"): 6,
    }  # fmt: skip
    reasons = [line for line in capsys.readouterr().err.splitlines() if "not " in line]
    assert reasons[0].startswith("lbvim_tiny, graphs: not timed, its relative error")
    calls, peak, kernels = (
        f"{what} in training: not measured, CUDA out of memory."
        for what in ("first calls of 8 images", "peak memory", "time of the kernels")
    )
    for mode, expected in {"eager": [calls, peak, kernels], "graphs": [peak, calls, kernels]}.items():
        start = f"vmamba_tiny_s1l8, {mode}: "
        assert [line.removeprefix(start) for line in reasons if line.startswith(start)] == expected


def test_launches_and_the_host_alone(scripted: list[tuple[str, str, int]]) -> None:
    args = benchmark.parse_args(["host", "vim_tiny"])
    (rows,) = args.run(args, Progress(disable=True))
    assert [tuple(row) for row in rows] == [gpu.HOST_COLUMNS] * 2
    assert all(measured(row) == 4 for row in rows) and {batch for _, _, batch in scripted} == {gpu.HOST_BATCH}


def test_limits_are_shown_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.show([{"limit": "memory read", "value": 12.5, "unit": "GB/s"}], {"threads": 1})
    assert re.search(r"^ *memory read +12\.5 +GB/s$", capsys.readouterr().out, re.M)


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    "config, size",
    [
        ("coco/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py", (800, 1333)),
        ("coco/cascade-mask-rcnn_vim-tiny_simple-fpn_100e_coco-lsj.py", (1024, 1024)),
        ("coco/rtmdet_msvmamba-nano_300e_coco.py", (640, 640)),
        ("ade20k/upernet_vmamba-tiny-s1l8_160k_ade20k-512x512.py", (512, 512)),
    ],
)
def test_steps_have_the_size_of_the_config(config: str, size: tuple[int, int]) -> None:
    dense = pytest.importorskip("backbones.commands.bench.dense", exc_type=ImportError)
    loaded = dense.Config.fromfile(CONFIGS / config)
    assert tuple(dense._size(loaded.train_dataloader.dataset)) == size


@pytest.mark.parametrize(
    "config", ["mask-rcnn_vmamba-tiny-s1l8_fpn_digits.py", "upernet_efficientvmamba-tiny_digits.py"]
)
def test_a_training_step_of_a_detector_or_segmentor(config: str) -> None:
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    options = ["--device", "cpu", "--size", "64", "64", "--batch", "2", "--rounds", "1"]
    args = benchmark.parse_args(["dense", str(CONFIGS / "digits" / config), *options])
    (row,) = last(args.run(args, Progress(disable=True)))
    assert row["images"] == "2 x 64 x 64"
    assert row["images_s"] == pytest.approx(2e3 / row["step_ms"])


def test_a_config_that_does_not_exist_is_named() -> None:
    pytest.importorskip("mmengine")
    args = benchmark.parse_args(["dense", "nothing.py", "--device", "cpu"])
    with pytest.raises(measure.ParityError, match=r"no config nothing\.py"):
        last(args.run(args, Progress(disable=True)))


@pytest.mark.slow
def test_two_processes_against_one() -> None:
    options = ["--device", "cpu", "--size", "32", "--batch", "1", "--rounds", "1"]
    args = benchmark.parse_args(["scaling", "vim_tiny", *options])
    args.modes = ["eager", "sharded"]
    rows = last(args.run(args, Progress(disable=True)))
    assert [row["mode"] for row in rows] == ["eager", "sharded"]
    for row in rows:
        assert row["gpus"] == 2 and row["peak_mib"] is None  # known of GPUs alone
        assert row["speedup"] == pytest.approx(row["all_img_s"] / row["one_img_s"])


def test_graphs_on_a_cpu_are_refused() -> None:
    args = benchmark.parse_args(["scaling", "vim_tiny", "--device", "cpu", "--modes", "graphs"])
    with pytest.raises(measure.ParityError, match="graphs need a GPU"):
        last(args.run(args, Progress(disable=True)))


@pytest.mark.slow
def test_the_training_command_is_timed_beside_its_parts() -> None:
    pytest.importorskip("mmengine")
    arguments = ["training", "vim-narrow_digits", "--device", "cpu", "--workers", "2", "--batch", "2", "--steps", "2"]
    (row,) = last((args := benchmark.parse_args(arguments)).run(args, Progress(disable=True)))
    assert row["mode"] == "eager" and row["workers"] == 2
    assert 0 < row["read_ms"] < row["core_ms"]
    assert row["of_bare"] == pytest.approx(row["command_img_s"] / row["bare_img_s"])
    assert row["loader_img_s"] > 0


def test_the_loader_alone_trains_nothing() -> None:
    pytest.importorskip("mmengine")
    arguments = ["training", "vim-narrow_digits", "--loader-only", "--workers", "1", "--batch", "2", "--steps", "2"]
    (row,) = last((args := benchmark.parse_args(arguments)).run(args, Progress(disable=True)))
    assert row.keys() == {"mode", "workers", "jpeg_kib", "read_ms", "core_ms", "loader_img_s"}
    assert row["mode"] == "none" and 80 < row["jpeg_kib"] < 140  # as large as those of ImageNet


def test_training_that_reads_no_image_folder_is_refused() -> None:
    pytest.importorskip("mmdet.models")
    args = benchmark.parse_args(["training", "mask-rcnn_vmamba-tiny-s1l8_fpn_digits", "--device", "cpu"])
    with pytest.raises(measure.ParityError, match="does not train on an ImageFolder"):
        last(args.run(args, Progress(disable=True)))


def test_models_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"vim_tiny": 2.0, "vim_tiny amp": 1.0, "deit_tiny_patch16_224": 1.0, "deit_tiny_patch16_224 amp": 0.5}
    monkeypatch.setattr(models, "medians", lambda calls, *args: {name: seconds[name] for name in calls})
    command = ["model", "vim_tiny", "--against", "deit_tiny_patch16_224", "--size", "32", "--batch", "4", "--amp"]
    args = benchmark.parse_args(command)
    ours, other = last(models.bench_model(args, Progress(disable=True)))
    for kind in models.KINDS:
        assert ours[f"{kind} img/s"] == 4 and other[f"{kind} img/s"] == 8
        assert ours[f"{kind} over float32"] == other[f"{kind} over float32"] == 2
        assert ours[f"{kind} over deit"] == 0.5
    assert measure.conditions(args)["dtype"] == "bfloat16 autocast"
