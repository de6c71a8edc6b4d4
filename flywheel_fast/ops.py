"""The E-step ops: native where built, the PyTorch reference otherwise, with the same results within rounding.

Each has one name in csrc/, in reference.py, here, in tests and in benchmarks.
"""

import os

import torch
from torch import Tensor

from flywheel_fast import reference
from flywheel_fast.reference import AuxEStep, aux_estep, posterior

__all__ = ["AuxEStep", "aux_estep", "main_estep", "native", "posterior", "why_not_native"]

NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str:
    """Loads the native part, which registers its ops with torch; returns why it is absent, or nothing."""
    if os.environ.get("FLYWHEEL_NATIVE") == "0":
        return "switched off by FLYWHEEL_NATIVE=0"
    try:
        from flywheel_fast import _C  # noqa: F401
    except ModuleNotFoundError:
        return "not built: it was installed without a C++ compiler; install one, then install the package again"
    except ImportError as error:  # built, but for another system
        return (
            f"cannot be loaded ({error}); likely built against a torch older than 2.11 or another CUDA: install again"
        )
    return ""


_WHY_NOT = _load()


def why_not_native(device: torch.device | str = "cpu") -> str:
    """Why tensors on `device` are computed by the reference; empty where the native ops serve them."""
    if _WHY_NOT:
        return _WHY_NOT
    from flywheel_fast import _C

    if torch.device(device).type == "cuda" and _C.build_info()["cuda"] is None:
        return "built without CUDA: no toolkit was found; set CUDA_HOME and install the package again"
    return ""


def native(logits: Tensor) -> bool:
    """Whether the native ops serve these logits."""
    return logits.dtype in NATIVE_TYPES and logits.device.type in ("cpu", "cuda") and not why_not_native(logits.device)


def main_estep(logits: Tensor, labels: Tensor, gamma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Probability that each observed label is clean (docs/method.md, step 1).

    logits [N, C] float32, bfloat16 or float16 (float64: by the reference), labels [N] int64, gamma [] float64,
    eps [N] float32. Returns clean_prob [N] float32 and its sum [] float64; a row with a NaN or +inf gives NaN.
    Raises RuntimeError for another shape, type or device; on the CPU also for a label outside 0..C-1.
    """
    if not native(logits):
        return reference.main_estep(logits, labels, gamma, eps)
    return torch.ops.flywheel_fast.main_estep(logits.contiguous(), labels.contiguous(), gamma, eps.contiguous())


if not _WHY_NOT:

    @torch.library.register_fake("flywheel_fast::main_estep")
    def _(logits: Tensor, labels: Tensor, gamma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(eps), torch.empty_like(gamma)
