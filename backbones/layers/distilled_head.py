"""GroupMamba's head: a block on the pooled token alone, and a classifier, or one more that a teacher taught."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import Mlp, SelectAdaptivePool2d
from torch import Tensor, nn

from backbones.layers.constructor import Constructor
from backbones.layers.half_weights import with_half_weights
from backbones.layers.norm import LayerNorm, residual_norm

_norm = partial(LayerNorm, eps=1e-6)
_branch_norm = partial(_norm, autocast_out=True)


class ClassBlock(nn.Module):
    """x + norm(mixer(x)), then x + mlp(norm(x)), on a pooled token that is its own 1 x 1 map."""

    def __init__(
        self,
        dim: int,
        mixer: Constructor,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer(dim, device=device, dtype=dtype)
        self.norm1 = _norm(dim, device=device, dtype=dtype)
        self.norm2 = _branch_norm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(dim, 4 * dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 1, 1, dim) to (b, 1, 1, dim)."""
        x, y = residual_norm(x, self.norm1(self.mixer(x)), self.norm2)
        return x + self.mlp(y)


class DistilledHead(nn.Module):
    """Pooling, class block, norm, and one classifier or two, with the interface of timm's ``ClassifierHead``.

    Without pooling there is no token for the class block: the map is normalised and classified cell by cell.

    Args:
        in_features: width of the map.
        num_classes: size of the classifiers, 0 for none.
        mixer: constructor of the class block's mixer.
        distillation: have a second classifier, for the labels of a teacher.
        pool_type: "avg", "max", "avgmax", or "" for no pooling.
        drop_rate: dropout before the classifiers.
        input_fmt: "NHWC", the one layout there is here.

    Raises:
        ValueError: an unknown ``pool_type`` or ``input_fmt``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        mixer: Constructor,
        distillation: bool = True,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        input_fmt: str = "NHWC",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_fmt != "NHWC":
            raise ValueError(f"input_fmt: got {input_fmt!r}, expected 'NHWC'")
        self.num_features, self.distillation = in_features, distillation
        self.distilled_training = False
        self.class_block: nn.Module = ClassBlock(in_features, mixer, device=device, dtype=dtype)
        self.norm: nn.Module = _norm(in_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replaces the classifiers by fresh ones, and the pooling where given; 0 classes remove them."""
        if pool_type is not None:
            known = ("avg", "max", "avgmax", "")
            if pool_type not in known:
                raise ValueError(f"global_pool: got {pool_type!r}, expected one of {known}")
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, input_fmt="NHWC")
        self.num_classes = num_classes
        self.fc = self._classifier()
        self.fc_dist = self._classifier() if self.distillation else None

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = next(self.parameters(), torch.empty(0))
        fc = nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
        nn.init.normal_(fc.weight, std=0.02)
        nn.init.zeros_(fc.bias)
        return fc

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(b, h, w, c) to logits: the mean of both classifiers, or in distilled training the pair of them."""
        return with_half_weights(self._logits, self, x, pre_logits)

    def _logits(self, x: Tensor, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        if self.global_pool.pool_type:
            x = self.class_block(self.global_pool(x))[:, 0, 0]
        x = self.drop(self.norm(x))
        if pre_logits or self.num_classes == 0:
            return x
        if self.fc_dist is None:
            return self.fc(x)
        logits, distilled = self.fc(x), self.fc_dist(x)
        return (logits, distilled) if self.distilled_training and self.training else (logits + distilled) / 2
