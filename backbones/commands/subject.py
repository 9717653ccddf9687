"""Models to look at: from a name of timm's, or from a config for classification, detection or segmentation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.models import PretrainedCfg
from torch import Tensor

import backbones  # noqa: F401  (registers the models in timm)
from backbones.configs import is_config
from backbones.images import UNREADABLE, read_image
from backbones.patterns import PATTERNS
from backbones.suggest import did_you_mean


@dataclass(frozen=True)
class Subject:
    """A model to look at, in evaluation mode.

    Attributes:
        title: its name, and whether its weights are random.
        module: a timm model, or the backbone of a detector or segmentor, which returns its maps.
        mean, std: of RGB in 0..1, which normalise an image.
        size: height and width of the image that it expects, or None where any will do.
    """

    title: str
    module: Any
    mean: Sequence[float]
    std: Sequence[float]
    size: tuple[int, int] | None

    def prepare(self, image: Image.Image) -> Tensor:
        """(1, 3, height, width)."""
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return ((x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]).unsqueeze(0)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps (b, c, h, w)."""
        if hasattr(self.module, "forward_intermediates"):
            return self.module.forward_intermediates(x, intermediates_only=True)
        return list(self.module(x))


def load_subject(args: argparse.Namespace) -> Subject:
    """The model that ``args.model`` names.

    Raises:
        ValueError: there is no such model or config, or the checkpoint does not fit.
    """
    if args.checkpoint and Path(args.checkpoint).is_dir():
        args.checkpoint = _best_of_run(args.checkpoint)
    if is_config(args.model):
        return _from_config(args)
    if not timm.is_model(args.model):
        raise ValueError(f"unknown model {args.model!r}{did_you_mean(args.model, [*timm.list_models(), *PATTERNS])}")
    cfg = timm.get_pretrained_cfg(args.model) or PretrainedCfg(input_size=(3, 224, 224))
    size = args.size or cfg.input_size[1:]
    sized: dict[str, Any] = {"img_size": size} if cfg.fixed_input_size else {}
    if args.checkpoint:
        overlay = {"file": args.checkpoint}
        module = timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay=overlay, **sized)
    else:
        module = timm.create_model(args.model, pretrained=args.pretrained, **sized)
    weights = "" if args.checkpoint or args.pretrained else ", random weights"
    return Subject(f"{args.model}{weights}", module.eval(), cfg.mean, cfg.std, size)


def _from_config(args: argparse.Namespace) -> Subject:
    from backbones.mm.app.cli import read_config
    from backbones.mm.app.inference import build_model
    from backbones.mm.engine.checkpoints import load_weights, read_checkpoint, select_state_dict

    if args.pretrained:
        raise ValueError("--pretrained is for models of timm's; a config takes --checkpoint FILE")
    config = read_config(args.model)
    model = build_model(config)
    if args.checkpoint:
        load_weights(model, select_state_dict(read_checkpoint(args.checkpoint), args.checkpoint), args.checkpoint)
    title = Path(args.model).stem + ("" if args.checkpoint else ", random weights")
    model.eval()
    if hasattr(model, "backbone"):
        settings = config.model.data_preprocessor
        mean, std = (tuple(x / 255 for x in settings[key]) for key in ("mean", "std"))
        return Subject(title, model.backbone, mean, std, args.size)
    cfg = model.network.pretrained_cfg
    size = args.size or getattr(model.network, "img_size", None) or cfg["input_size"][1:]
    return Subject(title, model.network, cfg["mean"], cfg["std"], tuple(size))


def _best_of_run(folder: str) -> str:
    """The best checkpoint if ``folder`` is a run's work directory, else the folder itself, which may hold weights."""
    if not any(Path(folder).glob("*.pth")) and not Path(folder, "best_checkpoint").exists():
        return folder
    from backbones.mm.engine.report import find_best

    return str(find_best(folder))


def load_image(path: str, size: tuple[int, int] | None) -> Image.Image:
    """The image in RGB; of another shape than ``size``, (height, width), its centre, as large as fits.

    Nothing is squashed: the image is resized until it covers ``size``, and what is beyond is cut off. Its ``info`` then
    says what is left, under "title".

    Raises:
        ValueError: no such file, or no image.
    """
    try:
        image = read_image(path)
    except UNREADABLE as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
    title = "image"
    if size is not None:
        width, height = image.size
        scale = max(size[0] / height, size[1] / width)
        shown = round(100 * size[0] / scale / height), round(100 * size[1] / scale / width)
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        if min(shown) < 100:
            side = "height" if shown[0] < shown[1] else "width"
            title = f"image: central {min(shown)} % of its {side}"
    image.info["title"] = title
    return image
