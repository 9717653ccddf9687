"""ImageClassifier: any timm model, timm's mixup and losses, no silent initialisation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("mmengine")

from backbones.mm import ImageClassifier, ImagePreprocessor, UserError, WeightedCrossEntropy
from backbones.mm.engine.hooks import ClassWeightsHook

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


OURS = {"name": "vim_tiny", "img_size": 16, "depth": 3, "num_classes": 4}
PYRAMID = {"name": "groupmamba_tiny", "dims": (16, 24, 40, 80), "depths": (1, 1, 1, 1), "stem_dim": 8, "num_classes": 4}


def trained(model: ImageClassifier) -> set[str]:
    """Second and third part of the names of what a step trains."""
    side = 32 if model.name == PYRAMID["name"] else 16
    model.train()(torch.rand(2, 3, side, side), torch.tensor([0, 3]), mode="loss")["loss"].backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {".".join(name.split(".")[1:3]) for name in found}


@pytest.mark.parametrize(
    ("frozen_stages", "learning"),
    [
        (-1, {"patch_embed.proj", "blocks.0", "blocks.2"}),
        (0, {"blocks.0", "blocks.2"}),
        (2, {"blocks.2"}),
        ("all", set()),
    ],
)
def test_frozen_stages_of_a_plain_classifier(frozen_stages: int | str, learning: set[str]) -> None:
    model = ImageClassifier(network=OURS, loss=HARD, frozen_stages=frozen_stages)
    found = trained(model)
    assert found & {"patch_embed.proj", "blocks.0", "blocks.2"} == learning
    assert "head.weight" in found and model.network.head.training
    assert model.network.blocks[0].training == (frozen_stages in (-1, 0))
    assert not model.eval().network.head.training


@pytest.mark.parametrize(("frozen_stages", "count"), [(1, 1), (4, 4), ("all", 4)])
def test_frozen_stages_of_a_pyramid(frozen_stages: int | str, count: int) -> None:
    model = ImageClassifier(network=PYRAMID, loss=HARD, frozen_stages=frozen_stages)
    found = trained(model)
    assert {x for x in found if x.startswith("stages")} == {f"stages.{i}" for i in range(count, 4)}
    assert {x for x in found if x.startswith("downsamples")} == {f"downsamples.{i}" for i in range(count - 1, 3)}
    assert not any(x.startswith("stem") for x in found)
    assert "head.fc" in found and ("head.norm" in found) == (frozen_stages != "all")
    assert model.network.head.fc.training


def test_any_timm_model_may_be_probed_linearly() -> None:
    model = ImageClassifier(network=NETWORK, loss=HARD, frozen_stages="all")
    assert trained(model) == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match="frozen_stages: got 1, expected -1 or 'all': test_vit is not of this library"):
        ImageClassifier(network=NETWORK, loss=HARD, frozen_stages=1)


@pytest.mark.parametrize("frozen_stages", [4, -2, "none", True])
def test_stages_that_there_are_not(frozen_stages: Any) -> None:
    with pytest.raises(UserError, match=f"frozen_stages: got {frozen_stages!r}, expected a number within -1..3"):
        ImageClassifier(network=OURS, loss=HARD, frozen_stages=frozen_stages)
    with pytest.raises(UserError, match="'all', but vim_tiny has no classifier"):
        ImageClassifier(network={**OURS, "num_classes": 0}, loss=HARD, frozen_stages="all")


def test_norms_keep_their_statistics() -> None:
    network = {"name": "resnet18", "num_classes": 4}
    models = [ImageClassifier(network=network, loss=HARD, norm_eval=keep).train() for keep in (True, False)]
    assert [model.network.bn1.training for model in models] == [False, True]


def test_balanced_weights_are_pytorchs() -> None:
    loss = WeightedCrossEntropy("balanced", smoothing=0.1)
    logits, targets = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    with pytest.raises(UserError, match="counts the training images when"):
        loss(logits, targets)
    loss.count(torch.tensor([30, 10, 20]))
    weights = torch.tensor([60 / (3 * n) for n in (30, 10, 20)])
    expected = torch.nn.functional.cross_entropy(logits, targets, weights, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, targets), expected)
    torch.testing.assert_close(WeightedCrossEntropy(weights.tolist(), 0.1)(logits, targets), expected)
    assert not loss.state_dict()
    with pytest.raises(UserError, match="class 1 has none"):
        loss.count(torch.tensor([30, 0, 20]))
    with pytest.raises(UserError, match="got 2 numbers, the training data 3 classes"):
        WeightedCrossEntropy([1.0, 2.0]).count(torch.tensor([30, 10, 20]))
    for wrong in ("even", [], [1.0, -1.0]):
        with pytest.raises(UserError, match="class_weights: got"):
            WeightedCrossEntropy(wrong)


class Labels:
    """A data set of labels."""

    metainfo: ClassVar = {"classes": ("a", "b", "c", "d")}
    labels = (0, 1, 1, 2, 3, 3, 3, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def get_data_info(self, idx: int) -> dict[str, int]:
        return {"gt_label": self.labels[idx]}


def test_training_images_are_counted_when_training_begins() -> None:
    model = ImageClassifier(network=NETWORK, loss={"type": "WeightedCrossEntropy"})
    runner: Any = SimpleNamespace(model=model, train_dataloader=SimpleNamespace(dataset=Labels()))
    ClassWeightsHook().before_train(runner)
    assert model.criterion.weight.tolist() == [2.0, 1.0, 2.0, 0.5]
