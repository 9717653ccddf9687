"""Pre-training by masked images: TOKI against its recording, the mask, the loss, and the way of its weights."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from tests.image_folders import write_images

pytest.importorskip("mmengine")

from mmengine.registry import MODELS
from torch import Tensor

import backbones
from backbones.mm import ImageClassifier, MaskedImageModelling, UserError
from backbones.mm.engine.reconstruction import painted
from backbones.mm.models.toki import Toki, bounded, toki
from backbones.weights import CheckpointError
from tests.scripts import call_tool
from tools.recordings import load_arrays

pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")

ROOT = Path(__file__).parents[1]
LOSS = {"type": "LabelSmoothingCrossEntropy"}
PLAIN = {"name": "vim_tiny", "embed_dim": 16, "depth": 2, "img_size": 32, "patch_size": 8}
DEEP = {"name": "vmamba_tiny_s1l8", "depths": (1, 1, 1, 1), "dims": (16, 16, 16, 16)}
# The smallest of every family, as small as its arguments make it.
NETWORKS = {
    "vim": PLAIN,
    "lbvim": {**PLAIN, "name": "lbvim_tiny"},
    "lbvim_528": {**PLAIN, "name": "lbvim_528", "embed_dim": 24},
    "localvim": {**PLAIN, "name": "localvim_tiny"},
    "plainmamba": {**PLAIN, "name": "plainmamba_l1"},
    "adventurer": {**PLAIN, "name": "adventurer_tiny", "embed_dim": 64},
    "vmamba": DEEP,
    "localvmamba": {"name": "localvmamba_tiny"},
    "msvmamba": {"name": "msvmamba_nano"},
    "efficientvmamba": {"name": "efficientvmamba_tiny"},
    "groupmamba": {"name": "groupmamba_tiny"},
    "spatialmamba": {"name": "spatialmamba_tiny"},
    "vssd": {"name": "vssd_micro"},
}


def masked(network: dict[str, Any] = PLAIN, **kwargs: Any) -> MaskedImageModelling:
    return MODELS.build({"type": "MaskedImageModelling", "network": network, **kwargs})


def test_toki_is_the_recorded_one() -> None:
    arrays, _ = load_arrays("toki_unit_6x2x4x3")
    x = arrays["x"].flatten(2).transpose(1, 2)
    keep = arrays["keep"].bool()[None]
    found = toki(x, keep, arrays["A"][0])
    expected = arrays["mask_token_without_layout_bug"].flatten(2).transpose(1, 2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[~keep], expected[~keep], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[keep], x[keep])


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_toki_is_its_definition(length: int) -> None:
    x, A = torch.randn(3, length, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    keep = torch.rand(3, length) < 0.4
    found = toki(x, keep, A)
    for image in range(3):
        anchors = [i for i in range(length) if keep[image, i] or i in (0, length - 1)]
        filled = x[image].clone()
        for left, right in pairwise(anchors):
            n, total = right - left, torch.zeros(4, dtype=torch.float64)
            for j in range(n):
                share = j / (n - 1) if n > 1 else 0
                mixed = (1 - share) * x[image, left] + share * x[image, right]
                total = total + torch.linalg.matrix_power(A, n - 1 - j) @ mixed
                filled[left + j] = total
        filled[-1] = A @ x[image, -1]
        expected = torch.where(keep[image, :, None], x[image], filled)
        torch.testing.assert_close(found[image], expected)


def test_the_bound_holds_the_powers() -> None:
    A = 3 * torch.randn(5, 5, dtype=torch.float64)
    small = 1e-3 * A
    assert torch.linalg.matrix_norm(bounded(A, 0.9), 2).item() == pytest.approx(0.9, rel=1e-5)
    assert torch.equal(bounded(small, 0.9), small)
    module = Toki(5).double()
    module.A.data.copy_(A)
    x, keep = torch.randn(1, 200, 5, dtype=torch.float64), torch.zeros(1, 200, dtype=torch.bool)
    assert module(x, keep).abs().max() < 200 * 5 * x.abs().max()
    assert toki(x, keep, A).abs().max() > 1e20
    with pytest.raises(ValueError, match="bound: got 0"):
        Toki(5, 0)


def test_toki_learns_from_its_start_at_zero() -> None:
    module = Toki(4)
    module(torch.randn(1, 9, 4), torch.arange(9)[None] % 4 == 0).square().sum().backward()
    assert module.A.grad is not None and module.A.grad.isfinite().all() and module.A.grad.abs().sum() > 0


@pytest.mark.parametrize("family", NETWORKS)
def test_every_family_sees_the_visible_cells_alone(family: str) -> None:
    network = NETWORKS[family]
    model = masked(network).eval()
    stride = model.pretraining.stride
    side = PLAIN["img_size"] if stride == 8 else 2 * stride
    x = torch.randn(1, 3, side, side)
    mask = torch.ones(1, side // stride, side // stride, dtype=torch.bool)
    with torch.no_grad():
        # Nothing is seen: whatever the image is, the same is painted. Convolutions of the stem reach over cells, so one
        # visible cell may know a little of its neighbours.
        assert torch.equal(model.rebuild(x, mask), model.rebuild(torch.zeros_like(x), mask))
        mask[0, 0, 0] = False
        assert not torch.equal(model.rebuild(x, mask), model.rebuild(torch.zeros_like(x), mask))


@pytest.mark.parametrize("fill", ["token", "toki"])
@pytest.mark.parametrize("family", [family for family, network in NETWORKS.items() if "patch_size" in network])
def test_a_plain_network_gets_the_visible_patches_alone(family: str, fill: str, monkeypatch: Any) -> None:
    model = masked(NETWORKS[family], ratio=0.75, visible_only=True, fill=fill).eval()
    x, mask = torch.randn(2, 3, 32, 32), model.draw_mask(torch.empty(2, 3, 32, 32), torch.Generator().manual_seed(0))
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    widths = []
    mixer = model.network.blocks[0].mixer
    mixer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    with torch.no_grad():
        rebuilt = model.rebuild(x, mask)
        assert rebuilt.shape == x.shape
        assert torch.equal(model.rebuild(torch.where(hidden, torch.randn_like(x), x), mask), rebuilt)
        assert not torch.equal(model.rebuild(torch.where(hidden, x, torch.randn_like(x)), mask), rebuilt)
    assert set(widths) == {4 + model.network.num_prefix_tokens}
    losses = model.train()(x, mode="loss")
    losses["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_patches_are_painted_where_they_are() -> None:
    model = masked(visible_only=True, decoder={"dim": 8, "depth": 1, "num_heads": 2}).eval()
    assert len(model.pretraining.blocks) == 1 and model.pretraining.blocks[0].attn.num_heads == 2
    pretraining = model.pretraining
    pretraining.blocks, pretraining.norm = torch.nn.Sequential(), torch.nn.Identity()
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    mask[0, 1, 1] = mask[0, 0, 2] = False
    cells = torch.tensor([[2, 4]])
    tokens = torch.randn(1, 2, 8)
    seen = pretraining.decode(tokens, cells, mask)
    changed = pretraining.decode(tokens + torch.tensor([[[1.0], [0.0]]]), cells, mask)
    moved = (seen != changed).any(1)[0]
    assert moved.tolist() == [[False, False, True], [False, False, False]]
    masked_cells = seen[0, :, mask[0]]
    assert not torch.equal(masked_cells[:, 0], masked_cells[:, 1])  # each has a position


@pytest.mark.parametrize("fill", ["token", "toki"])
@pytest.mark.parametrize("network", [PLAIN, NETWORKS["lbvim_528"], DEEP], ids=["vim", "lbvim_528", "vmamba"])
def test_loss_and_gradients(network: dict, fill: str) -> None:
    model = masked(network, fill=fill).train()
    losses = model(torch.randn(2, 3, 64 if network is DEEP else 32, 64 if network is DEEP else 32), mode="loss")
    losses["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without  # else DistributedDataParallel would wait for them
    assert model.pretraining.mask_token.grad.abs().sum() > 0


def test_the_loss_is_that_of_masked_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = masked().eval(), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3, 0] = True
    monkeypatch.setattr(model, "draw_mask", lambda inputs: mask)
    rebuilt = model.rebuild(x, mask)
    error = (rebuilt - x).abs()
    expected = (error[0, :, 8:16, 16:24].mean() + error[1, :, 24:, :8].mean()) / 2
    torch.testing.assert_close(model(x, mode="loss")["loss"], expected)
    model.norm_cells = True
    cell = x[0, :, 8:16, 16:24]
    torch.testing.assert_close(model.target(x)[0, :, 8:16, 16:24], (cell - cell.mean()) / (cell.var() + 1e-6).sqrt())


def test_masks() -> None:
    model = masked(ratio=0.6)
    mask = model.draw_mask(torch.empty(50, 3, 40, 24))
    assert mask.shape == (50, 5, 3) and (mask.sum((1, 2)) == 9).all() and 20 < mask[:, 0, 0].sum() < 40
    same = [model.draw_mask(torch.empty(2, 3, 32, 32), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)
    with pytest.raises(ValueError, match="30 x 32 pixels, expected multiples of a cell's side, 8"):
        model.draw_mask(torch.empty(1, 3, 30, 32))


def test_what_is_painted_gets_its_contrast_back() -> None:
    model, x = masked(norm_cells=True), torch.randn(2, 3, 32, 32)
    model.rebuild = lambda inputs, mask: model.target(inputs)  # type: ignore[method-assign]
    torch.testing.assert_close(painted(model, x)[1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"ratio": 1.0}, ["ratio", "1.0"]),
        ({"fill": "mean"}, ["fill", "'mean'", "toki"]),
        ({"network": {"name": "resnet18"}}, ["network", "resnet18"]),
        ({"network": {"name": "vim_tny"}}, ["vim_tny", "vim_tiny"]),
        ({"network": DEEP, "visible_only": True}, ["visible_only", "vmamba_tiny_s1l8", "plain"]),
        (
            {"network": {**PLAIN, "token_reduction": {"schedule": {1: 0.5}}}, "visible_only": True},
            ["visible_only", "token_reduction"],
        ),
        ({"decoder": {"depth": 1}}, ["decoder", "visible_only=True"]),
        ({"visible_only": True, "decoder": {"width": 8}}, ["decoder", "'width'", "dim, depth, num_heads"]),
        ({"visible_only": True, "decoder": {"dim": 6}}, ["decoder", "dim=6", "multiple of 4"]),
        ({"visible_only": True, "decoder": {"num_heads": 3}}, ["decoder", "num_heads=3", "16"]),
        ({"visible_only": True, "decoder": {"depth": 0}}, ["decoder", "depth=0", "at least 1"]),
    ],
)
def test_mistakes_get_one_clear_line(kwargs: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        masked(**kwargs)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_overlapping_patches_are_refused() -> None:
    for visible_only in (False, True):
        model = masked({**PLAIN, "stride": 4}, visible_only=visible_only)
        with pytest.raises(ValueError, match="7 x 7 cells of 32 x 32 pixels, expected 8 x 8"):
            model(torch.randn(1, 3, 32, 32), mode="loss")


@pytest.fixture(params=["vim", "vim visible", "groupmamba"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], MaskedImageModelling, Path]:
    """A network, its pre-trained model, and the checkpoint that mmengine would write."""
    family, visible_only = request.param.split()[0], request.param.endswith("visible")
    network = NETWORKS[family]
    model = masked(network, fill="toki", visible_only=visible_only)
    path = tmp_path / "epoch_1.pth"
    torch.save({"meta": {}, "state_dict": model.state_dict()}, path)
    return network, model, path


def same(found: dict[str, Tensor], model: MaskedImageModelling, but: tuple[str, ...]) -> None:
    expected = model.network.state_dict()
    assert expected.keys() <= found.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    assert all(name.startswith(but) for name in found.keys() - expected.keys())


def test_weights_load_strictly_into_a_classifier(written: tuple) -> None:
    network, model, path = written
    init = {"type": "Pretrained", "checkpoint": str(path)}
    classifier = ImageClassifier({**network, "num_classes": 7}, LOSS, init_cfg={**init, "headless": True})
    classifier.init_weights()
    same(classifier.network.state_dict(), model, ("head.",))
    with pytest.raises(CheckpointError, match="missing: head"):
        ImageClassifier({**network, "num_classes": 7}, LOSS, init_cfg=init).init_weights()
    state = torch.load(path)["state_dict"]
    lacking = next(name for name in state if name.endswith("out_proj.weight"))
    torch.save({"state_dict": {name: x for name, x in state.items() if name != lacking}}, path)
    with pytest.raises(CheckpointError, match=r"missing: .*out_proj"):
        ImageClassifier(network, LOSS, init_cfg={**init, "headless": True}).init_weights()
    with pytest.raises(UserError, match=r"init_cfg: .*headles"):
        ImageClassifier(network, LOSS, init_cfg={**init, "headles": True}).init_weights()


def test_weights_load_strictly_into_timm_and_dense_backbones(written: tuple) -> None:
    network, model, path = written
    args = {name: x for name, x in network.items() if name != "name"}
    overlay = {"file": str(path)}
    built = timm.create_model(
        network["name"], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, global_pool="avg", **args
    )
    same(built.state_dict(), model, ())
    family = "Vim" if network["name"] == "vim_tiny" else "GroupMamba"
    indices = (1,) if family == "Vim" else (0, 1, 2, 3)
    dense = MODELS.build(
        {
            "type": family, "arch": network["name"], "out_indices": indices, "model_args": args,
            "init_cfg": {"type": "Pretrained", "checkpoint": str(path)},
        }
    )  # fmt: skip
    dense.init_weights()
    expected = model.network.state_dict()
    own = dense.model.state_dict()
    assert own.keys() <= expected.keys() and all(torch.equal(x, expected[name]) for name, x in own.items())


def test_pre_training_goes_on_from_weights(written: tuple) -> None:
    network, model, path = written
    other = masked(network, init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    other.init_weights()
    same(other.network.state_dict(), model, ())


CONFIG = """
_base_ = ["{base}"]
model = dict({own}, network=dict(_delete_=True, name="vim_tiny", img_size=16, patch_size=4, depth=2,
    embed_dim=16))
