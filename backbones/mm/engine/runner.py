"""mmengine's Runner with a short console, complete checkpoint loading and several processes on the CPU."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mmengine.runner
import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_distributed, is_main_process
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from torch import nn

from backbones.mm import mmcv_ext
from backbones.mm.app.console import hidden_prints
from backbones.mm.data.datasets import compare_classes
from backbones.mm.engine.checkpoints import (
    find_before,
    load_weights,
    lock,
    read_checkpoint,
    require_folder,
    select_state_dict,
)
from backbones.mm.engine.hooks import ClassWeightsHook, LabelRangeHook
from backbones.mm.engine.resume import overridden, read_settings, require_same_groups, require_same_kind
from backbones.mm.engine.sharding import FullyShardedModel, GatherHook, is_sharded, share, share_state
from backbones.mm.errors import UserError
from backbones.weights import CheckpointError

_DETECTION_HEAD = re.compile(r"(^|\.)(rpn_head|bbox_head|mask_head)(\.\d+)?$")


def _concerns_the_user(record: logging.LogRecord) -> bool:
    # Whenever a run starts, mmengine warns about its own use of its own deprecated classes, and that mmseg's IoUMetric
    # has no prefix.
    return not any(name in record.getMessage() for name in ("FileClient", "HardDiskBackend", "prefix is not set"))


def _run_name(experiment: str) -> str:
    """``config`` of mmengine's ``config_date_time``."""
    return experiment.rsplit("_", 2)[0]


def _with_device(env_cfg: dict[str, Any], launcher: str) -> dict[str, Any]:
    """Settings that also tell NCCL the GPU of this process; it would guess, with a warning at every barrier."""
    settings = env_cfg.get("dist_cfg", {})
    local_rank = os.environ.get({"pytorch": "LOCAL_RANK", "slurm": "SLURM_LOCALID"}.get(launcher, ""))
    if get_device() != "cuda" or settings.get("backend", "nccl") != "nccl" or local_rank is None:
        return env_cfg
    return {**env_cfg, "dist_cfg": {"device_id": torch.device("cuda", int(local_rank)), **settings}}


def _widen(values: Any) -> Any:
    """bfloat16 tensors as float32, in any nesting of tuples and lists."""
    if isinstance(values, tuple | list):
        return type(values)(map(_widen, values))
    return values.float() if isinstance(values, torch.Tensor) and values.dtype == torch.bfloat16 else values


def _keep_from_bfloat16(model: nn.Module) -> None:
    """Feed mmcv's RoIAlign and NMS, which know no bfloat16, with float32 features and outputs of heads."""
    for name, module in model.named_modules():
        if hasattr(module, "roi_layers"):
            module.register_forward_pre_hook(lambda _, inputs: _widen(inputs))
        elif _DETECTION_HEAD.search(name):
            module.register_forward_hook(lambda _, inputs, outputs: _widen(outputs))


