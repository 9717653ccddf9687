"""Recordings of the original implementations, and how their weights and inputs were drawn.

A recording holds an original model's outputs for weights and an image that follow from names, shapes and
seeds alone, so no weight file is needed: :func:`draw` fills a tensor from its official name, :func:`image`
draws the input.
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "recordings"
_STEP_BIASES = ("dt_proj.bias", "dt_proj_b.bias", "dt_projs_bias", "dt_bias")
_VSSD_SCALES = {
    **dict.fromkeys((".cpe1.weight", ".cpe2.weight"), 0.3),
    **dict.fromkeys((".attn.out_proj.weight", ".attn.to_out.weight", ".mlp.fc2.weight"), 0.4),
}
_CHANNEL_NORM = re.compile(r"(^|\.)norm\..*(weight|bias)$")
_TOKENS = {"pos_embed", "cls_token", "dist_token", "mask_token", "absolute_pos_embed"}


@dataclass(frozen=True)
class Recording:
    """One recorded model: its arrays by name, and what is needed to draw its weights and input."""

    arrays: dict[str, Tensor]
    state_shapes: dict[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    seed: int
    parameters: int
    value_rule: str | None = None

    def weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The state dict in the original's names and layout; recordings made in float64 have their weights in it."""
        return {name: draw(name, shape, self.value_rule, dtype) for name, shape in self.state_shapes.items()}

    def image(self) -> Tensor:
        """The recorded input."""
        return image(self.input_shape, self.seed)


def load_arrays(name: str) -> tuple[dict[str, Tensor], dict]:
    """Arrays and facts of a recording."""
    with np.load(FOLDER / f"{name}.npz") as content:
        arrays = dict(content)
    meta = json.loads(zlib.decompress(arrays.pop("meta").tobytes()))
    return {key: torch.from_numpy(np.asarray(x)) for key, x in arrays.items()}, meta


def load(name: str) -> Recording:
    """The recording of a model."""
    arrays, meta = load_arrays(name)
    return Recording(
        arrays=arrays,
        state_shapes={key: tuple(shape) for key, shape in meta["state_dict"].items()},
        input_shape=tuple(meta["input_shape"]),
        seed=meta["seed"],
        parameters=meta["parameters"],
        value_rule=meta.get("value_rule"),
    )


def image(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise from numpy's frozen generator."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def draw(name: str, shape: tuple[int, ...], rule: str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that stand under an official name; the generator is seeded with the name's checksum.

    ``rule`` "vssd" draws smaller branches: else features would double in every block and bury most of the weights.
    "efficientvim" draws channel norms, of shapes (1, c, 1) and (1, c, 1, 1), as the vectors that they are.
    """
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if rule == "efficientvim" and _CHANNEL_NORM.search(name) and len(shape) > 1:
        return draw(name, (shape[1],), dtype=dtype).view(shape)
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    value = np.asarray(_scaled(name, noise))
    scales = {None: {}, "efficientvim": {}, "vssd": _VSSD_SCALES}[rule]
    return torch.from_numpy(value * next((scale for end, scale in scales.items() if name.endswith(end)), 1.0)).to(dtype)


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(noise)
    if leaf == "running_mean":
        return 0.1 * noise
    if leaf.startswith("A_") and "log" in leaf:
        return np.log(np.arange(1, noise.shape[-1] + 1)) + 0.1 * noise
    if name.endswith(_STEP_BIASES):
        return -4.5 + 0.7 * noise
    if leaf in ("D", "D_b", "Ds"):
        return 1 + 0.1 * noise
    if leaf in _TOKENS:
        return 0.2 * noise
    if noise.ndim >= 2:
        stacked = noise.ndim == 3 and leaf.endswith("_weight")  # (k, out, in): one projection for each order
        fan_in = noise.shape[-1] if stacked else int(np.prod(noise.shape[1:]))
        return noise / np.sqrt(fan_in)
    return 0.1 * noise if leaf.endswith("bias") else 1 + 0.1 * noise
