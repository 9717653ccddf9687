"""Models that timm saves, pushes and loads again; files that timm reads itself; without a network."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models import _hub
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from backbones.weights import CheckpointError, rules, sources
from tests.small_models import SMALLEST, is_plain

# One of every generation of every family, shallow.
HIERARCHICAL = {"depths": (1, 1, 1, 1)}
MODELS = {
    **{name: {"depth": 1, "img_size": (64, 32)} if is_plain(name) else HIERARCHICAL for name in SMALLEST},
    "vim_tiny": {"depth": 2, "img_size": (64, 128)},
    "vim_tiny_stride8": {"depth": 1, "img_size": (48, 32)},
    "lbvim_tiny": {"depth": 2, "img_size": (32, 96)},
    "lbvim_528": {"depth": 1, "img_size": 64},
    "localvim_tiny": {"depth": 2, "img_size": (32, 96)},
    "groupmamba_tiny": {**HIERARCHICAL, "distillation": False},
    "adventurer_tiny": {"depth": 2, "img_size": (64, 32)},
    "plainmamba_l1": {"depth": 1, "img_size": (32, 96)},
    "plainmamba_l2": {"depth": 1, "img_size": (32, 32)},
}
NAMES = ["cat", "dog", "owl"]


def create(name: str, **kwargs: object) -> nn.Module:
    return timm.create_model(name, **{**MODELS[name], "num_classes": 3, "in_chans": 4, **kwargs}).eval()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    image = torch.randn(2, 4, *getattr(model, "img_size", (64, 96)))
    with torch.no_grad():
        assert torch.equal(model(image), other.eval()(image))


@pytest.mark.parametrize("safe", [True, False, "both"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_loads(name: str, safe: bool | str, tmp_path: Path) -> None:
    model = create(name)
    _hub.save_for_hf(model, tmp_path, model_config={"label_names": NAMES}, safe_serialization=safe)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(model, loaded)
    assert loaded.pretrained_cfg["label_names"] == NAMES
    assert loaded.pretrained_cfg["num_classes"] == loaded.num_classes == 3
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 3

    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0,))
    stem = "patch_embed." if hasattr(model, "patch_embed") else "stem."
    inner = features.model.state_dict()
    assert any(key.startswith(stem) for key in inner)
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in inner.items())
    # Saved again, as loaded.
    _hub.save_for_hf(loaded, tmp_path / "again")
    assert_same(model, timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_loads_with_changes(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = create(name)
    _hub.save_for_hf(model, tmp_path, safe_serialization=True)
    classes = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert "starts from random weights: the file has 3 classes, the model 7" in caplog.text
    first = next(iter(model.state_dict()))
    assert torch.equal(classes.state_dict()[first], model.state_dict()[first])
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    conv = f"{model.pretrained_cfg['first_conv']}.weight"
    expected = model.state_dict()[conv].sum(1, keepdim=True)
    torch.testing.assert_close(grey.state_dict()[conv], expected)
    if hasattr(model, "pos_embed"):
        rows, columns = model.grid_size
        double = [2 * side for side in model.img_size]
        larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=double)
        expected = model._resample(model.pos_embed, (rows, columns), larger.grid_size)
        torch.testing.assert_close(larger.pos_embed, expected)


def test_a_changed_classifier_is_saved_as_it_is(tmp_path: Path) -> None:
    model = create("efficientvmamba_tiny")
    model.reset_classifier(5)
    _hub.save_for_hf(model, tmp_path)
    assert_same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    averaged = ModelEmaV3(model).module
    _hub.save_for_hf(averaged, tmp_path)
    assert_same(averaged, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the Hub: ``USER/NAME/REVISION/FILE``."""
    root = tmp_path / "hub"

    def download(repo_id: str, filename: str, *, revision: str | None = None, **_: object) -> str:
        path = root / repo_id / (revision or "main") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)

    class Api:
        def __init__(self, **_: object) -> None:
            pass

        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **_: object) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, revision: str | None, **_: object) -> str:
            shutil.copytree(folder_path, root / repo_id / (revision or "main"))
            return repo_id

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    monkeypatch.setattr(_hub, "HfApi", Api)
    monkeypatch.setattr(sources, "_reachable", lambda url: True)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_a_pushed_model_loads(name: str, hub: Path) -> None:
    first, second = create(name), create(name)
    _hub.push_to_hf_hub(first, "user/mine", model_config={"label_names": NAMES})
    _hub.push_to_hf_hub(second, "user/mine", revision="v2", safe_serialization=False)
    loaded = timm.create_model("hf-hub:user/mine", pretrained=True)
    assert_same(first, loaded)
    assert loaded.pretrained_cfg["label_names"] == NAMES
    assert_same(second, timm.create_model("hf-hub:user/mine@v2", pretrained=True))
    with pytest.raises(EntryNotFoundError):
        timm.create_model("hf-hub:user/mine@v3", pretrained=True)


