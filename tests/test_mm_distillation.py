"""Teachers: another network, or the model's own average; and weights to start from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmengine")

from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor

from backbones.mm import HardDistillation, ImageClassifier, UserError
from backbones.mm.models.classifier import create_network
from backbones.mm.models.dense import fetch_weights
from backbones.weights import CheckpointError
from backbones.weights.rules import to_official

TEACHER = {"name": "test_efficientnet", "num_classes": 5}
STUDENT = {"name": "groupmamba_tiny", "num_classes": 5, "depths": (1, 1, 1, 1), "dims": (16, 16, 16, 32), "stem_dim": 8}
LOSS = {"type": "LabelSmoothingCrossEntropy", "smoothing": 0.0}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": create_network(**TEACHER).state_dict()}, path)
    return str(path)


def student(checkpoint: str, **kwargs: Any) -> HardDistillation:
    teacher = {**TEACHER, "checkpoint": checkpoint}
    return MODELS.build({"type": "HardDistillation", "network": STUDENT, "loss": LOSS, "teacher": teacher, **kwargs})


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 40, 33), torch.tensor([0, 4, 2])


def test_the_teacher_labels_the_second_classifier(teacher_file: str) -> None:
    model = student(teacher_file, alpha=0.3)
    model.init_weights()
    inputs, targets = batch()
    teacher = create_network(**TEACHER).eval()
    teacher.load_state_dict(torch.load(teacher_file)["model"])
    labels = teacher(inputs).argmax(1)
    first, second = model.network(inputs)
    losses = model(inputs, targets, mode="loss")
    assert losses.keys() == {"loss_label", "loss_teacher"}
    # The batch norms of the stem use the statistics of the batch, the same in both passes.
    torch.testing.assert_close(losses["loss_label"], 0.7 * F.cross_entropy(first, targets))
    torch.testing.assert_close(losses["loss_teacher"], 0.3 * F.cross_entropy(second, labels))


def test_a_teacher_of_this_library_may_stand_in_its_authors_layout(tmp_path: Path) -> None:
    """Also with a position embedding for another grid; and what does not fit is named."""
    args = {"name": "vim_tiny", "num_classes": 5, "depth": 1, "embed_dim": 16}
    source = create_network(**args, img_size=(32, 96))
    path = tmp_path / "teacher.pth"
    torch.save({"model": to_official(source.state_dict(), source.key_rules)}, path)
    model = MODELS.build(
        {
            "type": "HardDistillation",
            "network": STUDENT,
            "loss": LOSS,
            "teacher": {**args, "img_size": (32, 96), "checkpoint": str(path)},
        }
    )
    model.init_weights()
    assert all(torch.equal(x, model.teacher.network.state_dict()[name]) for name, x in source.state_dict().items())

    torch.save({"model": source.state_dict()}, path)
    model.teacher_cfg["img_size"] = (64, 64)
    model.init_weights()
    assert model.teacher.network.pos_embed.shape[1] == 17
    torch.save({"model": {**source.state_dict(), "head.bias": torch.full((5,), torch.nan)}}, path)
    model.teacher_cfg["img_size"] = (32, 96)
    with pytest.raises(CheckpointError, match=r"not finite: head.bias"):
        model.init_weights()


def test_the_teacher_stays_frozen_and_apart(teacher_file: str) -> None:
    model = student(teacher_file)
    model.init_weights()
    teacher = model.teacher.network
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    model.train()
    sum(model(*batch(), mode="loss").values()).backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert not any("teacher" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    # EMAHook copies the whole model.
    assert copy.deepcopy(model).teacher is model.teacher


def test_testing_needs_no_teacher() -> None:
    model = student("nowhere.pth").eval()
    scores = model(*batch(), mode="predict")
    assert torch.stack([x["scores"] for x in scores]).shape == (3, 5)


def test_a_pair_of_logits_counts_with_its_mean() -> None:
    model = MODELS.build({"type": "ImageClassifier", "network": STUDENT, "loss": LOSS}).train()
    inputs, targets = batch()
    mean = F.cross_entropy(model.network(inputs), targets)
    torch.testing.assert_close(model(inputs, targets, mode="loss")["loss"], mean)
    model.network.set_distilled_training()
    first, second = model.network(inputs)
    torch.testing.assert_close(F.cross_entropy((first + second) / 2, targets), mean)
    torch.testing.assert_close(model(inputs, targets, mode="loss")["loss"], mean)


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        ({"checkpoint": "nowhere.pth"}, UserError, "no weight file at nowhere.pth"),
        ({"num_classes": 7}, UserError, "test_efficientnet has 7 classes, the network 5"),
        ({"name": "test_resnet"}, CheckpointError, "the weights do not fit ResNet; missing"),
        ({"name": "test_efficientnett"}, UserError, "did you mean test_efficientnet"),
    ],
)
def test_a_bad_teacher_is_an_error(
    teacher: dict[str, Any], error: type[Exception], message: str, teacher_file: str
) -> None:
    model = student(teacher_file, teacher={**TEACHER, "checkpoint": teacher_file, **teacher})
    with pytest.raises(error, match=message):
        model.init_weights()


def test_what_hard_distillation_needs(teacher_file: str) -> None:
    with pytest.raises(UserError, match="teacher: checkpoint missing"):
        student(teacher_file, teacher=TEACHER)
    with pytest.raises(UserError, match="alpha: got 2, expected a weight within 0 and 1"):
        student(teacher_file, alpha=2)
    with pytest.raises(UserError, match="the teacher has no weights yet"):
        student(teacher_file).train()(*batch(), mode="loss")
    single = student(teacher_file, network={**STUDENT, "distillation": False})
    single.init_weights()
    with pytest.raises(UserError, match="groupmamba_tiny has one classifier; hard distillation trains two"):
        single.train()(*batch(), mode="loss")


NETWORK = {"name": "test_vit", "img_size": 16, "patch_size": 8, "num_classes": 3, "drop_path_rate": 0.0}


def self_distillation(folder: Path, model: str = "SelfDistillation") -> Runner:
    images = [{"inputs": torch.randn(3, 16, 16), "targets": i % 3} for i in range(4)]
    return Runner(
        model={
            "type": model,
            "network": NETWORK,
            "loss": LOSS,
            **({"weight": 2.0} if model != "ImageClassifier" else {}),
        },
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 2,
            "dataset": images,
            "sampler": {"type": "DefaultSampler"},
            "collate_fn": {"type": "collate_images"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 3},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        custom_hooks=[{"type": "SelfDistillationHook", "start_epoch": 1, "momentum": 0.5}],
        default_hooks={"logger": None, "checkpoint": None},
        experiment_name=f"{folder.name}_{model}",
        log_level="ERROR",
    )


def test_the_average_teaches_from_its_epoch_on(tmp_path: Path) -> None:
    runner = self_distillation(tmp_path)
    model, inputs, targets, seen = runner.model, torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2]), []
    step = model.train_step

    def train_step(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen.append((runner.epoch, sorted(name for name in model(inputs, targets, mode="loss"))))
        return step(*args, **kwargs)

    model.train_step = train_step
    runner.train()
    both = ["loss_label", "loss_teacher"]
    assert seen == [(0, ["loss_label"])] * 2 + [(1, both)] * 2 + [(2, both)] * 2

    teacher = model.teacher.network
    assert not teacher.training
    assert not any(
        torch.equal(x, y) for x, y in zip(teacher.parameters(), model.network.parameters(), strict=True) if x.ndim > 1
    )
    model.eval()
    logits, soft = model.network(inputs), teacher(inputs).softmax(1)
    expected = -2.0 * (soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model(inputs, targets, mode="loss")["loss_teacher"], expected)
    assert not any("teacher" in name for name in model.state_dict())


def test_the_hook_wants_its_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model is ImageClassifier, not SelfDistillation"):
        self_distillation(tmp_path, "ImageClassifier").train()


def test_a_classifier_starts_from_a_file(tmp_path: Path) -> None:
    """As the models with overlapping patches do, at another grid and with other classes."""
    small = {"name": "vim_tiny", "depth": 2, "embed_dim": 16, "img_size": 32, "num_classes": 3}
    source = create_network(**small)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    network = {**small, "name": "vim_tiny_stride8", "stride": 8}
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")}
    model = ImageClassifier(network=network, loss=LOSS, init_cfg=init)
    model.init_weights()
    assert torch.equal(model.network.head.weight, source.head.weight)
    assert model.network.pos_embed.shape[1] == 10 != source.pos_embed.shape[1]


def test_published_weights_are_fetched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo, file, **_: f"{repo}/{file}")
    monkeypatch.setattr("timm.models._hub.download_cached_file", lambda url, **_: url.rsplit("/", 1)[-1])
    assert fetch_weights("published:vim_tiny", "vim_tiny_stride8").endswith("vim_t_midclstok_76p1acc.pth")
    assert fetch_weights("published", "vmamba_tiny_s1l8") == "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    assert fetch_weights("https://example.org/x.pth", "vim_tiny") == "x.pth"
    with pytest.raises(UserError, match=r"by hand from https://drive\.google.*set checkpoint to a file in init_cfg"):
        fetch_weights("published", "spatialmamba_tiny")
    with pytest.raises(UserError, match="its authors released no weights"):
        fetch_weights("published", "lbvim_tiny")
    with pytest.raises(UserError, match="there is no model 'vim_tinny'"):
        fetch_weights("published:vim_tinny", "vim_tiny")


def test_other_networks_bring_their_own_weights() -> None:
    init = {"type": "Pretrained", "checkpoint": "published"}
    model = ImageClassifier(network=NETWORK, loss=LOSS, init_cfg=init)
    with pytest.raises(UserError, match="test_vit is not of this library"):
        model.init_weights()
