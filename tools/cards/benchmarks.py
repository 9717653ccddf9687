"""Tables of speed, from the CSV files of ``benchmarks/results``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .conditions import Results
from .markdown import table

# What the shapes of the GPU benchmarks are taken from.
_SCANS = {
    "a": "Vim-Ti at 224 x 224, batch 128",
    "d": "Vim-Ti at 1248 x 1248, batch 1",
    **{f"b1s{i}": f"VMamba-T (s1l8) stage {i}, batch 128" for i in range(1, 5)},
    "b16": "VMamba-T of the first generation, stage 1, batch 32",
}
_CONVOLUTIONS = {
    "vim": "Vim-Ti at 224 x 224, 4 causal taps, batch 128",
    "vim1248": "Vim-Ti at 1248 x 1248, 4 causal taps, batch 1",
    **{f"s{i}": f"VMamba-T stage {i}, 3 x 3, batch 128" for i in range(1, 5)},
    "msv7": "MSVMamba, 7 x 7 with stride 2 on 56 x 56 x 96, batch 128",
}
_ATTENTION = {"": "", "scaled_dot_product_attention": "fused", "explicit": "explicit"}
_PAIRS = (("vim_tiny", "deit_tiny_patch16_224"), ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"))
_SPEEDS = ("inference_img_s", "training_img_s")


def cpu_table(results: Results) -> str:
    """The ``cpu`` backend's times, and how many times longer the others take."""
    forward, both = "forward ms", "forward + backward ms"
    results.need("shape", "of", "backend", forward, both)
    by_shape: dict[str, dict[str, dict[str, str]]] = {}
    for row in results.rows:
        by_shape.setdefault(row["shape"], {})[row["backend"]] = row
    rows = []
    for backends in by_shape.values():
        cpu = backends["cpu"]
        rows.append(
            [
                cpu["of"],
                cpu[forward],
                *(_over(backends.get(name, {}).get(forward), cpu[forward]) for name in ("textbook", "naive")),
                cpu[both],
                _over(backends.get("naive", {}).get(both), cpu[both]),
            ]
        )
    header = ["layer", "forward [ms]", "a textbook loop takes", "`naive` takes"]
    return table([*header, "forward and backward [ms]", "`naive` takes"], rows)


def _over(value: str | None, unit: str | None) -> str | None:
    """A ratio as "2.5x", with as many digits as are worth reading; None where one of the two was not measured."""
    if not value or not unit:
        return None
    ratio = float(value) / float(unit)
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def gpu_scan_table(files: Iterable[Results]) -> str:
    """The ``triton`` backend beside the official CUDA kernels, bfloat16, one output for each order."""
    kinds = ("forward_ms", "forward_backward_ms")
    rows: dict[str, list[object]] = {}
    for results in files:
        results.need("shape", "dtype", "out", "deterministic", *kinds, *(f"official_{kind}" for kind in kinds))
        for row in results.rows:
            if (row["dtype"], row["out"], row["deterministic"]) == ("bf16", "per_order", "False"):
                rows[row["shape"]] = _beside(row, kinds, "official_")
    header = ["layer", "forward [ms]", "original", "speed-up", "forward and backward [ms]", "original", "speed-up"]
    return table(header, _named(rows, _SCANS))


def gpu_convolution_table(results: Results) -> str:
    """The depthwise convolution's kernel beside cuDNN, bfloat16."""
    kinds = ("forward_ms", "forward_backward_ms")
    results.need("shape", "dtype", *kinds, *(f"cudnn_{kind}" for kind in kinds))
    rows = {row["shape"]: _beside(row, kinds, "cudnn_") for row in results.rows if row["dtype"] == "bfloat16"}
    header = ["layer", "forward [ms]", "cuDNN", "speed-up", "forward and backward [ms]", "cuDNN", "speed-up"]
    return table(header, _named(rows, _CONVOLUTIONS))


def _beside(row: Mapping[str, str], kinds: Sequence[str], other: str) -> list[object]:
    """For each kind of time: ours, the other's, and how many times as long the other takes."""
    return [cell for kind in kinds for cell in (row[kind], row[other + kind], _over(row[other + kind], row[kind]))]


