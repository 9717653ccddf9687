"""The gate, where PyTorch takes several passes through memory."""

from torch import Tensor

from backbones.ops.dispatch import choose_for
from backbones.ops.fused.gate import cpu, naive
from backbones.ops.fused.registration import reads, register

gate_op = register("gate", "z", "scale", cpu)


def silu_gate(x: Tensor, z: Tensor, scale: float = 1.0, *, backend: str | None = None) -> Tensor:
    """x SiLU(z) scale (Mamba, figure 3).

    Args:
        x: (..., c).
        z: as x, or of a shape that broadcasts to it.
        scale: a constant factor.
        backend: "naive" is PyTorch's operations, "cpu" a C++ kernel for float32 and bfloat16 in one pass through
            memory, "triton" PyTorch's operations, as there is no kernel. None takes the fastest that runs on the
            tensors' device. Compiled and exported programs hold PyTorch's operations, which compilers fuse.

    Returns:
        (..., c) in the dtype of x.

    Raises:
        ValueError: ``backend`` is given and cannot run.
        NotImplementedError: forward-mode or ``torch.func`` derivatives through "cpu" where it is given, or second
            derivatives through it.
    """
    chosen, _ = choose_for("silu_gate", backend, x, z)
    if chosen == "cpu" and reads(x, z) and x.shape == z.shape:
        return gate_op(x, z, scale)
    return naive.forward(x, z, scale)
