"""Every model against what its original computes, through timm's own route, from a file in the official layout."""

import copy
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


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_input_gradients(name: str, backend: str, tmp_path: Path) -> None:
    hold(name, MODELS[name], tmp_path, scan_backend=backend)


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
    smooth = slice(KINKS.get(name, 0), None)
    found, expected = image.grad[smooth, :, 8:24, 8:24], recording.arrays["input_grad_crop"][smooth]
    if len(expected):
        assert relative(found, expected) <= limit
    if name not in KINKS:
        assert image.grad.norm().item() == pytest.approx(recording.arrays["input_grad_norm"].item(), rel=limit)
    if "logits64" in recording.arrays:
        hold_in_double_precision(model, recording)


def hold_in_double_precision(model: nn.Module, recording: recordings.Recording) -> None:
    """Holds logits, or means of maps, and gradients against the recording's run in float64."""
    double, arrays = copy.deepcopy(model).double(), recording.arrays
    image = recording.image().double().requires_grad_()
    logits = double(image)
    logits = logits if isinstance(logits, torch.Tensor) else torch.cat([x.mean((-2, -1)) for x in logits], dim=1)
    logits.square().mean().backward()
    error = (logits.detach() - arrays["logits64"]).abs().max()
    assert error <= tolerances.DOUBLE_LOGITS * arrays["logits64"].std()
    limit = tolerances.DOUBLE_INPUT_GRADIENT
    assert relative(image.grad[:, :, 8:24, 8:24], arrays["input_grad_crop64"]) <= limit
    assert image.grad.norm().item() == pytest.approx(arrays["input_grad_norm64"].item(), rel=limit)
