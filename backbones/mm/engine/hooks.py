"""Hooks: exact resumption, a stop at labels out of range or a loss that is not finite, progress on the console."""

from __future__ import annotations

import atexit
import logging
import math
import random
import sys
import time
from datetime import timedelta
from itertools import chain
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from backbones.mm.app.console import brief
from backbones.mm.engine.checkpoints import to_history, to_plain
from backbones.mm.errors import UserError
from backbones.mm.models.losses import WeightedCrossEntropy

VALIDATED = "validated/iter"


def validation_due(runner: Runner, step: int) -> bool:
    """Whether the train loop validates after ``step`` epochs (or iterations, if it counts those)."""
    loop = runner.train_loop
    last = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
    due = step >= loop.val_begin and (step % loop.val_interval == 0 or step == last)
    return runner.val_loop is not None and due


def _loss(outputs: dict[str, Any] | None) -> float | None:
    return None if not outputs or "loss" not in outputs else torch.as_tensor(outputs["loss"]).item()


def _no_lost_gradients(record: logging.LogRecord) -> bool:
    # mmengine's warning, when it resumes amid an accumulation.
    return "Resumed iteration number is not divisible" not in record.getMessage()


@HOOKS.register_module()
class ResumeHook(Hook):
    """Makes a resumed run equal to one that was never interrupted.

    Random numbers depend on the seed, the iteration and the rank only; a validation that the interruption cut
    off is made up for; early stopping counts what was validated before; gradients that are being accumulated are kept,
    in runs of one process; and checkpoints hold tensors and plain values, so that reading them runs no code. Data
    loading workers must not be persistent, and with them checkpoints belong at the ends of epochs.
    """

    # Every other hook must be ready before the validation that is made up for.
    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        self._repeat_early_stopping(runner)
        step = runner.epoch if isinstance(runner.train_loop, EpochBasedTrainLoop) else runner.iter
        if step and validation_due(runner, step) and self._last_validated(runner) != runner.iter:
            runner.val_loop.run()

    # One seed for the data of an iteration, one for its training step: a data loader that starts amid a run
    # draws one random number more than one that goes on.
    def before_train_epoch(self, runner: Runner) -> None:
        self._seed(runner, runner.iter, stage=0)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._seed(runner, runner.iter, stage=1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self._seed(runner, runner.iter + 1, stage=0)

    def before_val_epoch(self, runner: Runner) -> None:
        if isinstance(runner._train_loop, dict | None):
            return  # validation alone, there is no iteration to remember
        runner.message_hub.update_scalar(VALIDATED, runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["world_size"] = get_world_size()
        # Amid an accumulation there are gradients. Those of other processes are not at hand: they are lost.
        if getattr(runner.optim_wrapper, "_accumulative_counts", 1) > 1 and get_world_size() == 1:
            gradients = {name: x.grad for name, x in runner.model.named_parameters() if x.grad is not None}
            if gradients:
                checkpoint["gradients"] = gradients
        for key in ("meta", "message_hub"):
            checkpoint[key] = to_plain(checkpoint[key])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if runner._resume and get_world_size() == 1 and "gradients" in checkpoint:
            for name, parameter in runner.model.named_parameters():
                if name in checkpoint["gradients"]:
                    parameter.grad = checkpoint["gradients"][name].to(parameter)
            for handler in runner.logger.handlers:
                handler.addFilter(_no_lost_gradients)
        if "message_hub" in checkpoint:
            scalars = checkpoint["message_hub"]["log_scalars"]
            checkpoint["message_hub"]["log_scalars"] = {key: to_history(value) for key, value in scalars.items()}

    @staticmethod
    def _repeat_early_stopping(runner: Runner) -> None:
        """Show mmengine's hook, which keeps its count nowhere, the validations before the interruption."""
        for hook in runner.hooks:
            if isinstance(hook, EarlyStoppingHook):
                history = runner.message_hub.log_scalars.get(f"val/{hook.monitor}")
                for value in history.data[0].tolist() if history else []:
                    hook.after_val_epoch(runner, {hook.monitor: value})

    @staticmethod
    def _last_validated(runner: Runner) -> int | None:
        history = runner.message_hub.log_scalars.get(VALIDATED)
        return None if history is None else int(history.current())

    @staticmethod
    def _seed(runner: Runner, iteration: int, stage: int) -> None:
        seeds = np.random.SeedSequence([runner.seed, iteration, stage, get_rank()]).generate_state(3).tolist()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.manual_seed(seeds[2])


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a run whose loss is no longer finite, before a checkpoint of it is written."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        loss = _loss(outputs)
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in iteration {runner.iter + 1} (epoch {runner.epoch + 1}); "
                "a lower learning rate or --amp bfloat16 instead of float16 may help"
            )


class LabelRangeHook(Hook):
    """Stops a run whose network has another number of classes than the data, or whose label maps hold more of them.

    The loss would end with an index error, on a GPU one that names nothing; IoU would not count such pixels.
    """

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        found = getattr(getattr(model, "network", None), "num_classes", None)
        classes = getattr(runner.train_dataloader.dataset, "metainfo", {}).get("classes")
        if found and classes is not None and found != len(classes):  # 0: no classifier, as in pre-training
            raise UserError(
                f"model.network has num_classes={found}, the data set of train_dataloader {len(classes)} classes"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._check(runner.train_dataloader.dataset, data_batch)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._check(runner.val_dataloader.dataset, data_batch)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._check(runner.test_dataloader.dataset, data_batch)

    @staticmethod
    def _check(dataset: Any, data_batch: Any) -> None:
        samples = data_batch.get("data_samples", ()) if isinstance(data_batch, dict) else ()
        # With test-time augmentation they are lists, one for each view.
        for sample in chain.from_iterable(x if isinstance(x, list | tuple) else [x] for x in samples):
            if "gt_sem_seg" not in sample:
                continue
            classes = dataset.metainfo["classes"]
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= len(classes)) & (labels != 255)]
            if len(wrong):
                raise UserError(
                    f"label map {sample.get('seg_map_path')} holds label {int(wrong.max())} (as the model gets it), "
                    f"expected 0 to {len(classes) - 1}, or 255 for none; check classes and reduce_zero_label"
                )


