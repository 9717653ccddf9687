"""Modules that ``torch.fx`` keeps whole, so that feature extractors of timm and torchvision take every model."""

import functools
from collections.abc import Callable
from typing import Any

from timm.models import register_notrace_module
from torch import fx, nn


@register_notrace_module
class Opaque(nn.Module):
    """Base of a module whose ``forward`` depends on the shape or device of its input.

    Traced symbolically, a call of it is one node, whichever tracer runs. timm's tracer skips registered classes;
    torchvision's and PyTorch's know no such list, hence a symbolic input answers with a call of the whole module.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            setattr(cls, "forward", _whole(vars(cls)["forward"]))  # noqa: B010 (a method cannot be assigned)


def _whole(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def called(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, fx.Proxy):
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x, *args), kwargs)
        return forward(self, x, *args, **kwargs)

    return called
