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
