"""ImageClassifier: any timm model, timm's mixup and losses, no silent initialisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("mmengine")

from backbones.mm import ImageClassifier, ImagePreprocessor, UserError

NETWORK = {"name": "test_vit", "img_size": 16, "patch_size": 8, "num_classes": 4}
HARD = {"type": "LabelSmoothingCrossEntropy", "smoothing": 0.1}
SOFT = {"type": "SoftTargetCrossEntropy"}
MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


@pytest.mark.parametrize("name, near", [("resnet81", "resnet18"), ("vim_tinny", "tiny"), ("", "")])
def test_unknown_network_suggests_near_names(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown model '{name}'.*{near}"):
        ImageClassifier(network={"name": name}, loss=HARD)


def test_misspelt_argument_is_refused() -> None:
    with pytest.raises(UserError, match="dorp_path_rate"):
        ImageClassifier(network={**NETWORK, "dorp_path_rate": 0.1}, loss=HARD)


def test_modes_agree() -> None:
    model = ImageClassifier(network=NETWORK, loss=HARD).eval()
    inputs, targets = torch.rand(3, 3, 16, 16), torch.tensor([0, 3, 1])
    logits = model(inputs)
    assert logits.shape == (3, 4)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(model(inputs, targets, mode="loss")["loss"], expected)
    predictions = model(inputs, targets, mode="predict")
    torch.testing.assert_close(torch.stack([p["scores"] for p in predictions]), logits.softmax(1))
    assert [int(p["target"]) for p in predictions] == [0, 3, 1]
    assert "target" not in model(inputs, mode="predict")[0]
    with pytest.raises(ValueError, match="mode is 'train'"):
        model(inputs, mode="train")


def test_pretrained_weights_survive_mmengine(tmp_path: Path) -> None:
    source = timm.create_model(**{("model_name" if k == "name" else k): v for k, v in NETWORK.items()})
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    overlay: dict[str, Any] = {
        "file": str(file),
        "num_classes": 4,
        "input_size": (3, 16, 16),
        "fixed_input_size": False,
    }
    model = ImageClassifier(network={**NETWORK, "pretrained": True, "pretrained_cfg_overlay": overlay}, loss=HARD)
    model.init_weights()  # what the Runner calls before training
    for name, value in source.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value), name


@pytest.mark.parametrize("length", [1, 3, 4])
def test_every_label_of_a_mixed_batch_is_smoothed(length: int) -> None:
    mixup = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.2, "mode": "batch"}
    preprocessor = ImagePreprocessor(mixup=mixup, num_classes=4)
    targets = torch.tensor([2, 2, 2, 2])[:length]  # a mixture of one class is that class
    batch = preprocessor({"inputs": torch.rand(length, 3, 4, 4), "targets": targets}, training=True)
    torch.testing.assert_close(batch["targets"], torch.tensor([[0.05, 0.05, 0.85, 0.05]]).expand(length, 4))


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixup_mixes_pairs_and_labels_alike(length: int, mode: str) -> None:
    np.random.seed(0)
    preprocessor = ImagePreprocessor(mixup={"mixup_alpha": 1.0, "label_smoothing": 0.0, "mode": mode}, num_classes=8)
    # Image i is constant i, so that its mean tells what it was mixed from.
    targets = torch.arange(length)
    inputs = targets.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    mixed = preprocessor({"inputs": inputs.clone(), "targets": targets}, training=True)
    assert mixed["targets"].shape == (length, 8)
    torch.testing.assert_close(mixed["targets"].sum(1), torch.ones(length))
    means = mixed["targets"] @ torch.arange(8.0)
    torch.testing.assert_close(mixed["inputs"].mean(dim=(1, 2, 3)), means)
    assert (means[: length // 2 * 2] != targets[: length // 2 * 2]).any() == (length > 1)
    plain = preprocessor({"inputs": inputs, "targets": targets}, training=False)
    assert torch.equal(plain["inputs"], inputs)
    assert torch.equal(plain["targets"], targets)


def test_mixup_trains_with_soft_labels() -> None:
    model = ImageClassifier(network=NETWORK, loss=SOFT, data_preprocessor={"mixup": MIXUP})
    data = model.data_preprocessor({"inputs": torch.rand(5, 3, 16, 16), "targets": torch.arange(5) % 4}, True)
    assert data["targets"].shape == (5, 4)
    model(**data, mode="loss")["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("loss, preprocessor", [(HARD, {"mixup": MIXUP}), (SOFT, None)])
def test_loss_must_go_with_mixup(loss: dict[str, Any], preprocessor: dict[str, Any] | None) -> None:
    with pytest.raises(UserError, match="mixup"):
        ImageClassifier(network=NETWORK, loss=loss, data_preprocessor=preprocessor)
