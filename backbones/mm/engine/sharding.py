"""Fully sharded data parallelism (FSDP2): each process keeps a share of weights, gradients and optimizer state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import Optimizer

from backbones.mm.errors import UserError
from backbones.weights.files import WRAPPERS

if TYPE_CHECKING:  # elsewhere imported where something is sharded: PyTorch has it from 2.6 on
    from torch.distributed.tensor import DTensor

_WRAPPED = re.compile("^(" + "|".join(map(re.escape, WRAPPERS)) + ")+")
WEIGHTS = ("state_dict", "ema_state_dict")  # in mmengine's checkpoints


@MODEL_WRAPPERS.register_module()
class FullyShardedModel(nn.Module):
    """Trains ``module`` with PyTorch's ``fully_shard``, where ``MMDistributedDataParallel`` keeps a copy per process.

    A block's weights are gathered for its forward and again for its backward pass; gradients are averaged over the
    processes. Weights stay in their dtype, so results are those of data parallelism but for rounding. Until
    :meth:`shard`, and thus in tests, every process holds the whole model.

    Args:
        module: a model of mmengine.
        units: names of the lists (``nn.ModuleList`` or ``nn.Sequential``) whose members are gathered one by one. What
            stands in none of them is gathered together.
    """

    def __init__(self, module: nn.Module, units: Sequence[str] = ("blocks",)) -> None:
        super().__init__()
        self.module: Any = module
        self.units = tuple(units)
        self.sharded = False

    def shard(self) -> None:
        """Keep the share of this process of every parameter; optimizers are built behind this.

        Raises:
            ValueError: the model has none of the lists ``units``.
            UserError: PyTorch is older than 2.6, or a parameter is a scalar, as FCOS's head has them, which cannot be
                divided.
        """
        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError as error:
            raise UserError(f"FullyShardedModel: got PyTorch {torch.__version__}, expected 2.6 or newer") from error
        from torch.distributed.device_mesh import init_device_mesh

        if scalars := [name for name, x in self.module.named_parameters() if x.ndim == 0]:
            raise UserError(
                f"FullyShardedModel: parameter {scalars[0]} is a scalar, which cannot be divided; "
                "leave model_wrapper_cfg away to train copies of this model"
            )
        lists = [x for name, x in self.module.named_modules() if name.rpartition(".")[2] in self.units]
        if not any(isinstance(x, nn.ModuleList | nn.Sequential) for x in lists):
            raise ValueError(f"units: got {self.units}, {type(self.module).__name__} has no such list of modules")
        device = next(self.module.parameters()).device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # By default, the weights that stand in no unit stay gathered after a forward pass without backward. The next
        # one would then miss what was changed in between, such as averaged weights that are exchanged.
        shard = partial(fully_shard, mesh=mesh, reshard_after_forward=True)
        for modules in lists:
            if isinstance(modules, nn.ModuleList | nn.Sequential):
                for module in modules:
                    shard(module)
        shard(self.module)
        # FSDP refuses copies; averages of weights want one of the parameters and buffers, not of what computes.
        vars(self.module)["__deepcopy__"] = lambda memo: _copy_state(self.module)
        self.sharded = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """See ``mmengine.model.BaseModel``."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> Any:
        """See ``mmengine.model.BaseModel``."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """See ``mmengine.model.BaseModel``."""
        return self.module.test_step(data)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of ``model``."""
    return isinstance(model, FullyShardedModel) and model.sharded


def _copy_state(module: nn.Module) -> nn.Module:
    """A module with copies of the parameters and buffers of ``module`` under the same names, that computes nothing."""
    copied = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        copied.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        copied.register_buffer(name, buffer.clone(), name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        copied.add_module(name, _copy_state(child))
    return copied


class GatherHook(Hook):
    """Puts whole tensors into a checkpoint in place of shares, so that it is that of a run of one process."""

    priority = "LOWEST"  # behind what adds tensors, such as averages

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if is_sharded(runner.model):
            for key in (*WEIGHTS, "optimizer"):
                if key in checkpoint:
                    checkpoint[key] = _gather(checkpoint[key])


def _gather(value: Any) -> Any:
    """``value`` with whole tensors on the CPU; with None in place of shares in all processes but the first."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        # mmengine has moved shares to the CPU, between which NCCL carries nothing.
        whole = cast("DTensor", value.to(value.device_mesh.device_type)).full_tensor()
        return whole.cpu() if is_main_process() else None
    if isinstance(value, Mapping):
        for key in value:
            value[key] = _gather(value[key])  # type: ignore[index]  # in place: a state dict has attributes, too
    elif isinstance(value, list):
        return [_gather(item) for item in value]
    return value


class _NoFile(LocalBackend):
    """Writes nothing: what a process hands over that only helps to gather a checkpoint."""

    def put(self, obj: bytes, filepath: Any) -> None:
        pass


register_backend("nothing", _NoFile, force=True)


def share(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Replace whole weights in ``checkpoint``, averages included, by the shares that ``model`` needs.

    What fits no parameter stays as it is, and loading will name it.
    """
    own = model.state_dict()
    for key in WEIGHTS:
        weights = checkpoint.get(key)
        if isinstance(weights, dict):
            for name, x in weights.items():
                weights[name] = _share_like(x, own.get(_WRAPPED.sub("", name)))


def share_state(state: dict[str, Any], optimizer: Optimizer) -> None:
    """Replace whole tensors in the ``state_dict`` of an optimizer by the shares that ``optimizer`` needs."""
    for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(old["params"], new["params"], strict=True):
            values = state["state"].get(number, {})
            values.update({name: _share_like(x, parameter) for name, x in values.items()})


def _share_like(value: Any, like: Any) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the whole: nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
