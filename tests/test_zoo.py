"""The zoo files: complete, and in agreement with the models."""

import pytest
import timm
import torch

import backbones
from backbones import zoo

FACTS = [
    (family, model, facts) for family in backbones.__all__ for model, facts in zoo.load_family(family)["models"].items()
]


@pytest.mark.parametrize(("family", "name", "facts"), FACTS, ids=[name for _, name, _ in FACTS])
def test_facts_agree_with_the_model(family: str, name: str, facts: dict) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 224, 224)
    for field, kind in (("classifier", torch.nn.Linear), ("first_conv", torch.nn.Conv2d)):
        names = [cfg[field]] if isinstance(cfg[field], str) else cfg[field]
        assert all(isinstance(model.get_submodule(x), kind) for x in names)


@pytest.mark.parametrize("family", backbones.__all__)
def test_every_registered_model_has_facts(family: str) -> None:
    assert set(timm.list_models(module=family)) == zoo.load_family(family)["models"].keys()


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"x\.yml: unknown fields \['colour'\], missing fields \['size'\]"):
        zoo._check("x.yml", {"colour": 1}, {"size": True})
