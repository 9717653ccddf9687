"""Models for other runtimes: ONNX files without any custom operator, and ``torch.export`` programs.

In ONNX the selective scan becomes loop-free arithmetic; each operator's ``onnx`` module translates it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from backbones.ops.depthwise import onnx as depthwise
from backbones.ops.scan import onnx as scan
from backbones.ops.ssd import onnx as ssd

OPSET = 20


def export_program(model: nn.Module, image: Tensor) -> ExportedProgram:
    """Traces ``model`` for images of the size of ``image`` (b, in_chans, height, width) and any batch size.

    The scan stays one operator: whoever loads the saved program imports ``backbones.ops`` first.
    """
    example = image.expand(2, -1, -1, -1) if len(image) == 1 else image  # a batch of 1 would be taken for a constant
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))


def export_onnx(model: nn.Module, image: Tensor, path: str | Path) -> None:
    """Writes ``model`` as ONNX (opset 20, standard operators only) for images as ``image``, in any number.

    Its input is called "image"; its output "logits" or, of a model that gives several, "output_0" and so on.

    Args:
        model: in eval mode and in float32.
        image: (b, in_chans, height, width); the sides are fixed by it, the batch size is not.
        path: the file to write.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is in training mode or in another precision.
    """
    if model.training:
        raise ValueError("model: in training mode, call eval() first")
    foreign = {x.dtype for x in model.parameters()} - {torch.float32}
    if foreign:
        raise ValueError(f"model: has parameters of {foreign.pop()}, expected torch.float32")
    to_onnx(export_program(model, image), ["image"]).save(path)


def to_onnx(program: ExportedProgram, input_names: Sequence[str]) -> ONNXProgram:
    """A program whose scans are the operator of this library, in ONNX; outputs are named as by :func:`export_onnx`."""
    outputs = len(program.graph_signature.user_outputs)
    with warnings.catch_warnings():
        # The exporter copies trees with a class that PyTorch itself has deprecated.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=["logits"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
            custom_translation_table=_translations(),
        )
    assert exported is not None  # with dynamo=True it never is
    return exported


def _translations() -> dict[Callable, Callable]:
    """The operators in ONNX, for the exporter; made here because onnxscript is optional."""
    import onnxscript

    op = onnxscript.opset20
    return {
        torch.ops.backbones.selective_scan.default: scan.translation(op),
        torch.ops.backbones.depthwise_conv.default: depthwise.translation(op),
        torch.ops.aten.index_add.default: ssd.index_add_translation(op),
    }
