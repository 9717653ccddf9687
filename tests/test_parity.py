"""Every model against what its original computes, through timm's own route, from a file in the official layout."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from backbones.layers import set_backend
from tests import tolerances
from tools import recordings
from tools.parity import ARGUMENTS, GUESTS, KINKS, MODELS, official_file, relative

# Of a generation that a smaller model of the same blocks stands for.
LARGE = ("_small", "_base", "stride8", "lbvim_300", "msvmamba_tiny", "vssd_tiny")


def slow_if_large(names: Iterable[str]) -> list[Any]:
    """``names`` of recordings, the large models among them for the slow tests."""
    return [pytest.param(x, marks=pytest.mark.slow) if any(part in x for part in LARGE) else x for x in names]


@pytest.mark.parametrize("name", slow_if_large(MODELS))
def test_logits_and_input_gradients(name: str, tmp_path: Path) -> None:
    hold(name, MODELS[name], tmp_path)


@pytest.mark.parametrize(
    "name", [x if x == "vim_tiny_224" else pytest.param(x, marks=pytest.mark.slow) for x in MODELS]
)
def test_naive_alone(name: str, tmp_path: Path) -> None:
    hold(name, MODELS[name], tmp_path, scan_backend="naive")


@pytest.mark.parametrize("name", GUESTS)
def test_models_of_timm(name: str, tmp_path: Path) -> None:
    hold(name, GUESTS[name], tmp_path)


def hold(name: str, architecture: str, tmp_path: Path, **kwargs: Any) -> None:
    """Holds a model that timm builds with ``kwargs`` against its recording."""
    recording = recordings.load(name)
    overlay = {"file": str(official_file(tmp_path, recording))}
    model = timm.create_model(
        architecture,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **ARGUMENTS.get(name, {}),
        **kwargs,
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == recording.parameters

    image = recording.image().requires_grad_()
    logits = model(image)
    logits.square().mean().backward()
    group = name.startswith("groupmamba")
    recorded, found = recording.arrays["logits"], logits.detach()
    limit = tolerances.logits_limit(name, recorded)
    if group:
        # Record and model round differently, and by as much as the limit: each is held against exact arithmetic.
        double = copy.deepcopy(model).double()
        set_backend(double, "naive")
        exact = double(image.detach().double()).detach().float()
        torch.testing.assert_close(recorded, exact, rtol=0, atol=limit)
        recorded = exact
    torch.testing.assert_close(found, recorded, rtol=0, atol=limit)
    limit = tolerances.gradient_limit(name)
    norm_limit = limit if name not in KINKS else tolerances.KINK_GRADIENT
    for i, (found, expected) in enumerate(
        zip(image.grad[:, :, 8:24, 8:24], recording.arrays["input_grad_crop"], strict=True)
    ):
        assert relative(found, expected) <= (limit if i >= KINKS.get(name, 0) else tolerances.KINK_GRADIENT)
    assert image.grad.norm().item() == pytest.approx(recording.arrays["input_grad_norm"].item(), rel=norm_limit)
    if "logits64" in recording.arrays:
        hold_in_double_precision(model, recording)


def hold_in_double_precision(model: nn.Module, recording: recordings.Recording) -> None:
    """Holds logits, or means of maps, and gradients against the recording's run in float64."""
    double, arrays = copy.deepcopy(model).double(), recording.arrays
    set_backend(double, "naive")  # which alone has double precision
    image = recording.image().double().requires_grad_()
    logits = double(image)
    logits = logits if isinstance(logits, torch.Tensor) else torch.cat([x.mean((-2, -1)) for x in logits], dim=1)
    logits.square().mean().backward()
    error = (logits.detach() - arrays["logits64"]).abs().max()
    assert error <= tolerances.DOUBLE_LOGITS * arrays["logits64"].std()
    limit = tolerances.DOUBLE_INPUT_GRADIENT
    assert relative(image.grad[:, :, 8:24, 8:24], arrays["input_grad_crop64"]) <= limit
    assert image.grad.norm().item() == pytest.approx(arrays["input_grad_norm64"].item(), rel=limit)
