"""The zoo files: complete, in agreement with the models, and with what is measured beside what is reported."""

import re
from importlib.resources import files

import pytest
import timm
import torch

from backbones import zoo
from backbones.analysis import flops
from backbones.models import family_names
from tests import tolerances
from tools import recordings
from tools.parity import GUESTS, MODELS, RECORDED

FACTS = [
    (family, model, facts)
    for family in family_names(guests=True)
    for model, facts in zoo.load_family(family)["models"].items()
]


@pytest.mark.parametrize(("family", "name", "facts"), FACTS, ids=[name for _, name, _ in FACTS])
def test_facts_agree_with_the_model(family: str, name: str, facts: dict) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    cfg = model.pretrained_cfg
    assert cfg["input_size"][1:] == (facts.get("size", 224),) * 2
    for field, kind in (("classifier", torch.nn.Linear), ("first_conv", torch.nn.Conv2d)):
        names = [cfg[field]] if isinstance(cfg[field], str) else cfg[field]
        assert all(isinstance(model.get_submodule(x), kind) for x in names)

    measured = zoo.load_measured()["models"][name]["compute"]
    cost = flops.count_model(model, (measured["size"], measured["size"])).total
    assert (cost.flops, cost.scan, cost.activations) == (measured["flops"], measured["scan"], measured["activations"])


@pytest.mark.parametrize("family", family_names(guests=True))
def test_every_registered_model_has_facts(family: str) -> None:
    facts = zoo.load_family(family)
    assert set(timm.list_models(module=family)) == facts["models"].keys() | facts.get("aliases", {}).keys()


@pytest.mark.parametrize("family", family_names(guests=True))
def test_configurations_need_nothing_of_what_they_leave_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = zoo.default_cfgs(family)
    monkeypatch.setattr(zoo, "_FOR_CARDS", re.compile(r"(?!)"))
    assert found == zoo.default_cfgs(family)


def test_every_recording_is_certified_within_its_tolerance() -> None:
    measured = zoo.load_measured()["models"]
    assert measured.keys() == {name for _, name, _ in FACTS}
    certified = {row["recording"]: (name, row) for name, facts in measured.items() for row in facts["parity"]}
    expected = MODELS | GUESTS | {recording: config["arch"] for recording, config in RECORDED.items()}
    assert {recording: name for recording, (name, _) in certified.items()} == expected
    for name, row in certified.values():
        recorded = recordings.load_arrays(row["recording"])[0]["logits"]
        assert row["logits_max_error"] <= tolerances.logits_limit(name, recorded)
        assert row.get("gradient_max_error", 0.0) <= tolerances.gradient_limit(name)


@pytest.mark.parametrize("family", family_names(guests=True))
def test_what_is_reported_names_its_source(family: str) -> None:
    for name, facts in zoo.load_family(family)["models"].items():
        results = facts.get("reported", {}).values()
        rows = [row for result in results for row in (result if isinstance(result, list) else [result])]
        assert all(row["source"] for row in rows), name
        assert len(facts.get("weights", {}).keys() & {"url", "page", "hf_hub_id"}) <= 1


