"""What DenseBackbone takes from a weight file: all of the backbone, nothing around it, and real values alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine")

from mmengine.logging import MMLogger
from mmengine.registry import MODELS

import backbones.mm  # noqa: F401  (registers the backbones)
from backbones.models import FAMILIES, GUESTS
from backbones.weights import CheckpointError, rules
from tests.small_models import SMALLEST, is_plain, smallest_of

SMALL = {
    **{
        family.__name__: (name, {**SMALLEST[name], **({"img_size": 64} if is_plain(name) else {})})
        for family in FAMILIES
        for name in [smallest_of(family)]
    },
    "EfficientViM": ("efficientvim_m1", {"depths": (1, 1, 1), "embed_dim": (8, 16, 24), "state_dim": (4, 3, 2)}),
}


def test_every_family_is_here() -> None:
    assert SMALL.keys() == {family.__name__ for family in (*FAMILIES, *GUESTS)}


def build(family: str, **kwargs: object) -> nn.Module:
    arch, args = SMALL[family]
    indices = {"out_indices": (0, 1)} if "depth" in args else {}
    return MODELS.build({"type": family, "arch": arch, "model_args": args, **indices, **kwargs})


def official_dense(family: str, backbone: nn.Module) -> dict[str, Tensor]:
    """As the authors' dense models have it: norms of the outputs beside the backbone's own names."""
    model = backbone.model
    weights = {name.removeprefix("model."): x for name, x in backbone.state_dict().items() if name.startswith("model.")}
    norms = {name: x for name, x in backbone.state_dict().items() if name.startswith("out_norms.")}
    if family == "GroupMamba":
        weights |= {name.replace("out_norms.3", "head.norm"): x for name, x in norms.items()}
        return rules.to_official(weights, model.key_rules)
    mark = {"PlainMamba": "norm_layer"}.get(family, "outnorm_" if "depth" in SMALL[family][1] else "outnorm")
    named = {f"{mark}{name.removeprefix('out_norms.')}": x for name, x in norms.items()}
    official = rules.to_official(weights, model.key_rules)  # classifiers of PlainMamba have a prefix of their own
    return {name.removeprefix("backbone."): x for name, x in official.items()} | named


def randomised(backbone: nn.Module) -> nn.Module:
    with torch.no_grad():
        for x in backbone.parameters():
            x.copy_(torch.randn_like(x))
    return backbone


@pytest.mark.parametrize("layout", ["ours", "official"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize("family", SMALL)
def test_a_detector_gives_its_backbone(
    family: str, prefix: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = randomised(build(family)), build(family)
    inner = source.state_dict() if layout == "ours" else official_dense(family, source)
    weights = {prefix + name: x for name, x in inner.items()}
    if prefix:
        start = prefix.removesuffix("backbone.")
        weights |= {f"{start}neck.conv.weight": torch.zeros(1), f"{start}head.bias": torch.full((1,), torch.nan)}
    torch.save({"state_dict": weights}, tmp_path / "detector.pth")
    lines: list[str] = []
    monkeypatch.setattr(MMLogger.get_current_instance(), "info", lambda text, *args: lines.append(text % args))
    target.load_pretrained(str(tmp_path / "detector.pth"))
    assert all(torch.equal(x, target.state_dict()[name]) for name, x in source.state_dict().items())
    said = [line for line in lines if line.startswith("outside the backbone: ")]
    assert said == (["outside the backbone: head.bias, neck.conv.weight"] if prefix else [])
    assert not any("left fresh" in line for line in lines)


CHANGES: dict[str, Callable[[dict[str, Tensor], str], None]] = {
    r"unknown: .*extra\.bias": lambda w, name: w.update({"extra.bias": torch.zeros(1)}),
    "missing: ": lambda w, name: w.pop(name),
    r"misshapen: ": lambda w, name: w.update({name: w[name][:-1]}),
    r"of another type: .* int8, expected float32": lambda w, name: w.update({name: w[name].to(torch.int8)}),
    r"of another type: .* bool, expected float32": lambda w, name: w.update({name: w[name] > 0}),
    r"of another type: .* complex64, expected": lambda w, name: w.update({name: w[name].to(torch.complex64)}),
    r"these are not finite: ": lambda w, name: w.update({name: w[name] * torch.nan}),
    r"expected every weight once, got ": lambda w, name: w.update({f"backbone.{name}": w[name]}),
}


@pytest.mark.parametrize("words", CHANGES)
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("family", SMALL)
def test_what_does_not_fit_is_named(family: str, prefix: str, words: str, tmp_path: Path) -> None:
    source, target = randomised(build(family)), build(family)
    before = {name: x.clone() for name, x in target.state_dict().items()}
    weights = dict(source.state_dict())
    name = next(key for key, x in source.model.named_parameters() if x.dim() == 2)
    CHANGES[words](weights, f"model.{name}")
    torch.save({"state_dict": {prefix + key: x for key, x in weights.items()}}, tmp_path / "weights.pth")
    if prefix and "once" in words:  # the copy stands in a backbone of the backbone
        words = r"expected every weight once|unknown|missing"
    with pytest.raises(CheckpointError, match=words):
        target.load_pretrained(str(tmp_path / "weights.pth"))
    assert all(torch.equal(x, target.state_dict()[key]) for key, x in before.items())


@pytest.mark.parametrize("family", [name for name in SMALL if name != "EfficientViM"])  # its authors have none
def test_output_norms_that_are_there_must_fit(family: str, tmp_path: Path) -> None:
    source, target = randomised(build(family)), build(family)
    weights = dict(source.state_dict())
    name = next(key for key in weights if key.startswith("out_norms."))
    weights[name] = torch.zeros(7)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"misshapen: {name} \(7,\)"):
        target.load_pretrained(str(tmp_path / "weights.pth"))


def test_outputs_of_a_plain_model_are_counted_by_position(tmp_path: Path) -> None:
    arch, args = SMALL["Vim"]
    args = {**args, "depth": 4}
    source = randomised(build("Vim", model_args=args, out_indices=(1, 3)))
    model = timm.create_model(arch, device="meta", **args)
    inner = {name.removeprefix("model."): x for name, x in source.state_dict().items() if name.startswith("model.")}
    norms = {
        f"outnorm_{position}.{kind}": source.state_dict()[f"out_norms.{i}.{kind}"]
        for position, i in enumerate((1, 3))
        for kind in ("weight", "bias")
    }
    torch.save(rules.to_official(inner, model.key_rules) | norms, tmp_path / "weights.pth")
    target = build("Vim", model_args=args, out_indices=(1, 3))
    target.load_pretrained(str(tmp_path / "weights.pth"))
    assert all(torch.equal(x, target.state_dict()[name]) for name, x in source.state_dict().items())
    # A projection before the norm belongs to models that we do not have.
    torch.save(rules.to_official(inner, model.key_rules) | {"out_map_0.weight": torch.zeros(1)}, tmp_path / "map.pth")
    with pytest.raises(CheckpointError, match=r"unknown: .*out_maps\.1\.weight"):
        target.load_pretrained(str(tmp_path / "map.pth"))


@pytest.mark.parametrize("options", [{"out_indices": (0, 2)}, {"out_indices": (3, 1)}, {"out_norm": False}])
@pytest.mark.parametrize("family", [x.__name__ for x in FAMILIES if "depths" in SMALL[x.__name__][1]])
def test_a_classifier_gives_any_outputs(family: str, options: dict, tmp_path: Path) -> None:
    """Its last norm goes to the output that it stands behind in the family's dense models, and else nowhere."""
    arch, args = SMALL[family]
    source = randomised(timm.create_model(arch, **args))
    torch.save(rules.to_official(source.state_dict(), source.key_rules), tmp_path / "weights.pth")
    target = build(family, **options)
    target.load_pretrained(str(tmp_path / "weights.pth"))
    for name, x in target.model.state_dict().items():
        assert torch.equal(x, source.state_dict()[name])
    for index, norm in target.out_norms.items():
        last = family == "GroupMamba" and index == "3"
        expected = source.head.norm if last else build(family, **options).out_norms[index]
        assert torch.equal(norm.weight, expected.weight)