def test_safetensors_win_and_either_will_do(hub: Path) -> None:
    model, other = create("efficientvmamba_tiny"), create("efficientvmamba_tiny")
    _hub.push_to_hf_hub(model, "user/mine")
    folder = hub / "user" / "mine" / "main"
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    assert_same(model, timm.create_model("hf-hub:user/mine", pretrained=True))
    assert_same(model, timm.create_model(f"local-dir:{folder}", pretrained=True))
    (folder / "model.safetensors").unlink()
    assert_same(other, timm.create_model("hf-hub:user/mine", pretrained=True))
    assert_same(other, timm.create_model(f"local-dir:{folder}", pretrained=True))
    (folder / "pytorch_model.bin").rename(folder / "other.pth")
    assert_same(other, timm.create_model(f"local-dir:{folder}", pretrained=True))
    with pytest.raises(
        CheckpointError, match=r"cannot be downloaded from user/mine on the Hub \(404: pytorch_model.bin"
    ):
        timm.create_model("hf-hub:user/mine", pretrained=True)
    shutil.copy(folder / "other.pth", folder / "third.pth")
    with pytest.raises(CheckpointError, match=r"several weight files in the folder .*other\.pth, third\.pth"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    for file in folder.glob("*.pth"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weight file in the folder .*model\.safetensors or pytorch_model"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_an_explicit_file_wins(hub: Path, tmp_path: Path) -> None:
    model, other = create("efficientvmamba_tiny"), create("efficientvmamba_tiny")
    _hub.push_to_hf_hub(model, "user/mine")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    overlay = {"file": str(tmp_path / "other.pth")}
    assert_same(other, timm.create_model("hf-hub:user/mine", pretrained=True, pretrained_cfg_overlay=overlay))


def test_openmmlab_loads_them_too(hub: Path) -> None:
    mm = pytest.importorskip("backbones.mm.models.classifier")
    model = create("efficientvmamba_tiny")
    _hub.push_to_hf_hub(model, "user/mine", revision="v2")
    network = {"name": "efficientvmamba_tiny", **MODELS["efficientvmamba_tiny"], "num_classes": 3, "in_chans": 4}
    for checkpoint in ("hf-hub:user/mine@v2", f"local-dir:{hub}/user/mine/v2", f"{hub}/user/mine/v2"):
        init = {"type": "Pretrained", "checkpoint": checkpoint}
        classifier = mm.ImageClassifier(network, {"type": "LabelSmoothingCrossEntropy"}, init_cfg=init)
        classifier.init_weights()
        assert_same(model, classifier.network)


def test_offline_says_how_to_load_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def offline(repo: str, name: str, **kwargs: object) -> str:
        asked.append(kwargs.get("local_files_only"))
        raise LocalEntryNotFoundError("not there")

    def refuse(url: str, **_: object) -> str:
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nand more")

    monkeypatch.setattr(_hub, "hf_hub_download", offline)
    monkeypatch.setattr(_hub, "download_cached_file", refuse)
    monkeypatch.setattr(sources, "_reachable", lambda url: False)
    how = r'timm\.create_model\("{}", pretrained=True, pretrained_cfg_overlay=dict\(file=PATH\)\) loads a file$'
    with pytest.raises(
        CheckpointError, match=r"vim_tiny: .* on the Hub \(.* does not answer.*; " + how.format("vim_tiny")
    ):
        timm.create_model("vim_tiny", pretrained=True)
    assert asked == [True]  # no half a minute of attempts
    name = "vmamba_tiny_s1l8"
    with pytest.raises(
        CheckpointError, match=rf"{name}: .*\.pth \(<urlopen error .* not known>\); " + how.format(name)
    ):
        timm.create_model(name, pretrained=True)

    mm = pytest.importorskip("backbones.mm")
    dense = pytest.importorskip("backbones.mm.models.dense")
    for arch in ("vim_tiny", "vmamba_tiny_s1l8"):
        with pytest.raises(
            mm.UserError, match=r"checkpoint: .* cannot be downloaded .*; set checkpoint to a file in init_cfg"
        ):
            dense.fetch_weights("published", arch)


def test_a_download_has_a_timeout_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []
    monkeypatch.setattr(
        _hub, "download_cached_file", lambda url, **_: seen.append(socket.getdefaulttimeout()) or tmp_path / "x.pth"
    )
    before = socket.getdefaulttimeout()
    assert sources.fetch({"url": "https://x/x.pth"}, "vim_tiny", "") == tmp_path / "x.pth"
    assert seen[0] is not None and 0 < seen[0] <= 10
    assert socket.getdefaulttimeout() == before


def test_a_host_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(error: Exception) -> object:
        def urlopen(request: object, timeout: float) -> None:
            assert 0 < timeout <= 10
            raise error

        return urlopen

    for error, expected in (
        (sources.HTTPError("https://x", 404, "no", {}, None), True),
        (sources.URLError(sources.ssl.SSLError("certificate")), True),
        (sources.URLError("Name or service not known"), False),
        (TimeoutError(), False),
    ):
        monkeypatch.setattr(sources, "urlopen", answer(error))
        assert sources._reachable("https://x") is expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["ours", "official", "training state"])
def test_timm_reads_the_file_itself(name: str, layout: str, tmp_path: Path) -> None:
    """With ``checkpoint_path``, and strictly as ever."""
    model, path = create(name), tmp_path / "weights.pth"
    weights = model.state_dict()
    if layout != "ours":
        weights = rules.to_official(weights, model.key_rules)
    torch.save({"model": weights, "epoch": 3} if layout == "training state" else weights, path)
    assert_same(model, create(name, checkpoint_path=path))
    fresh = create(name)
    assert not any(fresh.load_state_dict(weights))
    assert_same(model, fresh)
    wrapped = nn.ModuleDict({"a": create(name), "b": nn.Linear(1, 1)})
    wrapped.load_state_dict(
        {f"a.{key}": x for key, x in weights.items()} | {f"b.{k}": x for k, x in wrapped["b"].state_dict().items()}
    )
    assert_same(model, wrapped["a"])

    extra = {**weights, "layers.0.blocks.0.extra.bias": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: ".*extra\.bias"'):
        fresh.load_state_dict(extra)
    some = dict(list(weights.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(some)
    first = next(iter(weights))
    with pytest.raises((RuntimeError, CheckpointError), match=r"size mismatch|misshapen"):
        fresh.load_state_dict({**weights, first: weights[first][..., :-1]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        create(name, num_classes=4).load_state_dict(weights)


# What else may wrap the names of a file, and how it may be stored.
TWICE = [("module.", "ours"), ("_orig_mod.", "official"), ("module._orig_mod.", "state"), ("network.", "safetensors")]


@pytest.mark.parametrize(
    ("name", "prefix", "kind"), [(name, *TWICE[i % len(TWICE)]) for i, name in enumerate(sorted(MODELS))]
)
def test_timm_does_not_drop_a_weight_that_stands_there_twice(name: str, prefix: str, kind: str, tmp_path: Path) -> None:
    """timm takes the last of the two in silence."""
    model, path = create(name), tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    weights = model.state_dict()
    if kind in ("official", "state"):
        weights = rules.to_official(weights, model.key_rules)
    key, x = next(iter(weights.items()))
    twice = {**weights, f"{prefix}{key}": x + 1}
    if kind == "safetensors":
        save_file({key: x.contiguous() for key, x in twice.items()}, path)
    else:
        torch.save({"state_dict_ema": twice} if kind == "state" else twice, path)
    with pytest.raises(CheckpointError, match="expected every weight once, got") as error:
        create(name, checkpoint_path=path)
    assert key in str(error.value) and f"{prefix}{key}" in str(error.value)
    for use_ema in (True, False):
        with pytest.raises(CheckpointError, match="expected every weight once, got"):
            timm.models.load_checkpoint(model, str(path), use_ema=use_ema)


@pytest.mark.parametrize("name", MODELS)
def test_timms_route_names_what_does_not_fit(name: str, tmp_path: Path) -> None:
    model, path = create(name), tmp_path / "weights.pth"
    weights = model.state_dict()
    first, x = next(iter(weights.items()))
    for change, words in (
        ({first: None}, f"missing: {first}"),
        ({"extra.bias": x}, r"unknown: extra\.bias"),
        ({first: x[..., :0]}, f"misshapen: {first}"),
    ):
        torch.save({key: y for key, y in {**weights, **change}.items() if y is not None}, path)
        with pytest.raises(CheckpointError, match=words):
            create(name, checkpoint_path=path)
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"misshapen: head\."):
        create(name, num_classes=4, checkpoint_path=path)
    with pytest.raises(CheckpointError, match=r"features_only=True .*pretrained_cfg_overlay"):
        create(name, features_only=True, out_indices=[0], checkpoint_path=path)
    maps = create(name, features_only=True, out_indices=[0])
    torch.save(maps.state_dict(), path)
    loaded = create(name, features_only=True, out_indices=[0], checkpoint_path=path).state_dict()
    assert all(torch.equal(y, loaded[key]) for key, y in maps.state_dict().items())


def test_averaged_weights_come_first_with_timm(tmp_path: Path) -> None:
    plain, averaged = create("vim_tiny"), create("vim_tiny")
    for key in ("state_dict_ema", "model_ema"):
        torch.save({"model": plain.state_dict(), key: averaged.state_dict()}, tmp_path / "weights.pth")
        assert_same(averaged, create("vim_tiny", checkpoint_path=tmp_path / "weights.pth"))
        target = create("vim_tiny")
        assert not any(timm.models.load_checkpoint(target, tmp_path / "weights.pth", use_ema=False))
        assert_same(plain, target)


def test_timm_resumes_from_no_file_with_a_weight_twice(tmp_path: Path) -> None:
    model, path = create("vim_tiny"), tmp_path / "checkpoint.pth.tar"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = {"epoch": 4, "version": 2, "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save({**state, "state_dict": model.state_dict()}, path)
    other = create("vim_tiny")
    assert timm.models.resume_checkpoint(other, path, optimizer, log_info=False) == 5
    assert_same(model, other)
    torch.save({**state, "state_dict": {**model.state_dict(), "module.norm.weight": torch.ones(192)}}, path)
    fresh = create("vim_tiny")
    before = copy.deepcopy(fresh)
    with pytest.raises(CheckpointError, match=r"expected every weight once, got norm\.weight and module\.norm\.weight"):
        timm.models.resume_checkpoint(fresh, path)
    assert_same(before, fresh)


def test_models_of_others_load_as_ever(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t")
    weights = model.state_dict()
    torch.save({"state_dict": {f"module.{key}": x for key, x in weights.items()}}, tmp_path / "weights.pth")
    loaded = timm.create_model("resnet10t", checkpoint_path=tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(x, loaded[key]) for key, x in weights.items())
    with pytest.raises(FileNotFoundError):
        timm.create_model("resnet10t", checkpoint_path=tmp_path / "none.pth")


def spread(weights: dict[str, Tensor], folder: Path, safe: bool) -> Path:
    """Weights in two files, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    base, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    files = [f"{base}-{i + 1:05d}-of-00002.{ending}" for i in range(2)]
    where = {key: files[i % 2] for i, key in enumerate(weights)}
    for file in files:
        part = {key: x.contiguous() for key, x in weights.items() if where[key] == file}
        save_file(part, folder / file) if safe else torch.save(part, folder / file)
    index = folder / f"{base}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files_load(safe: bool, hub: Path, tmp_path: Path) -> None:
    model = create("efficientvmamba_tiny")
    folder = hub / "user" / "mine" / "main"
    _hub.save_for_hf(model, folder)
    for file in ("model.safetensors", "pytorch_model.bin"):
        (folder / file).unlink(missing_ok=True)
    index = spread(rules.to_official(model.state_dict(), model.key_rules), folder, safe)
    overlay = {"file": str(index)}
    for loaded in (
        create("efficientvmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay),
        create("efficientvmamba_tiny", checkpoint_path=index),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model("hf-hub:user/mine", pretrained=True),
    ):
        assert_same(model, loaded)
    part = sorted(folder.glob("*-00002.*"))[1]
    whole = part.read_bytes()
    kept = load_file(part) if safe else torch.load(part)
    more = {**kept, "extra.bias": torch.zeros(1)}
    save_file(more, part) if safe else torch.save(more, part)
    with pytest.raises(CheckpointError, match=rf"{part.name}: other weights than .*\.index\.json says: extra\.bias"):
        create("efficientvmamba_tiny", checkpoint_path=index)
    part.write_bytes(whole)
    part.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"no weight file at .*{part.name}"):
        create("efficientvmamba_tiny", checkpoint_path=index)
    shutil.copy(sorted(folder.glob("*-00002.*"))[0], part)
    with pytest.raises(CheckpointError, match=rf"{part.name}: other weights than .*\.index\.json says: "):
        create("efficientvmamba_tiny", checkpoint_path=index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no index of weights, expected a 'weight_map'"),
        ("[]", "no index of weights"),
        ('{"metadata": {}}', "no index of weights"),
        ('{"weight_map": {"a": 1}}', "no index of weights"),
        ('{"weight_map": {"a": "../other.bin"}}', r"expected files beside it, got \.\./other\.bin"),
    ],
)
def test_a_damaged_index_is_named(text: str, words: str, tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin\.index\.json: {words}"):
        create("efficientvmamba_tiny", checkpoint_path=index)


def test_both_layouts_at_once_are_refused() -> None:
    model = create("efficientvmamba_tiny")
    official = rules.to_official(model.state_dict(), model.key_rules)
    name = next(key for key in official if key not in model.state_dict())
    with pytest.raises(CheckpointError, match="hold these in two layouts"):
        model.load_state_dict({**model.state_dict(), name: official[name]})


def test_the_configuration_of_the_authors_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    model = create("vmamba_tiny_s1l8")
    official = rules.to_official(model.state_dict(), model.key_rules)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": official, "config": module.CfgNode(lr=0.1)}, tmp_path / "official.pth")
    assert_same(model, create("vmamba_tiny_s1l8", checkpoint_path=tmp_path / "official.pth"))
