"""Training with the digits config on a few small images: resumption, checkpoints, reports."""

from __future__ import annotations

import csv
import json
import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_folders import write_images

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.hooks import Hook

from backbones.mm import Runner, UserError
from backbones.mm.engine import runner as runners
from backbones.mm.engine.checkpoints import find_latest, read_checkpoint
from backbones.mm.engine.hooks import VALIDATED
from backbones.mm.engine.report import draw_report, find_best, read_confusion
from backbones.mm.engine.resume import differences, read_settings
from backbones.weights import CheckpointError

CONFIG = Path(__file__).parents[1] / "configs" / "digits" / "vim-tiny_digits.py"
CLASSES, EPOCHS = 4, 3


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 training and 12 validation images; a class is a grey level with noise."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, {"train": 8, "val": 3}, CLASSES)
    return root


def make_config(data_root: Path, work_dir: Path, **options: Any) -> Config:
    """The digits config with a tiny network and every source of randomness: augmentation, mixup, drop path."""
    config = Config.fromfile(CONFIG)
    transform = {"input_size": 16, "is_training": True, "scale": (0.5, 1.0), "color_jitter": 0.4}
    data = {"data_root": str(data_root), "num_classes": CLASSES}
    config.model = {
        "type": "ImageClassifier",
        "network": {
            "name": "test_vit",
            "img_size": 16,
            "patch_size": 8,
            "num_classes": CLASSES,
            "drop_path_rate": 0.3,
        },
        "loss": {"type": "SoftTargetCrossEntropy"},
        "data_preprocessor": {"mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}},
    }
    config.merge_from_dict(
        {
            "work_dir": str(work_dir),
            # mmengine shares histories between runs of the same name and second.
            "experiment_name": uuid.uuid4().hex,
            "train_cfg.max_epochs": EPOCHS,
            "train_dataloader.batch_size": 8,
            "train_dataloader.dataset": {**data, "transform": transform},
            "val_dataloader.dataset": {**data, "transform": {"input_size": 16}},
            "test_dataloader.dataset": {**data, "transform": {"input_size": 16}},
            "val_evaluator.topk": (1, 2),
            "test_evaluator.topk": (1, 2),
            "visualizer.vis_backends": [{"type": "LocalVisBackend"}],
            **options,
        }
    )
    return config


def train(config: Config, *hooks: Hook) -> Runner:
    runner = Runner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


class Interrupt(Hook):
    """Ends the run in its second epoch (iterations 5 to 8) or in the validation after it, as Ctrl-C would."""

    priority = "HIGHEST"

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.moment == "training" and runner.iter == 5:
            raise KeyboardInterrupt

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.moment == "validating" and runner.iter == 8:
            raise KeyboardInterrupt


def histories(runner: Runner) -> dict[str, list[float]]:
    names = ("train/loss", "train/lr", "val/accuracy/top1", VALIDATED)
    return {name: runner.message_hub.get_scalar(name).data[0].tolist() for name in names}


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run that nothing interrupts."""
    return train(make_config(data_root, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("moment", ["training", "validating"])
def test_resumed_run_equals_the_whole_one(whole: Runner, data_root: Path, tmp_path: Path, moment: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_config(data_root, tmp_path), Interrupt(moment))
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.name == ("epoch_1.pth" if moment == "training" else "epoch_2.pth")
    resumed = train(make_config(data_root, tmp_path, resume=True, load_from=str(latest)))
    # On a CPU with the same number of threads the arithmetic is the same, so equality is exact.
    assert histories(resumed) == histories(whole)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
    assert find_best(tmp_path).name == find_best(whole.work_dir).name


@pytest.mark.parametrize("moment", ["training", "validating"])
def test_loop_over_iterations_is_resumed(data_root: Path, tmp_path: Path, moment: str) -> None:
    def config(work_dir: str, **options: Any) -> Config:
        config = make_config(data_root, tmp_path / work_dir, **options)
        config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 12, "val_interval": 4}
        config.train_dataloader.sampler.type = "InfiniteSampler"
        # torchvision's colour jitter draws from the generator of which mmengine's loop uses one number more.
        config.train_dataloader.dataset.transform.color_jitter = None
        config.param_scheduler = [{"type": "PolyLR", "by_epoch": False, "begin": 0, "end": 12}]
        config.log_processor = {"by_epoch": False}
        config.default_hooks.checkpoint.update(by_epoch=False, interval=4)
        return config

    expected = train(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(config("cut"), Interrupt(moment))
    latest = find_latest(tmp_path / "cut")
    assert latest.name == ("iter_4.pth" if moment == "training" else "iter_8.pth")
    resumed = train(config("cut", resume=True, load_from=str(latest)))
    assert histories(resumed) == histories(expected)


@pytest.mark.parametrize("below", ["file", "/proc"])
def test_a_work_directory_that_cannot_be_made_is_named(data_root: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write to work directory .*/run: ") as error:
        Runner.from_cfg(make_config(data_root, tmp_path / below / "run"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("launcher", "device", "settings", "expected"),
    [
        ("pytorch", "cuda", {"backend": "nccl"}, torch.device("cuda", 3)),
        ("slurm", "cuda", {}, torch.device("cuda", 5)),
        ("pytorch", "cuda", {"backend": "gloo"}, None),
        ("mpi", "cuda", {}, None),
        ("pytorch", "cpu", {}, None),
        ("pytorch", "cuda", {"device_id": 7}, 7),
    ],
)
def test_nccl_is_told_its_gpu(
    monkeypatch: pytest.MonkeyPatch, launcher: str, device: str, settings: dict[str, Any], expected: Any
) -> None:
    monkeypatch.setattr(runners, "get_device", lambda: device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("SLURM_LOCALID", "5")
    given = {"dist_cfg": settings, "cudnn_benchmark": False}
    found = runners._with_device(given, launcher)
    assert found["dist_cfg"].get("device_id") == expected
    assert found["cudnn_benchmark"] is False and found["dist_cfg"].get("backend") == settings.get("backend")


def test_a_loop_over_iterations_validates_at_its_end(data_root: Path, tmp_path: Path) -> None:
    """Also where the interval does not divide its length, and where that validation was cut off."""

    def config(**options: Any) -> Config:
        config = make_config(data_root, tmp_path, **options)
        config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 5, "val_interval": 4}
        config.train_dataloader.sampler.type = "InfiniteSampler"
        config.param_scheduler = []
        config.log_processor = {"by_epoch": False}
        config.default_hooks.checkpoint.update(by_epoch=False, interval=4)
        return config

    class InterruptLast(Hook):
        priority = "HIGHEST"

        def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            if runner.iter == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(), InterruptLast())
    latest = find_latest(tmp_path)
    assert latest.name == "iter_5.pth"
    resumed = train(config(resume=True, load_from=str(latest)))
    assert histories(resumed)[VALIDATED] == [4, 5]
    assert len(histories(resumed)["val/accuracy/top1"]) == 2


@pytest.mark.parametrize("changed", ["renamed", "reordered", "fewer"])
def test_a_checkpoint_for_other_classes_is_refused(
    whole: Runner, data_root: Path, tmp_path: Path, changed: str
) -> None:
    content = read_checkpoint(find_latest(whole.work_dir))
    names = {"renamed": ["0", "1", "2", "x"], "reordered": ["1", "0", "2", "3"], "fewer": ["0", "1", "2"]}[changed]
    content["meta"]["dataset_meta"] = {"classes": names}
    torch.save(content, tmp_path / "other.pth")
    what = {"renamed": "missing 'x'; unknown '3'", "reordered": r"class 0 is \['0'\]", "fewer": "unknown '3'"}[changed]

    def runner(**options: Any) -> Runner:
        return Runner.from_cfg(
            make_config(data_root, tmp_path / "run", load_from=str(tmp_path / "other.pth"), **options)
        )

    for run, loader in ((runner().test, "test"), (runner().val, "val"), (runner(resume=True).train, "train")):
        with pytest.raises(UserError, match=rf"{loader}_dataloader has other classes than .*other\.pth: .*{what}"):
            run()


def test_a_run_that_starts_from_weights_may_have_other_classes(whole: Runner, data_root: Path, tmp_path: Path) -> None:
    content = read_checkpoint(find_latest(whole.work_dir))
    content["meta"]["dataset_meta"] = {"classes": ["a", "b", "c", "d"]}
    torch.save(content, tmp_path / "other.pth")
    options = {"load_from": str(tmp_path / "other.pth"), "train_cfg.max_epochs": 1}
    assert train(make_config(data_root, tmp_path / "run", **options)).epoch == 1


@pytest.fixture(scope="module")
def begun(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that ended in its second epoch."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        train(make_config(data_root, folder), Interrupt("training"))
    return find_latest(folder)


def resume(begun: Path, data_root: Path, tmp_path: Path, **options: Any) -> tuple[Runner, list[str]]:
    """The resumed run, and what it says about settings."""
    runner = Runner.from_cfg(make_config(data_root, tmp_path, resume=True, load_from=str(begun), **options))
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    runner.logger.addHandler(handler)
    runner.train()
    return runner, [line.split(".pth: ")[1] for line in said if line.startswith("resumed from")]


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("optim_wrapper.optimizer.lr", 0.01, "learning rate: 0.001 of the checkpoint counts, not 0.01 of the config"),
        (
            "optim_wrapper.optimizer.weight_decay",
            0.5,
            "weight_decay: 0 and 0.05 of the checkpoint counts, not 0 and 0.5 of the config",
        ),
        (
            "optim_wrapper.optimizer.betas",
            (0.5, 0.6),
            "betas: (0.9, 0.98) of the checkpoint counts, not (0.5, 0.6) of the config",
        ),
        (
            "param_scheduler.1.eta_min",
            0.5,
            "param_scheduler.1.eta_min: 1e-05 of the checkpoint counts, not 0.5 of the config",
        ),
        ("randomness.seed", 7, "seed: 0 of the checkpoint counts, not 7 of the config"),
    ],
)
def test_what_the_checkpoint_overrides_is_said(
    whole: Runner, begun: Path, data_root: Path, tmp_path: Path, option: str, value: Any, line: str
) -> None:
    resumed, said = resume(begun, data_root, tmp_path, **{option: value})
    assert said == [line]
    # And it is true: the run goes on as if the setting had not changed.
    assert histories(resumed) == histories(whole)


def test_nothing_is_said_where_settings_agree(begun: Path, data_root: Path, tmp_path: Path) -> None:
    assert resume(begun, data_root, tmp_path)[1] == []


def test_another_batch_size_is_said(begun: Path, data_root: Path, tmp_path: Path) -> None:
    said = resume(begun, data_root, tmp_path, **{"train_dataloader.batch_size": 16})[1]
    assert len(said) == 1 and said[0].startswith("batch size: 16 images of the config count, not 8 of the checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optim_wrapper.optimizer": {"_delete_": True, "type": "SGD", "lr": 0.1}},
            r"optim_wrapper.optimizer.type SGD: its state is that of AdamW; resume with the settings of the run",
        ),
        (
            {"optim_wrapper.paramwise_cfg": {"layer_decay": 0.5}},
            r"its optimizer has 2 groups of \d+, \d+ .* layer_decay",
        ),
        ({"model.network.drop_path_rate": 0.1, "param_scheduler": []}, "param_scheduler none: .* LinearLR, CosineAnn"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    begun: Path, data_root: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"epoch_1\.pth cannot be resumed.*{message}") as error:
        resume(begun, data_root, tmp_path, **options)
    assert len(str(error.value).splitlines()) == 1


def test_weights_alone_cannot_be_resumed(begun: Path, data_root: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": read_checkpoint(begun)["state_dict"]}, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"weights\.pth cannot be resumed: it holds weights.*\(meta, message_hub, optim"
    ):
        resume(tmp_path / "weights.pth", data_root, tmp_path)


def test_another_number_of_classes_cannot_be_resumed(begun: Path, data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"epoch_1\.pth.*network\.head\.weight \(4, 64\)"):
        resume(begun, data_root, tmp_path, **{"model.network.num_classes": 5})


def test_settings_are_read_without_running_code() -> None:
    text = "a = dict(b=[1, (2, None)], c={'d.e': -1.5}, f=__import__('os').mkdir('x'))\nimport os\nos.mkdir('x')"
    settings = read_settings(text)
    assert settings == {"a": {"b": [1, [2, None]], "c": {"d.e": -1.5}, "f": "__import__('os').mkdir('x')"}}
    changed = {"a": {**settings["a"], "b": [1, [3, None]], "g": 1}}
    assert list(differences(settings, changed)) == [("a.b.1.0", 2, 3), ("a.g", None, 1)]
    with pytest.raises(ValueError, match="the text of a config"):
        read_settings("a = (")


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_a_damaged_checkpoint_names_the_one_before(data_root: Path, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_config(data_root, tmp_path), Interrupt("validating"))
    latest = find_latest(tmp_path)
    assert latest.name == "epoch_2.pth"
    content = latest.read_bytes()
    latest.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    config = make_config(data_root, tmp_path, resume=True, load_from=str(latest))
    with pytest.raises(CheckpointError, match=r"epoch_2\.pth.*before it is whole: --resume .*epoch_1\.pth$"):
        Runner.from_cfg(config).train()
    (tmp_path / "epoch_1.pth").write_bytes(b"")  # and there is none to offer
    config.experiment_name = uuid.uuid4().hex
    with pytest.raises(CheckpointError) as error:
        Runner.from_cfg(config).train()
    assert "--resume" not in str(error.value)


def test_resuming_a_finished_run_changes_nothing(whole: Runner, data_root: Path) -> None:
    latest = find_latest(whole.work_dir)
    before = latest.read_bytes()
    again = train(make_config(data_root, Path(whole.work_dir), resume=True, load_from=str(latest)))
    assert again.epoch == EPOCHS
    assert histories(again) == histories(whole)
    assert latest.read_bytes() == before


def test_files_of_a_run(whole: Runner) -> None:
    folder = Path(whole.work_dir)
    kept = sorted(path.name for path in folder.glob("epoch_*.pth"))
    assert kept == [f"epoch_{EPOCHS - 1}.pth", f"epoch_{EPOCHS}.pth"]
    assert [path.name for path in folder.glob("best_*.pth")] == [find_best(folder).name]
    plain = torch.load(folder / kept[-1], weights_only=True)
    assert plain["meta"]["epoch"] == EPOCHS
    with Image.open(folder / "training.png") as picture:
        assert min(picture.size) > 500
    names, matrix = read_confusion(folder / "confusion_matrix.csv")
    assert names == [str(i) for i in range(CLASSES)]
    best = whole.message_hub.get_info("best_score")
    assert 100 * matrix.trace() / matrix.sum() == pytest.approx(best)
    lines = (Path(whole.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    assert sum("accuracy/top1" in json.loads(line) for line in lines) == EPOCHS


def test_console_is_short(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = train(make_config(data_root, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 1 + EPOCHS + 4
    assert all(f"epoch {i + 1}/{EPOCHS}" in lines[i + 1] for i in range(EPOCHS))
    assert "System environment" in Path(runner.logger.log_file).read_text()


def test_best_checkpoint_tests_as_in_training(
    whole: Runner, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data_root, tmp_path, load_from=str(find_best(whole.work_dir)))
    runner = Runner.from_cfg(config)
    metrics = runner.test()
    assert metrics["accuracy/top1"] == pytest.approx(whole.message_hub.get_info("best_score"))
    expected = read_confusion(Path(whole.work_dir, "confusion_matrix.csv"))[1]
    np.testing.assert_array_equal(read_confusion(Path(runner.log_dir, "confusion_matrix.csv"))[1], expected)


def test_checkpoint_of_another_model_is_refused(whole: Runner, data_root: Path, tmp_path: Path) -> None:
    config = make_config(data_root, tmp_path, load_from=str(find_best(whole.work_dir)))
    config.model.network.update(num_classes=5, class_token=False, global_pool="avg")
    runner = Runner.from_cfg(config)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        runner.test()
    for word in (find_best(whole.work_dir).name, "network.cls_token", "network.head.weight (4, 64)"):
        assert word in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in runner.model.state_dict().items())


@pytest.mark.parametrize("content", ["classifier", "training state"])
def test_the_weights_of_a_network_alone_belong_elsewhere(
    content: str, whole: Runner, data_root: Path, tmp_path: Path
) -> None:
    weights = whole.model.network.state_dict()
    path = tmp_path / "network.pth"
    torch.save({"model": weights, "epoch": 3} if content == "training state" else weights, path)
    runner = Runner.from_cfg(make_config(data_root, tmp_path, load_from=str(path)))
    with pytest.raises(
        CheckpointError, match=r"network\.pth.*; load_from wants .* go to init_cfg=dict\(type='Pretrained'"
    ) as error:
        runner.test()
    assert len(str(error.value).splitlines()) == 1
    resumed = Runner.from_cfg(make_config(data_root, tmp_path, load_from=str(path), resume=True))
    with pytest.raises(CheckpointError) as error:
        resumed.train()
    assert "init_cfg" not in str(error.value)


def test_ignored_modules_may_differ(whole: Runner, data_root: Path, tmp_path: Path) -> None:
    best = str(find_best(whole.work_dir))
    config = make_config(data_root, tmp_path, load_from=best, load_ignore=["network.head"])
    config.model.network.num_classes = 5
    runner = Runner.from_cfg(config)
    runner.load_or_resume()
    weights = read_checkpoint(best)["state_dict"]
    assert torch.equal(runner.model.network.pos_embed, weights["network.pos_embed"])


@pytest.mark.parametrize("option", [{"strict": False}, {"revise_keys": [("a", "b")]}])
def test_lenient_loading_is_refused(whole: Runner, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="load_ignore"):
        whole.load_checkpoint(str(find_best(whole.work_dir)), **option)


def test_a_network_for_other_classes_than_the_data_is_refused(data_root: Path, tmp_path: Path) -> None:
    config = make_config(data_root, tmp_path)
    config.model.network.num_classes = 5
    with pytest.raises(
        UserError, match=r"model\.network has num_classes=5, the data set of train_dataloader 4 classes"
    ):
        train(config)


def test_run_stops_at_a_loss_that_is_not_finite(data_root: Path, tmp_path: Path) -> None:
    class Spoil(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if runner.iter == 5:
                data_batch["inputs"] *= float("nan")

    with pytest.raises(UserError, match=r"iteration 6 \(epoch 2\)"):
        train(make_config(data_root, tmp_path), Spoil())
    assert find_latest(tmp_path).name == "epoch_1.pth"


def test_averaged_weights_are_resumed(data_root: Path, tmp_path: Path) -> None:
    ema = {"custom_hooks": [{"type": "EMAHook", "momentum": 0.1}]}
    expected = train(make_config(data_root, tmp_path / "whole", **ema))
    with pytest.raises(KeyboardInterrupt):
        train(make_config(data_root, tmp_path / "cut", **ema), Interrupt("training"))
    latest = str(find_latest(tmp_path / "cut"))
    resumed = train(make_config(data_root, tmp_path / "cut", resume=True, load_from=latest, **ema))
    assert histories(resumed) == histories(expected)


def test_report_without_validation_or_confusion(tmp_path: Path) -> None:
    draw_report(tmp_path / "a.png", "iterations only", {"train/loss": np.ones(3), "train/lr": np.ones(3)}, None)
    many = [f"class number {i}" for i in range(40)], np.eye(40, dtype=int)
    curves = {
        "train/loss": np.ones(100),
        "val/mIoU": np.array([0.1, 0.3, 0.2]),
        VALIDATED: np.array([30, 60, 100]),
    }
    draw_report(tmp_path / "b.png", "many classes", curves, many)
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_confusion_file_is_plain_csv(whole: Runner) -> None:
    with open(Path(whole.work_dir, "confusion_matrix.csv"), newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true \\ predicted", *map(str, range(CLASSES))]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(CLASSES)]