def _named(rows: Mapping[str, list[object]], titles: Mapping[str, str]) -> list[list[object]]:
    """Rows in the order of the titles of their shapes; shapes without a title come last."""
    shapes = [*(shape for shape in titles if shape in rows), *sorted(rows.keys() - titles.keys())]
    return [[titles.get(shape, shape), *rows[shape]] for shape in shapes]


def gpu_model_table(results: Results, originals: Results) -> str:
    """Images per second of whole models in eager mode and as a CUDA graph, and of the originals in eager mode."""
    results.need("model", *_SPEEDS, *(f"graph_{name}" for name in _SPEEDS), "training_peak_mib")
    originals.need("model", *_SPEEDS, "training_peak_mib")
    official = {row["model"]: row for row in originals.rows}
    rows = []
    for row in results.rows:
        other = official.get(row["model"], {})
        cells = [x for name in _SPEEDS for x in (row[name], row[f"graph_{name}"], other.get(name))]
        memory = [row["training_peak_mib"], other.get("training_peak_mib")]
        rows.append([f"`{row['model']}`", *map(_whole, [*cells, *memory])])
    header = [
        "model",
        "inference [images/s]",
        "CUDA graph",
        "original",
        "training [images/s]",
        "CUDA graph",
        "original",
    ]
    return table([*header, "memory in training [MiB]", "original"], rows)


def gpu_compiled_table(results: Results, originals: Results) -> str:
    """Images per second of models under ``torch.compile``, and how many times as many as the originals'."""
    results.need("model", "mode", *_SPEEDS, "batch1_ms")
    official = {row["model"]: row for row in originals.rows}
    rows = []
    for row in results.rows:
        if row["mode"] == "graphs":
            other = official.get(row["model"], {})
            cells = [x for name in _SPEEDS for x in (_whole(row[name]), _over(row[name], other.get(name)))]
            rows.append([f"`{row['model']}`", *cells, f"{float(row['batch1_ms']):.2g}"])
    header = ["model", "inference [images/s]", "over the original", "training [images/s]", "over the original"]
    return table([*header, "latency of one image [ms]"], rows)


def gpu_launches_table(results: Results) -> str:
    """Launches, the host's time and images per second of whole models, in eager mode and with CUDA graphs."""
    columns = {
        "launches_inference": "launches in inference",
        "launches_training": "in training",
        "host_inference_ms": "host in inference [ms]",
        "host_training_ms": "in training [ms]",
        "gpu_training_ms": "GPU in training [ms]",
        "inference_img_s": "inference [images/s]",
        "training_img_s": "training [images/s]",
        "peak_training_mib": "memory in training [MiB]",
    }
    results.need("model", "mode", *columns)
    columns = {name: title for name, title in columns.items() if any(row[name] for row in results.rows)}
    modes = {"graphs": "CUDA graphs"}
    rows = [
        [f"`{row['model']}`", modes.get(row["mode"], row["mode"]), *(row[name] for name in columns)]
        for row in results.rows
    ]
    return table(["model", "mode", *columns.values()], rows)


def gpu_ratio_table(results: Results) -> str:
    """Eager mode over a Swin Transformer, and a training step with CUDA graphs over the time of its kernels."""
    columns = {
        "host_inference_ms": "host in inference",
        "host_training_ms": "in training",
        "inference_img_s": "inference [images/s]",
        "training_img_s": "training [images/s]",
    }
    results.need("model", "mode", "gpu_training_ms", *columns)
    found = {(row["model"], row["mode"]): row for row in results.rows}
    swin = found["swin_tiny_patch4_window7_224", "eager"]
    rows = []
    for (model, mode), row in found.items():
        graphs = found.get((model, "graphs"))
        if mode == "eager" and graphs is not None:
            step = 1e3 * int(results.arguments["batch"]) / float(graphs["training_img_s"])
            ratios = [f"{float(row[name]) / float(swin[name]):.2f}" for name in columns]
            rows.append([f"`{model}`", *ratios, f"{step / float(graphs['gpu_training_ms']):.2f}"])
    return table(["model", *columns.values(), "a step with CUDA graphs over its kernels"], rows)


