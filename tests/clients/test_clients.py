"""Other people's programs on our models: each does its ordinary job on the smallest model of every generation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import unprunable
from backbones.layers import SelectiveSSM
from tests.small_models import SMALLEST, create_shallow, create_small, images, is_plain
from tests.tolerances import SAME_FUNCTION

# The programs' own warnings are not ours to hold.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
HIERARCHICAL = [name for name in SMALLEST if not is_plain(name)]


@pytest.fixture(params=SMALLEST)
def name(request: pytest.FixtureRequest) -> str:
    """One model of every generation of every family."""
    return request.param


def create(name: str) -> nn.Module:
    """The narrow one, but where its gates would have a single channel."""
    return (create_shallow if name.startswith("groupmamba") else create_small)(name)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


def linear_names(model: nn.Module) -> list[str]:
    classifiers = model.get_classifier()
    left = {id(x) for x in (classifiers if isinstance(classifiers, tuple) else (classifiers,))}
    return [key for key, x in model.named_modules() if isinstance(x, nn.Linear) and id(x) not in left]


@torch.no_grad()
@pytest.mark.parametrize("hierarchy", HIERARCHICAL)
def test_segmentation_models_pytorch(hierarchy: str) -> None:
    """A U-Net reads the maps of the model's four stages. Plain models give one stride and are no encoders."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    unet = smp.Unet(f"tu-{hierarchy}", encoder_weights=None, encoder_depth=5, classes=2, **SMALLEST[hierarchy]).eval()
    assert unet(images()).shape == (2, 2, 64, 64)
    model = create_small(hierarchy).eval()
    given = unet.encoder.model.model.state_dict()
    model.load_state_dict({**model.state_dict(), **given})
    maps = model.forward_intermediates(images(), intermediates_only=True)
    for found, expected in zip(unet.encoder(images())[-len(maps) :], maps, strict=True):
        close(found, expected)


def test_pytorch_grad_cam(name: str) -> None:
    """The map of a class is ReLU of the layer's channels, weighed by the mean of their gradients."""
    cam = pytest.importorskip("pytorch_grad_cam")
    model = create_small(
        name, **({"class_token": False, "global_pool": "avg"} if name.startswith("vim") else {})
    ).eval()
    layer = model.blocks[-2] if is_plain(name) else model.stages[-2]
    kept: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(lambda module, args, y: kept.update(y=y))

    def to_map(y: Tensor) -> Tensor:
        if is_plain(name):
            y = y[:, -16:].unflatten(1, (4, 4))  # what surrounds the class token matters to no one here
        return y.permute(0, 3, 1, 2)

    logits = model(images())
    for label in range(10):  # until one has evidence
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), kept["y"], retain_graph=True)
        weighed = (to_map(gradient).mean((2, 3), keepdim=True) * to_map(kept["y"])).sum(1).relu()
        if weighed.amax() > 0:
            break
    expected = torch.nn.functional.interpolate(weighed[:, None], size=(64, 64), mode="bilinear")[:, 0]
    handle.remove()
    target = [cam.utils.model_targets.ClassifierOutputTarget(label)] * 2
    with cam.GradCAM(model=model, target_layers=[layer], reshape_transform=to_map) as grad_cam:
        found = torch.from_numpy(grad_cam(input_tensor=images(), targets=target))
    assert weighed.amax() > 0
    for one, other in zip(found, expected.detach(), strict=True):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert correlation > 0.99 or other.amax() == 0


def test_peft(name: str) -> None:
    """LoRA on every linear layer: nothing at first, gradients for the adapters alone, and merged what it was apart."""
    peft = pytest.importorskip("peft")
    model = create(name).eval()
    expected = model(images()).detach()
    targets = linear_names(model) or ["proj"]
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets)).eval()
    close(adapted(images()), expected)
    adapted(images()).square().mean().backward()
    learned = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert learned and all("lora_" in key for key in learned)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for key, p in learned.items() if "lora_B" in key)
    with torch.no_grad():
        for p in learned.values():
            p.add_(0.1 * torch.randn_like(p))
        moved = adapted(images())
        assert (moved - expected).abs().max() > 1e-4
        close(adapted.merge_and_unload()(images()), moved)


@torch.no_grad()
def test_torchinfo(name: str) -> None:
    """Every parameter is counted once, and every linear layer is seen."""
    torchinfo = pytest.importorskip("torchinfo")
    model = create_small(name).eval()
    summary = torchinfo.summary(model, input_data=images(), verbose=0, depth=10)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    seen = {layer.layer_id for layer in summary.summary_list if layer.executed}
    assert all(id(x) in seen for x in model.modules() if isinstance(x, nn.Linear | nn.Conv2d))


@torch.no_grad()
def test_transformers_timm_wrapper(name: str, tmp_path: Path) -> None:
    """The wrapper gives our logits, and again after it was saved and loaded."""
    transformers = pytest.importorskip("transformers")
    args = {**SMALLEST[name], **({"img_size": 64} if is_plain(name) else {})}
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=10, do_pooling=True, model_args=args)
    wrapped = transformers.TimmWrapperForImageClassification(config).eval()
    model = create_small(name).eval()
    model.load_state_dict(wrapped.timm_model.state_dict())
    close(wrapped(images()).logits, model(images()))
    wrapped.save_pretrained(tmp_path)
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    close(loaded(images()).logits, model(images()))


def test_lightning(name: str, tmp_path: Path) -> None:
    """Two steps of its trainer leave the weights that two steps by hand leave."""
    lightning = pytest.importorskip("lightning")
    labels = torch.tensor([1, 2])

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = create_small(name).train()
    other = copy.deepcopy(model)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), labels), batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(model), data)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(images()), labels).backward()
        optimizer.step()
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        close(found, expected)


@torch.no_grad()
def test_torchao(name: str) -> None:
    """Weights of eight bits in every linear layer: the outputs are those of the rounded weights in float."""
    quantization = pytest.importorskip("torchao.quantization")
    model = create(name).eval()
    quantized, rounded = copy.deepcopy(model), copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    linears = {key: x for key, x in quantized.named_modules() if isinstance(x, nn.Linear)}
    for key, linear in linears.items():
        assert type(linear.weight) is not nn.Parameter or type(linear.weight.data) is not Tensor
        rounded.get_submodule(key).weight.copy_(linear.weight.dequantize())
    assert (rounded(images()) - model(images())).abs().max() > 0
    close(quantized(images()), rounded(images()))


def test_torch_pruning(name: str) -> None:
    """Half of the channels that may go do, those of the scans stay, and what is left trains.

    Every model has some, but with rotary embeddings and no feed-forward layers.
    """
    pruning = pytest.importorskip("torch_pruning")
    model = create_small(name).eval()
    scans = [x for x in model.modules() if isinstance(x, SelectiveSSM)]
    before = [p.shape for scan in scans for p in scan.parameters()]
    size = sum(p.numel() for p in model.parameters())
    widest = {key: x.weight.shape for key, x in model.named_modules() if key.endswith("mlp.fc1")}
    pruner = pruning.pruner.MagnitudePruner(
        model, images(), importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=unprunable(model),
    )  # fmt: skip
    pruner.step()
    assert [p.shape for scan in scans for p in scan.parameters()] == before
    assert all(model.get_submodule(key).weight.shape[0] == shape[0] // 2 for key, shape in widest.items())
    left = sum(p.numel() for p in model.parameters())
    assert left == size if getattr(model, "rope", None) is not None else left < 0.95 * size
    logits = model.train()(images())
    assert logits.shape == (2, 10)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
