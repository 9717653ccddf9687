"""CUDA graphs in mmengine's runs."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from backbones.graphs import cuda_graphs
from backbones.mm.engine.sharding import is_sharded
from backbones.mm.errors import UserError


@HOOKS.register_module()
class CudaGraphsHook(Hook):
    """Replays CUDA graphs of the network of a classifier, or of the backbone of a detector or segmentor.

    See :func:`backbones.cuda_graphs`. Batches of the first training batch's shape are replayed, others run as ever: for
    detection that means pipelines that resize or crop to one fixed size.

    Raises:
        UserError: the run is not on a GPU, the model has neither a network nor a backbone, or processes hold shares
            of it.
    """

    def before_train(self, runner: Runner) -> None:
        if is_sharded(runner.model):
            raise UserError("CudaGraphsHook: a graph cannot gather the weights of a FullyShardedModel; use one of both")
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        network = getattr(model, "network", None) or getattr(model, "backbone", None)
        if network is None:
            raise UserError(f"CudaGraphsHook: {type(model).__name__} has no network and no backbone to replay")
        try:
            cuda_graphs(network)
        except ValueError as error:
            raise UserError(f"CudaGraphsHook: {error}") from error
