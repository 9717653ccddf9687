"""State-space duality as a loop over steps: the definition that the chunked form is held against."""

import torch
from torch import Tensor


def ssd_naive(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y_t = S_t C_t with S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, in the dtype of its arguments.

    Differentiable any number of times. The loop runs over ``unbind``: the gradient of an ``x[:, t]`` would be a
    zero tensor as large as ``x``.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h) step sizes.
        A: (h,).
        B: (b, l, g, n).
        C: (b, l, g, n).

    Returns:
        (b, l, h, p).
    """
    per_group = x.shape[2] // B.shape[2]
    B, C = (y.repeat_interleave(per_group, dim=2).unsqueeze(-2) for y in (B, C))  # (b, l, h, 1, n)
    decays = torch.exp(dt * A)[..., None, None]
    inputs = (dt.unsqueeze(-1) * x).unsqueeze(-1)  # (b, l, h, p, 1)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    outputs = []
    for decay, x_t, B_t, C_t in zip(decays.unbind(1), inputs.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state = decay * state + x_t * B_t
        outputs.append((state * C_t).sum(-1))
    return torch.stack(outputs, dim=1)
