"""Measures what this library computes, for every registered model, and writes backbones/zoo/measured.yml.

Parity: the recordings in tests/data are replayed through timm's route or as an OpenMMLab backbone, with weights in
the official layout; errors are against what the original computed. Compute: operations of one image, counted as the
papers count them by backbones.analysis.flops.

    python tools/certify.py [FAMILY ...] [--out FILE]

The other families keep what an earlier run measured: every family has the facts of its own run.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import timm
import torch
import yaml
from mmengine.logging import MMLogger
from torch import Tensor

from backbones import zoo
from backbones.analysis import flops
from backbones.models import family_names
from backbones.ops import dispatch, native

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tools are not installed

from tools import parity, recordings  # noqa: E402

HEADER = "# Written by tools/certify.py: what this library computes. Do not edit.\n"


def compute(name: str) -> dict[str, int]:
    """Cost of one image at the published size, see :class:`backbones.analysis.flops.Cost`."""
    model = cast(Any, timm.create_model(name, device="meta"))
    size = model.pretrained_cfg["input_size"][-1]
    cost = flops.count_model(model, (size, size)).total
    return {"size": size, "flops": cost.flops, "scan": cost.scan, "activations": cost.activations}


def replay_all(models: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """Errors against every recording of one of these models as a whole, by model."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, model in (parity.MODELS | parity.GUESTS).items():
        if model in models:
            found.setdefault(model, []).append(_replay(name, model))
    for name, config in parity.RECORDED.items():
        if config["arch"] in models:
            found.setdefault(config["arch"], []).append(_replay(name, config))
    return found


def _replay(name: str, model: str | dict[str, Any]) -> dict[str, Any]:
    recording = recordings.load(name)
    image = recording.image().requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        path = parity.official_file(Path(folder), recording)
        if isinstance(model, str):
            overlay = {"file": str(path)}
            args = parity.ARGUMENTS.get(name, {})
            logits = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()(image)
        else:
            maps = parity.build(model, path).eval()(image)
            logits = torch.cat([x.mean((-2, -1)) for x in maps], dim=1)
    logits.square().mean().backward()
    assert image.grad is not None
    expected, smooth = recording.arrays["logits"], slice(parity.KINKS.get(name, 0), None)
    gradient, reference = image.grad[smooth, :, 8:24, 8:24], recording.arrays["input_grad_crop"][smooth]
    error = logits.detach() - expected
    found = {
        "recording": name,
        "input": list(recording.input_shape),
        "logits_max_error": _rounded(error.abs().max()),
        "logits_relative_rms": _rounded(error.square().mean().sqrt() / expected.square().mean().sqrt()),
        "backend": dispatch.choose("selective_scan", None, "cpu", torch.float32),
    }
    if len(reference):
        found["gradient_max_error"] = _rounded((gradient - reference).abs().max() / reference.abs().max())
    return found


def _rounded(x: Tensor) -> float:
    return float(f"{x.item():.1e}")


def run_facts(family: str) -> dict[str, str]:
    """When, where and with what a family was measured."""
    kernel = "no C++" if native.unavailable_reason() else native.instruction_set()
    code = ["--", "backbones", ":!backbones/zoo"]
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    return {
        "command": f"python tools/certify.py {family}",
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("-dirty" if _git("status", "--porcelain", *code) else ""),
        "torch": str(torch.__version__),
        "device": f"{platform.machine()} CPU, {kernel} kernel, float32",
    }


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=False, capture_output=True, text=True).stdout.strip()


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families to measure, all unless given")
    parser.add_argument("--out", type=Path, default=ROOT / "backbones" / "zoo" / "measured.yml", help="file to write")
    args = parser.parse_args(argv)
    known = family_names(guests=True)
    if unknown := sorted({*args.families} - {*known}):
        parser.error(f"got {', '.join(unknown)}, expected some of {', '.join(known)}")
    if not args.out.parent.is_dir():
        print(f"certify.py: error: folder {args.out.parent} does not exist", file=sys.stderr)
        return 2
    MMLogger.get_current_instance().setLevel("WARNING")  # the names of weights that a backbone has no use for
    families = args.families or known
    measured = [name for family in families for name in zoo.load_family(family)["models"]]
    certified = replay_all(measured)
    fresh = {name: {"compute": compute(name), "parity": certified.get(name, [])} for name in measured}
    kept = zoo.load_measured() if args.families else {"runs": {}, "models": {}}
    runs, models = kept["runs"] | {family: run_facts(family) for family in families}, kept["models"] | fresh
    names = [name for family in known for name in zoo.load_family(family)["models"] if name in models]
    content = {
        "runs": {family: dict(runs[family]) for family in known if family in runs},
        "models": {name: models[name] for name in names},
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=200)
    args.out.write_text(HEADER + text, encoding="utf-8")
    print(f"{args.out}: {len(fresh)} of {len(models)} models, {sum(map(len, certified.values()))} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