def gpu_dense_table(files: Iterable[Results]) -> str:
    """A training step of detectors and segmentors, as their configs have it."""
    columns = {
        "step_ms": "training step [ms]",
        "images_s": "training [images/s]",
        "peak_mib": "memory in training [MiB]",
    }
    rows = []
    for results in files:
        results.need("config", "images", *columns)
        rows += [[f"`{row['config']}`", row["images"], *(row[name] for name in columns)] for row in results.rows]
    return table(["config", "images", *columns.values()], rows)


def long_sequence_table(results: Results) -> str:
    """Models on large images: times of a batch, and memory."""
    columns = ("inference_ms", "graph_inference_ms", "training_ms", "inference_peak_mib", "training_peak_mib")
    results.need("model", "batch", "attention", *columns)
    rows = []
    for row in results.rows:
        name = re.sub(r"^\w+", lambda match: f"`{match[0]}`", row["model"])
        cells = [row[column] if column.endswith("_ms") else _whole(row[column]) for column in columns]
        rows.append([name, _ATTENTION.get(row["attention"], row["attention"]), row["batch"], *cells])
    header = ["model", "attention", "batch", "inference [ms]", "CUDA graph [ms]", "training step [ms]"]
    return table([*header, "memory in inference [MiB]", "in training [MiB]"], rows)


def cpu_model_table(results: Results) -> str:
    """Images per second of whole models on a CPU, and those in bfloat16 over those in float32 where both were timed."""
    results.need("model", "inference img/s", "training img/s")
    columns = [f"{kind} {what}" for kind in ("inference", "training") for what in ("img/s", "over float32")]
    columns = [column for column in columns if column in results.rows[0]]
    titles = [x.replace("img/s", "[images/s]") if "img/s" in x else "over float32" for x in columns]
    rows = [
        [f"`{row['model']}`", *(row[column] + "x" * ("over" in column) for column in columns)] for row in results.rows
    ]
    return table(["model", *titles], rows)


def summary_table(cpu: Iterable[Results], gpu: Results) -> str:
    """Images per second of two models over those of timm's, in inference and in training."""
    rows: list[list[object]] = []
    for results in cpu:
        for model, other in _PAIRS:
            columns = [f"{kind} over {other.partition('_')[0]}" for kind in ("inference", "training")]
            for row in results.rows:
                if row["model"] == model and columns[0] in row:
                    where = f"CPU, float32, {_batch(results)}"
                    rows.append([f"`{model}`", f"`{other}`", where, *(f"{float(row[x]):.2f}x" for x in columns)])
    chip = re.sub(r"^NVIDIA (\w+).*", r"\1", gpu.facts["gpu"])
    where = f"{chip}, {gpu.facts['dtype'].split()[0]}, {_batch(gpu)}"
    modes: dict[str, dict[str, tuple[str, str]]] = {"eager": {}, "graphs": {}}
    for row in gpu.rows:
        speeds = (row["inference_img_s"], row["training_img_s"])
        if all(speeds):  # the file may hold rows that were not measured to their end
            modes.setdefault(row["mode"], {})[row["model"]] = speeds
    rows += _ratios(modes["eager"], modes["eager"], where)
    for ours, theirs in _PAIRS:
        if ours in modes["graphs"]:
            alike = theirs in modes["graphs"]
            how = "CUDA graphs" if alike else "CUDA graphs against eager mode"
            rows += _ratios({ours: modes["graphs"][ours]}, modes["graphs" if alike else "eager"], f"the same, {how}")
    return table(["model", "compared with", "on", "inference", "training"], rows)


def _batch(results: Results) -> str:
    size = results.arguments["size"]
    return f"{size} x {size} pixels, batch {results.arguments['batch']}"


def _ratios(ours: Mapping[str, Sequence[str]], theirs: Mapping[str, Sequence[str]], where: str) -> list[list[object]]:
    """A row for each pair of models that were measured."""
    rows: list[list[object]] = []
    for model, other in _PAIRS:
        if model in ours and other in theirs:
            ratios = (f"{float(x) / float(y):.2f}x" for x, y in zip(ours[model], theirs[other], strict=True))
            rows.append([f"`{model}`", f"`{other}`", where, *ratios])
    return rows


def _whole(value: str | None) -> str | None:
    return None if not value else f"{float(value):.0f}"
