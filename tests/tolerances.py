"""Every tolerance of the test suite, with its reason. None is to be loosened to make a test pass."""

from torch import Tensor

# Operator against float64: float32 rounding of sums over a few hundred steps; bfloat16 has 8 bits (half of
# one is 2e-3).
OPERATOR = {"float32": 1e-5, "bfloat16": 5e-3}  # RMS error over RMS value

# Models against recordings of the originals. A wrong LayerNorm epsilon moves logits by 1e-5 to 4e-5, so
# nothing wider would see it.
LOGITS = 1e-5
INPUT_GRADIENT = 1e-3  # relative to the largest recorded value

# Where a ReLU of the image sits on its kink: the other side moves the gradient by 5e-3 of its largest value.
KINK_GRADIENT = 1e-2

# Of the deviation of the logits, where the records themselves carry float32 noise of up to 2e-5 of it. Their logits
# differ in scale (0.16 to 1.04 in LocalVim), so no absolute limit fits them all.
LOGITS_OF_DEVIATION = 2.5e-5
NOISY = ("localvim", "localvmamba", "plainmamba", "adventurer")

# GroupMamba multiplies its normalised input back in: float32 against float64 in the scan alone moves its
# logits by 3e-5 to 8e-5.
GROUPMAMBA_LOGITS = 2e-4
GROUPMAMBA_INPUT_GRADIENT = 2e-3

# Records of VSSD and EfficientViM carry float32 noise of up to 2e-5 of the deviation, and their ReLUs have kinks, so
# they hold double precision as well, where nothing is noise.
DOUBLE = ("vssd", "efficientvim")
NOISY_LOGITS = 1e-4  # of the deviation
NOISY_INPUT_GRADIENT = 1e-2
DOUBLE_LOGITS = 1e-9  # of the deviation
DOUBLE_INPUT_GRADIENT = 1e-8

# Two rebuilds of VM-UNet and MSVM-UNet are up to 1.3e-5 apart in logits of deviation 0.9.
UNET_LOGITS = 5e-5
# MHS-VM's gate divides small differences: in float64 rebuilds agree to 1e-12, in float32 to 1e-3 of the largest logit.
GATED_DOUBLE = 1e-10  # of the largest value
GATED_LOGITS = 1e-3


def logits_limit(name: str, recorded: Tensor) -> float:
    """Largest error of the logits of a model or recording called ``name``."""
    if name.startswith(NOISY):
        return LOGITS_OF_DEVIATION * recorded.std().item()
    if name.startswith(DOUBLE):
        return NOISY_LOGITS * recorded.std().item()
    return GROUPMAMBA_LOGITS if name.startswith("groupmamba") else LOGITS


def gradient_limit(name: str) -> float:
    """Largest error of the input's gradient, over its largest value."""
    if name.startswith(DOUBLE):
        return NOISY_INPUT_GRADIENT
    return GROUPMAMBA_INPUT_GRADIENT if name.startswith("groupmamba") else INPUT_GRADIENT


def maps_limit(name: str) -> float:
    """Largest error of the maps of a dense backbone's recording, over their largest value."""
    if name.startswith(NOISY):
        return LOGITS_OF_DEVIATION
    if name.startswith(DOUBLE):
        return NOISY_LOGITS
    return 10 * (GROUPMAMBA_LOGITS if name.startswith("groupmamba") else LOGITS)


# Two float32 evaluations of the same function in another order (compiled, checkpointed, another thread count
# of the matrix products).
SAME_FUNCTION = 1e-5

# Autocast against float32, relative RMS of the logits, by dtype. Rounding to 8 and 11 bits moves the narrow models of
# all families by up to 1.3e-2 and 1.7e-3.
AUTOCAST = {"bfloat16": 3e-2, "float16": 4e-3}
# EfficientViM's batch norms enlarge it from stage to stage: its recorded model's maps move by 5.2e-2 and 6.9e-3.
EFFICIENTVIM_AUTOCAST = {"bfloat16": 1e-1, "float16": 1.2e-2}

# A GPU against the CPU, relative RMS of the logits: float32 without TF32 in other orders of summation, and bfloat16.
# GroupMamba multiplies its normalised input back in; bfloat16 on the CPU alone moves its logits by 9e-2.
GPU = 1e-3
GPU_AUTOCAST = 3e-2
GROUPMAMBA_GPU_AUTOCAST = 1e-1
