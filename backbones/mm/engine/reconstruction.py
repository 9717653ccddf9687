"""A picture of what a masked image model paints, at the end of its training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from backbones.mm.app.pictures import draw_reconstructions
from backbones.mm.errors import UserError
from backbones.mm.models.masked import MaskedImageModelling

_PICTURE = "reconstructions.png"


@HOOKS.register_module()
class ReconstructionHook(Hook):
    """Draws ``reconstructions.png`` in the work directory: training images masked, painted, and as they are.

    Args:
        count: images, the first of the data set.
        mean: of the data set's normalisation, for each channel.
        std: likewise.
    """

    def __init__(
        self,
        count: int = 8,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.count, self.mean, self.std = count, mean, std
        # The stream of this moment: during a run, Runner hides what others print.
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    @master_only
    def after_train(self, runner: Runner) -> None:
        model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, MaskedImageModelling):
            raise UserError(f"ReconstructionHook: got a {type(model).__name__}, expected a MaskedImageModelling")
        data = runner.train_dataloader.dataset
        step = max(len(data) // self.count, 1)
        samples = [data[i]["inputs"] for i in range(0, min(step * self.count, len(data)), step)]
        inputs = torch.stack(samples).to(next(model.parameters()).device)
        mask, rebuilt = painted(model, inputs)
        picture = Path(runner.work_dir, _PICTURE)
        images, rebuilt = (self._pixels(x) for x in (inputs, rebuilt))
        title = f"{model.name}: {int(mask[0].sum())} of {mask[0].numel()} cells masked"
        draw_reconstructions(picture, title, images.numpy(), mask.cpu().numpy(), rebuilt.numpy())
        self.console.print(f"picture     {picture}")

    def _pixels(self, x: Tensor) -> Tensor:
        """Normalised images (b, c, h, w) as (b, h, w, c) from 0 to 1."""
        x = x.float().cpu().permute(0, 2, 3, 1)
        return x * x.new_tensor(self.std) + x.new_tensor(self.mean)


@torch.no_grad()
def painted(model: MaskedImageModelling, inputs: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masked cells (b, rows, columns), always the same, and what the model paints of ``inputs``, as they are.

    Of a model with ``norm_cells``, each cell gets the mean and deviation of the original back.
    """
    training = model.training
    model.eval()
    mask = model.draw_mask(inputs, torch.Generator().manual_seed(seed))
    rebuilt = model.rebuild(inputs, mask)
    if model.norm_cells:
        mean, deviation = model.cell_statistics(inputs)
        stride = model.pretraining.stride
        rebuilt = F.pixel_shuffle(F.pixel_unshuffle(rebuilt, stride) * deviation + mean, stride)
    model.train(training)
    return mask, rebuilt
