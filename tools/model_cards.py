"""Writes what is generated from the zoo and the benchmarks: model cards, tables of the README and docs, metafiles.

python tools/model_cards.py            writes what is not up to date
python tools/model_cards.py --check    writes nothing; exit status 1 when something is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tools are not installed

from backbones.zoo import load_family  # noqa: E402
from tools.cards import benchmarks, facts  # noqa: E402
from tools.cards.accuracy import accuracy_picture  # noqa: E402
from tools.cards.card import card  # noqa: E402
from tools.cards.conditions import Results, conditions, read  # noqa: E402
from tools.cards.markdown import replace_block  # noqa: E402
from tools.cards.metafiles import metafiles  # noqa: E402
from tools.cards.pictures import catalogue_picture, orders_picture, same_picture  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def texts() -> dict[Path, str]:
    """Every generated text file, and every file with generated blocks, with the content it should have."""
    files = {ROOT / "model_cards" / f"{family}.md": card(family) for family in facts.families()}
    files |= metafiles(ROOT)
    blocks = {
        "README.md": {
            "types": facts.type_list(),
            "models": facts.model_table(),
            "speed": _summary(),
        },
        "docs/models.md": {"all-models": facts.full_model_table("../")},
        "docs/dense.md": {"channels": facts.channel_table()},
        "docs/benchmarks.md": _speed(),
    }
    return files | {ROOT / page: _with_blocks(ROOT / page, content) for page, content in blocks.items()}


def pictures() -> dict[Path, bytes]:
    """Every generated picture."""
    files = {
        ROOT / "model_cards" / f"{family}_orders.png": orders_picture(family)
        for family in facts.families()
        if load_family(family)["scan"]
    }
    docs = {"patterns": catalogue_picture(), "accuracy": accuracy_picture()}
    return files | {ROOT / "docs" / f"{name}.png": png for name, png in docs.items()}


def _result(name: str) -> Results:
    return read(RESULTS / f"{name}.csv")


def _summary() -> str:
    return benchmarks.summary_table([_result("models_cpu"), _result("models_cpu_1248")], _result("gpu_models"))


def _speed() -> dict[str, str]:
    cpu, cpu_models, cpu_long = _result("selective_scan_cpu"), _result("models_cpu"), _result("models_cpu_1248")
    cpu_half = _result("models_cpu_bf16")
    scans = [read(path) for path in sorted(RESULTS.glob("selective_scan_h200*.csv"))]
    convolution, long = _result("depthwise_conv_h200"), _result("long_sequence_h200")
    models, compiled, originals = (_result(f"{name}_h200") for name in ("models", "models_compiled", "originals"))
    launches = _result("gpu_models")
    dense = [_result("gpu_dense"), _result("gpu_dense_others")]
    tables = {
        "cpu": (benchmarks.cpu_table(cpu), [cpu]),
        "cpu-models": (benchmarks.cpu_model_table(cpu_models), [cpu_models]),
        "cpu-half": (benchmarks.cpu_model_table(cpu_half), [cpu_half]),
        "cpu-long": (benchmarks.cpu_model_table(cpu_long), [cpu_long]),
        "gpu-scan": (benchmarks.gpu_scan_table(scans), scans),
        "gpu-convolution": (benchmarks.gpu_convolution_table(convolution), [convolution]),
        "gpu-models": (benchmarks.gpu_model_table(models, originals), [models, originals]),
        "gpu-compiled": (benchmarks.gpu_compiled_table(compiled, originals), [compiled]),
        "gpu-launches": (benchmarks.gpu_launches_table(launches), [launches]),
        "gpu-ratios": (benchmarks.gpu_ratio_table(launches), [launches]),
        "gpu-dense": (benchmarks.gpu_dense_table(dense), dense),
        "gpu-long": (benchmarks.long_sequence_table(long), [long]),
    }
    return {name: f"{text}\n\n{conditions(files, ROOT, '../')}" for name, (text, files) in tables.items()}


def _with_blocks(path: Path, blocks: dict[str, str]) -> str:
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        text = replace_block(text, name, content)
    return text


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = []
    for path, text in texts().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for path, png in pictures().items():
        if not same_picture(path, png):
            stale.append(path)
            if not check:
                path.write_bytes(png)
    for path in stale:
        state = "is not up to date, run `make docs`" if check else "written"
        print(f"{path.relative_to(ROOT)}: {state}", file=sys.stderr if check else sys.stdout)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