class ClassWeightsHook(Hook):
    """Counts the training images of each class for a loss that weighs them."""

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        criterion = getattr(model, "criterion", None)
        if isinstance(criterion, WeightedCrossEntropy):
            dataset = runner.train_dataloader.dataset
            labels = [dataset.get_data_info(i)["gt_label"] for i in range(len(dataset))]
            criterion.count(torch.bincount(torch.tensor(labels), minlength=model.network.num_classes))


@HOOKS.register_module()
class ProgressHook(Hook):
    """One line for every epoch or validation; on a terminal also a bar with the time that is left."""

    # After CheckpointHook (90), before ResumeHook (100).
    priority = 95

    def __init__(self) -> None:
        # The stream of this moment: during a run, Runner hides what others print.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.losses: list[float] = []

    def before_train(self, runner: Runner) -> None:
        self.start, self.first_iter = time.perf_counter(), runner.iter
        self.lap = self.start
        if not is_main_process():
            return
        parameters = sum(p.numel() for p in runner.model.parameters()) / 1e6
        device = next(runner.model.parameters()).device.type
        threads = f" ({torch.get_num_threads()} threads)" if device == "cpu" else ""
        self.console.print(
            f"{runner.experiment_name.rsplit('_', 2)[0]}: {parameters:.2f} M parameters, "
            f"{len(runner.train_dataloader.dataset)} training images, {self._length(runner)} "
            f"on {device}{threads}"
        )
        if scaled := getattr(runner, "scaled_lr", None):
            factor, images, base = scaled
            self.console.print(f"learning rate times {factor:.4g}: {images} images per step, {base} in the recipe")
        if runner.iter:
            self.console.print(f"resumed after {self._step(runner)}")
        if self.console.is_terminal:
            bar = BarColumn(bar_width=30), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn()
            self.progress = Progress(TextColumn("{task.description}"), *bar, console=self.console, transient=True)
            self.task = self.progress.add_task("", total=runner.max_iters, completed=runner.iter)
            self.progress.start()
            atexit.register(self.progress.stop)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if (loss := _loss(outputs)) is not None:
            self.losses.append(loss)
        if self.progress is not None:
            shown = "training" if loss is None else f"training  loss {loss:.3f}"
            self.progress.update(self.task, completed=runner.iter + 1, description=shown)

    def after_train_epoch(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and not validation_due(runner, runner.epoch + 1):
            self._report(runner, f"epoch {runner.epoch + 1}/{runner.max_epochs}", runner.iter, {})

    def before_val_epoch(self, runner: Runner) -> None:
        if self.progress is not None:
            self.progress.update(self.task, description="validating")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not isinstance(runner._train_loop, dict | None):
            self._report(runner, self._step(runner), runner.iter, metrics or {})

    def after_train(self, runner: Runner) -> None:
        if self.progress is not None:
            self.progress.stop()
        if runner.train_loop.stop_training and is_main_process():
            self.console.print(f"stopped early after {self._step(runner)}")

    def _report(self, runner: Runner, step: str, iteration: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        parts = [step]
        if self.losses:
            parts.append(f"loss {np.mean(self.losses):.4f}")
        if metrics:
            parts.append(brief(metrics))
        parts.append(f"{now - self.lap:.1f} s")
        if iteration > self.first_iter and iteration < runner.max_iters:
            left = (now - self.start) / (iteration - self.first_iter) * (runner.max_iters - iteration)
            parts.append(f"{timedelta(seconds=round(left))} left")
        self.lap, self.losses = now, []
        if is_main_process():
            self.console.print("  ".join(parts))

    @staticmethod
    def _step(runner: Runner) -> str:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            return f"epoch {runner.epoch:>{len(str(runner.max_epochs))}}/{runner.max_epochs}"
        return f"iteration {runner.iter:>{len(str(runner.max_iters))}}/{runner.max_iters}"

    @staticmethod
    def _length(runner: Runner) -> str:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            return f"{runner.max_epochs} epochs"
        return f"{runner.max_iters} iterations"
