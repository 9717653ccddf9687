"""mmengine's FlopAnalyzer against backbones.analysis.flops, which is held against the authors' counts."""

import pytest
import timm
from mmengine.analysis import get_model_complexity_info

import backbones.mm  # noqa: F401  (teaches mmengine's counters)
from backbones.analysis.flops import count
from backbones.models import family_names


@pytest.mark.parametrize("module", family_names())
def test_flops_are_those_of_our_own_counter(module: str) -> None:
    name = min(timm.list_models("*tiny*", module=module) or timm.list_models(module=module), key=len)
    model = timm.create_model(name).eval()
    found = get_model_complexity_info(model, (3, 224, 224), show_table=False, show_arch=False)
    expected = count(name, 224).total
    assert found["flops"] == pytest.approx(expected.flops, rel=1e-3)
    assert found["params"] == expected.parameters