train_cfg = dict(max_epochs=2)
train_dataloader = dict(batch_size=10, dataset=dict(data_root="{data}", transform=dict(input_size=16)))
"""
WAYS = {"token": 'fill="token"', "toki": 'fill="toki"', "visible": "visible_only=True, decoder=dict(depth=1)"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes with two images each, and a config for each way to fill in what is masked."""
    path = tmp_path_factory.mktemp("masked")
    write_images(path / "data", {"train": 2}, classes=10, noise=30, step=22)
    base = ROOT / "configs" / "pretraining" / "simmim_vim-tiny_digits.py"
    for way, own in WAYS.items():
        (path / f"fill_{way}.py").write_text(CONFIG.format(base=base, data=path / "data", own=own))
    return path


@pytest.fixture
def train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        call_tool("train", *arguments)

    monkeypatch.chdir(folder)
    return call


@pytest.mark.parametrize("fill", [x if x == "token" else pytest.param(x, marks=pytest.mark.slow) for x in WAYS])
def test_the_tool_trains_and_resumes(fill: str, train: Callable[..., None], folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread on both sides: equality is exact
    try:
        stop = ["--cfg-options", "train_cfg.max_epochs=1"]
        train(f"fill_{fill}.py", "--work-dir", f"{fill}_cut", *stop)
        train(f"fill_{fill}.py", "--work-dir", f"{fill}_cut", "--resume")
        train(f"fill_{fill}.py", "--work-dir", f"{fill}_whole", "--cfg-options", f"experiment_name={fill}")
    finally:
        torch.set_num_threads(threads)
    cut, whole = (torch.load(folder / f"{fill}_{run}" / "epoch_2.pth")["state_dict"] for run in ("cut", "whole"))
    different = [name for name, x in whole.items() if not torch.equal(cut[name], x)]
    assert not different
    with Image.open(folder / f"{fill}_whole" / "reconstructions.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["token", "visible"])
def test_two_processes_train(fill: str, folder: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29731",
        ROOT / "tools" / "train.py", f"fill_{fill}.py", "--launcher", "pytorch", "--work-dir", f"two_{fill}",
        "--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.batch_size=5",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / f"two_{fill}" / "epoch_1.pth").is_file() and (
        folder / f"two_{fill}" / "reconstructions.png"
    ).is_file()


def test_fewer_tokens_go_together_with_masks() -> None:
    model = masked({**PLAIN, "depth": 4})
    backbones.reduce_tokens(model, {2: 0.6})
    assert math.isfinite(model(torch.randn(2, 3, 32, 32), mode="loss")["loss"].item())