# Copied a second time, from the authors' READMEs and papers: top-1 of ImageNet in percent, and their GFLOPs.
SECOND_SOURCE: dict[str, tuple[float, float | None]] = {
    "vim_tiny": (76.1, None),
    "vim_tiny_stride8": (78.3, None),
    "vim_small": (80.5, None),
    "vim_small_stride8": (81.6, None),
    "vim_base": (81.9, None),
    "vanilla_vmamba_tiny": (82.2, 5.6),
    "vanilla_vmamba_small": (83.5, 11.2),
    "vanilla_vmamba_base": (83.7, 18.0),
    "vmamba_tiny_s2l5": (82.5, 4.9),
    "vmamba_small_s2l15": (83.6, 8.7),
    "vmamba_base_s2l15": (83.9, 15.4),
    "vmamba_tiny_s1l8": (82.6, 4.9),
    "vmamba_small_s1l20": (83.3, 8.6),
    "vmamba_base_s1l20": (83.8, 15.2),
    "msvmamba_nano": (77.3, 0.9),
    "msvmamba_micro": (79.8, 1.5),
    "msvmamba_tiny": (82.8, 4.6),
    "msvmambav3_tiny": (83.0, 5.0),
    "msvmambav3_small": (84.1, 8.8),
    "msvmambav3_base": (84.4, 16.3),
    "efficientvmamba_tiny": (76.5, 0.8),
    "efficientvmamba_small": (78.7, 1.3),
    "efficientvmamba_base": (81.8, 4.0),
    "groupmamba_tiny": (83.3, 4.6),
    "groupmamba_small": (83.9, 7.0),
    "groupmamba_base": (84.5, 14.0),
    "spatialmamba_tiny": (83.5, 4.5),
    "spatialmamba_small": (84.6, 7.1),
    "spatialmamba_base": (85.3, 15.8),
    "localvim_tiny": (76.2, None),
    "localvim_tiny_midcls": (77.8, None),
    "localvim_tiny_unsearched": (75.8, None),
    "localvim_small": (81.2, None),
    "localvim_small_unsearched": (81.0, None),
    "localvmamba_tiny": (82.7, 5.7),
    "localvmamba_small": (83.7, 11.4),
    "plainmamba_l1": (77.9, None),
    "plainmamba_l2": (81.6, None),
    "plainmamba_l3": (82.3, None),
    "vssd_micro": (82.5, 2.3),
    "vssd_tiny": (83.6, 4.5),
    "vssd_small": (84.1, 7.4),
    "vssd_base": (84.7, 16.1),
    "adventurer_tiny": (78.2, None),
    "adventurer_small": (81.8, None),
    "adventurer_base": (82.6, None),
    "adventurer_base_patch8": (83.9, None),
    "adventurer_large": (83.4, None),
    "efficientvim_m1": (72.9, 0.239),
    "efficientvim_m2": (75.4, 0.355),
    "efficientvim_m3": (77.6, 0.656),
    "efficientvim_m4": (79.4, 1.111),
    "efficientvim_m1_dist": (74.6, None),
    "efficientvim_m2_dist": (76.7, None),
    "efficientvim_m3_dist": (79.1, None),
    "efficientvim_m4_dist": (80.7, None),
}


def test_published_figures_agree_with_a_second_source() -> None:
    found = {
        name: (figures["top1"], figures.get("gflops"))
        for family in family_names(guests=True)
        for name, entry in zoo.load_family(family)["models"].items()
        if (figures := entry.get("reported", {}).get("imagenet", {}))
    }
    assert found == SECOND_SOURCE


def test_files_are_called_by_the_accuracy_that_is_reported() -> None:
    """Vim's are, such as vim_t_midclstok_76p1acc.pth."""
    for name, entry in zoo.load_family("vim")["models"].items():
        stated = re.findall(r"(\d+)p(\d)acc", str(entry))
        assert {float(f"{whole}.{tenth}") for whole, tenth in stated} == {SECOND_SOURCE[name][0]}, name


def test_a_figure_from_memory_is_no_fact() -> None:
    folder = files("backbones.zoo")
    for family in family_names(guests=True):
        assert not re.search(r"[\[(]mem[\])]", folder.joinpath(f"{family}.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"colour": 1}, r"x\.yml: unknown fields \['colour'\], missing fields \['size'\]"),
        ({"size": "large"}, r"x\.yml, size: got 'large', expected <class 'int'>"),
        ({"size": 1, "rows": [{"a": 1.0}, {"a": "b"}]}, r"x\.yml, rows, a: got 'b', expected"),
        ([], r"x\.yml: got \[\], expected <class 'dict'>"),
    ],
)
def test_unknown_missing_and_mistyped_fields_are_named(content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo._check("x.yml", content, {"size": int, "rows?": [{"a": float}]})
