"""Every model against what its original computes, loaded through timm's own route from a file in the official
layout."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from tests import recordings, tolerances
from tests.recordings import Recording

MODELS = {
    "vim_tiny_224": "vim_tiny",
    "vim_small_224": "vim_small",
    "vim_tiny_stride8_224": "vim_tiny_stride8",
}


def official_file(folder: Path, recording: Recording) -> Path:
    """A training state as the authors' scripts write it."""
    path = folder / "checkpoint.pth"
    state = {"model": recording.weights(), "epoch": 299, "args": argparse.Namespace(lr=1e-3)}
    torch.save(state, path)
    return path


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_input_gradients(name: str, backend: str, tmp_path: Path) -> None:
    recording = recordings.load(name)
    overlay = {"file": str(official_file(tmp_path, recording))}
    model = timm.create_model(
        MODELS[name], pretrained=True, pretrained_cfg_overlay=overlay, scan_backend=backend
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == recording.parameters

    image = recording.image().requires_grad_()
    logits = model(image)
    logits.square().mean().backward()
    group = model.__class__.__name__ == "GroupMamba"
    torch.testing.assert_close(
        logits.detach(),
        recording.arrays["logits"],
        rtol=0,
        atol=tolerances.GROUPMAMBA_LOGITS if group else tolerances.LOGITS,
    )
    limit = tolerances.GROUPMAMBA_INPUT_GRADIENT if group else tolerances.INPUT_GRADIENT
    assert relative(image.grad[:, :, 8:24, 8:24], recording.arrays["input_grad_crop"]) <= limit
    assert image.grad.norm().item() == pytest.approx(recording.arrays["input_grad_norm"].item(), rel=limit)