@RUNNERS.register_module(name="BackbonesRunner")
class Runner(mmengine.runner.Runner):
    """mmengine's ``Runner`` for any task, configured by the same keys and two more.

    ``verbose``: also print on the console what the log file gets (environment, config, every logged step).
    ``load_ignore``: modules, such as ``"network.head"``, in which ``load_from`` may differ from the model.
    """

    @classmethod
    def from_cfg(cls, cfg: Any) -> Runner:
        """The run that ``cfg`` describes.

        Raises:
            UserError: nothing can be written to its work directory.
        """
        require_folder(cfg["work_dir"])
        return super().from_cfg(cfg)

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(log_level, log_file, **kwargs)
        if not self.cfg.get("verbose", False):
            for handler in logger.handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.setLevel(logging.WARNING)
                    handler.addFilter(_concerns_the_user)
        return logger

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        super().register_default_hooks(hooks)
        self.register_hook(LabelRangeHook())
        self.register_hook(ClassWeightsHook())
        self.register_hook(GatherHook())

    scaled_lr: tuple[float, int, int] | None = None
    """Factor of the learning rate, images of a step, and those of the recipe, if ``auto_scale_lr`` is enabled."""

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """As mmengine's, but for batches whose gradients are accumulated, which make one step.

        Raises:
            UserError: the config does not state the batch size of its recipe.
        """
        if not auto_scale_lr or not auto_scale_lr.get("enable"):
            return
        if "base_batch_size" not in auto_scale_lr:
            raise UserError(
                "auto_scale_lr: the config does not state base_batch_size, the images of a step of its recipe"
            )
        loader, base = self._train_dataloader, auto_scale_lr["base_batch_size"]
        batch = loader["batch_size"] if isinstance(loader, dict) else loader.batch_size
        images = batch * self.world_size * getattr(optim_wrapper, "_accumulative_counts", 1)
        for group in optim_wrapper.optimizer.param_groups:
            group["lr"] *= images / base
        self.scaled_lr = images / base, images, base

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        with hidden_prints(self.cfg.get("verbose", False)):
            built = super().build_model(model)
        if mmcv_ext.stands_in():
            self.logger.info(mmcv_ext.SUMMARY)
        return built

    @contextlib.contextmanager
    def _alone(self, verb: str) -> Iterator[None]:
        """The work directory is this run's; third parties print nothing."""
        guard = lock(self.work_dir, verb) if is_main_process() else contextlib.nullcontext()
        with guard, hidden_prints(self.cfg.get("verbose", False)):
            yield

    def train(self) -> nn.Module:
        """Train as the config says; returns the model."""
        with self._alone("trains"), warnings.catch_warnings():
            if self.cfg.get("optim_wrapper", {}).get("accumulative_counts", 1) > 1:
                # Schedules count batches, so they come before the first step of the optimizer.
                warnings.filterwarnings("ignore", r"Detected call of `scheduler\.step\(\)` before", UserWarning)
            if isinstance(self.model, FullyShardedModel):
                super()._init_model_weights()  # needs whole weights, and the optimizer their shares
                self.model.shard()
            return super().train()

    def _init_model_weights(self) -> None:
        if not is_sharded(self.model):
            super()._init_model_weights()

    def val(self) -> dict[str, float]:
        """Validate; returns the metrics."""
        with self._alone("validates"):
            return super().val()

    def test(self) -> dict[str, float]:
        """Test; returns the metrics."""
        with self._alone("tests"):
            return super().test()

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        # mmengine selects a CUDA device before it opens the process group, whatever the backend.
        if self.distributed and get_device() == "cpu" and not is_distributed():
            if self._launcher != "pytorch":
                raise UserError(f"launcher {self._launcher!r} needs a GPU; on CPUs use torchrun and 'pytorch'")
            torch.distributed.init_process_group("gloo")
        super().setup_env(_with_device(env_cfg, self._launcher) if self.distributed else env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        _keep_from_bfloat16(model)
        if self.distributed and get_device() == "cpu" and model_wrapper_cfg is None:
            model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
                "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As mmengine's, which the first process alone runs; shares are gathered by all of them."""
        if not is_sharded(self.model):
            super().save_checkpoint(*args, **kwargs)
            return
        if not is_main_process():
            kwargs["backend_args"] = {"backend": "nothing"}
        mmengine.runner.Runner.save_checkpoint.__wrapped__(self, *args, **kwargs)

    def _compare_classes(self, dataset_meta: dict[str, Any], filename: str) -> None:
        for name, loop in (("train", self._train_loop), ("val", self._val_loop), ("test", self._test_loop)):
            if isinstance(loop, dict | None):
                continue  # not built: this run does not use it
            found = getattr(loop.dataloader.dataset, "metainfo", {}).get("classes")
            if found and dataset_meta.get("classes"):
                compare_classes(found, f"the data set of {name}_dataloader", dataset_meta["classes"], filename)

    def _compare_settings(self, checkpoint: dict[str, Any], filename: str) -> None:
        """Refuse what cannot be resumed, and say what the checkpoint overrides.

        Raises:
            UserError: the checkpoint has no state of a training run, or another optimizer, schedules or groups.
        """
        if missing := [key for key in ("meta", "message_hub", "optimizer") if key not in checkpoint]:
            raise UserError(
                f"{filename} cannot be resumed: it holds weights, but not the state of a run ({', '.join(missing)}); "
                "load_from starts a run from weights"
            )
        meta, groups = checkpoint["meta"], checkpoint["optimizer"]["param_groups"]
        old, new = read_settings(meta.get("cfg", "")), read_settings(self.cfg.pretty_text)
        require_same_kind(old, new, filename)
        require_same_groups(groups, self.optim_wrapper.optimizer, filename)
        lines = overridden(old, new, groups, self.optim_wrapper.optimizer)
        seed = self._randomness_cfg.get("seed")
        if meta.get("seed") not in (None, seed):
            if seed is not None:
                lines.append(f"seed: {meta['seed']} of the checkpoint counts, not {seed} of the config")
            self._take_seed(meta["seed"])
        images = [
            settings.get("train_dataloader", {}).get("batch_size", 0) * devices
            for settings, devices in ((old, meta.get("world_size", get_world_size())), (new, get_world_size()))
        ]
        if old and images[0] != images[1]:
            lines.append(
                f"batch size: {images[1]} images of the config count, not {images[0]} of the checkpoint, by "
                "whose steps iterations are counted and the learning rate is scheduled"
            )
        for line in lines:
            self.logger.warning(f"resumed from {filename}: {line}")

    def _take_seed(self, seed: int) -> None:
        """Draw what is drawn from now on, the order of the training images included, with ``seed``."""
        # Without the other one mmengine says nothing.
        self._randomness_cfg.update(seed=None)
        loader = self.train_dataloader
        samplers: list[Any] = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
        for sampler in samplers:
            if hasattr(sampler, "seed"):
                sampler.seed = seed

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = True,
        revise_keys: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Load ``filename`` into the model in full, without running code from it.

        Raises:
            CheckpointError: the file cannot be read, or weights are missing, unknown or misshapen; named.
            ValueError: ``strict=False`` or ``revise_keys``, which hide such weights.
        """
        if not strict or revise_keys:
            raise ValueError("strict=False and revise_keys are not supported; set load_ignore in the config")
        if is_sharded(self.model):
            map_location = "cpu"  # the whole is not to be on every GPU
        try:
            checkpoint = read_checkpoint(filename, map_location)
        except CheckpointError as error:
            before = find_before(filename) if self._resume else None
            if before is None:
                raise
            raise CheckpointError(f"{error}; the checkpoint before it is whole: --resume {before}") from None
        model = self.model.module if is_model_wrapper(self.model) else self.model
        if is_sharded(self.model):
            share(checkpoint, model)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        ignore = () if self._resume else self.cfg.get("load_ignore", ())
        meta = checkpoint.get("meta")
        # Tells at once what a checkpoint that does not fit is made for.
        run = f" (written by {_run_name(meta['experiment_name'])})" if meta and "experiment_name" in meta else ""
        try:
            weights = select_state_dict(checkpoint, filename)
            ignored = load_weights(model, weights, f"{filename}{run}", ignore)
        except CheckpointError as error:
            if self._resume:
                raise
            raise CheckpointError(
                f"{error}; load_from wants the weights of the whole model, those of a classifier or a backbone alone "
                "go to init_cfg=dict(type='Pretrained', checkpoint=...)"
            ) from None
        if ignored:
            self.logger.warning(f"not loaded from {filename} (load_ignore): {', '.join(ignored)}")
        if self._resume or isinstance(self._train_loop, dict | None):
            self._compare_classes((meta or {}).get("dataset_meta") or {}, filename)
        if self._resume:
            self._compare_settings(checkpoint, filename)
            if is_sharded(self.model):
                share_state(checkpoint["optimizer"], self.optim_wrapper.optimizer)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint
