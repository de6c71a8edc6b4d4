"""The E-step and loss ops: native where built, the PyTorch reference otherwise, with the same results within rounding.

Each has one name in csrc/, in reference.py, here, in tests and in benchmarks. Shapes and types of all: logits [N, C]
float32, bfloat16 or float16 (float64: by the reference), labels [N] int64, clean_prob and eps [N] float32, gamma []
float64, corruption [C, C] and align [C] float32. A row of logits with a NaN or +inf gives NaN. They raise
RuntimeError for another shape, type or device, and on the CPU for a label outside 0..C-1.
"""

import os

import torch
from torch import Tensor

from flywheel_fast import reference
from flywheel_fast.reference import AuxEStep

__all__ = ["AuxEStep", "aux_estep", "em_step", "main_estep", "native", "posterior", "posterior_loss", "why_not_native"]

NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
UNSORTED_CLASSES = 32  # up to so many classes the CUDA statistics need no rows sorted by label


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
            f"cannot be loaded ({error}); this is torch {torch.__version__}, CUDA {torch.version.cuda}: likely a torch "
            "older than 2.11, or a CUDA runtime other than the one it was built for; install the package again"
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
    """Step 1: probability that each observed label is clean. Returns clean_prob [N] float32 and its sum [] float64."""
    if not native(logits):
        return reference.main_estep(logits, labels, gamma, eps)
    found = torch.empty_like(eps), torch.zeros_like(gamma)
    torch.ops.flywheel_fast.main_estep(logits.contiguous(), labels.contiguous(), gamma, eps.contiguous(), *found)
    return found


def aux_estep(
    logits: Tensor,
    labels: Tensor,
    clean_prob: Tensor,
    corruption: Tensor,
    align: Tensor,
    kind: str,
    out: AuxEStep | None = None,
) -> AuxEStep:
    """Steps 2 and 3: resampled and suggested labels, eps, and the statistics of T_c; kind is mixture or joint.

    `out` is written to and returned: its tensors [N] are overwritten, its sums are added to. Its [C, C] sums and
    `corruption` are read without a copy where they are views `.t()` of contiguous tensors.
    """
    joint = _is_joint(kind)
    if not native(logits):
        return _into(out, reference.aux_estep(logits, labels, clean_prob, corruption, align, kind))
    out = out or AuxEStep.empty(len(labels), len(align), logits.device)
    torch.ops.flywheel_fast.aux_estep(
        logits.contiguous(),
        labels.contiguous(),
        clean_prob.contiguous(),
        corruption.t().contiguous(),
        align.contiguous(),
        joint,
        *_by_label(logits, labels),
        *_by_observed(out),
    )
    return out


def em_step(
    main_logits: Tensor,
    aux_logits: Tensor,
    labels: Tensor,
    gamma: Tensor,
    eps: Tensor,
    corruption: Tensor,
    align: Tensor,
    kind: str,
    out: tuple[Tensor, Tensor, AuxEStep] | None = None,
) -> tuple[Tensor, Tensor, AuxEStep]:
    """`main_estep` and, with its clean_prob, `aux_estep`, in one pass over both networks' logits [N, C].

    Returns clean_prob [N], its sum [] float64, and the AuxEStep. `out` as for `aux_estep`; its eps may be eps.
    """
    joint = _is_joint(kind)
    if not (native(main_logits) and native(aux_logits)):
        found = reference.em_step(main_logits, aux_logits, labels, gamma, eps, corruption, align, kind)
        if out is None:
            return found
        out[0].copy_(found[0])
        out[1].add_(found[1])
        return *out[:2], _into(out[2], found[2])
    if out is None:
        aux = AuxEStep.empty(len(labels), len(align), main_logits.device)
        out = torch.empty_like(eps), torch.zeros_like(gamma), aux
    torch.ops.flywheel_fast.em_step(
        main_logits.contiguous(),
        aux_logits.contiguous(),
        labels.contiguous(),
        gamma,
        eps.contiguous(),
        corruption.t().contiguous(),
        align.contiguous(),
        joint,
        *_by_label(main_logits, labels),
        *out[:2],
        *_by_observed(out[2]),
    )
    return out


def posterior(logits: Tensor, labels: Tensor, clean_prob: Tensor, corruption: Tensor, kind: str) -> Tensor:
    """Step 2 alone: q [N, C] float32, the estimated distribution of the true class; kind is mixture or joint."""
    joint = _is_joint(kind)
    if not native(logits):
        return reference.posterior(logits, labels, clean_prob, corruption, kind)
    return torch.ops.flywheel_fast.posterior(
        logits.contiguous(), labels.contiguous(), clean_prob.contiguous(), corruption.t().contiguous(), joint
    )


def posterior_loss(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    clean_prob: Tensor | None,
    corruption: Tensor | None,
    kind: str = "mixture",
    confidence: float = 0.0,
    delta: float = 1e-4,
) -> Tensor:
    """The training loss of either network against the posterior, which is never stored; differentiable in `logits`.

    mean of -sum_y q(y) log g(y) + (confidence / C) sum_y log(g(y) + delta), g = softmax(logits) (docs/method.md,
    steps 3 and 4). logits [V * N, C]: V views of N samples, row v * N + i of sample i.
    teacher_logits, clean_prob and corruption None: q is the label. Returns the loss [] float32.
    """
    joint = _is_joint(kind)
    if not native(logits) or (teacher_logits is not None and not native(teacher_logits)):
        return reference.posterior_loss(logits, teacher_logits, labels, clean_prob, corruption, kind, confidence, delta)
    if teacher_logits is not None and teacher_logits.dtype != logits.dtype:
        logits, teacher_logits = logits.float(), teacher_logits.float()
    by_label = None if corruption is None else corruption.t()  # a row for each observed label
    teacher = [None if t is None else t.detach().contiguous() for t in (teacher_logits, clean_prob, by_label)]
    loss, _ = torch.ops.flywheel_fast.posterior_loss(
        logits.contiguous(), labels.contiguous(), *teacher, joint, confidence, delta
    )
    return loss


def _is_joint(kind: str) -> bool:
    if kind not in ("mixture", "joint"):
        raise ValueError(f"posterior kind must be 'mixture' or 'joint', not {kind!r}")
    return kind == "joint"


def _by_observed(out: AuxEStep) -> tuple[Tensor, ...]:
    """The native statistics have a row for each observed label; the public ones a column."""
    return *out[:4], out.corrupted_sum.t(), out.posterior_sum.t(), out.class_sum


def _into(out: AuxEStep | None, found: AuxEStep) -> AuxEStep:
    if out is None:
        return found
    for to, value in zip(out[:4], found[:4], strict=True):
        to.copy_(value)
    for to, value in zip(out[4:], found[4:], strict=True):
        to.add_(value)
    return out


def _by_label(logits: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Rows in the order of their labels [N] int32 and where each label starts [C + 1] int64, where CUDA needs them."""
    if logits.device.type != "cuda" or logits.shape[-1] <= UNSORTED_CLASSES:
        return None, None
    ordered, order = labels.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(logits.shape[1] + 1, device=labels.device))
    return order.int(), starts


if not _WHY_NOT:
    for _op in ("main_estep", "aux_estep", "em_step"):  # they return nothing
        torch.library.register_fake(f"flywheel_fast::{_op}", lambda *arguments: None)

    @torch.library.register_fake("flywheel_fast::posterior")
    def _(logits, labels, clean_prob, corruption_t, joint):
        return torch.empty_like(logits, dtype=torch.float32)

    @torch.library.register_fake("flywheel_fast::posterior_loss")
    def _(logits, labels, teacher_logits, clean_prob, corruption_t, joint, confidence, delta):
        return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)

    def _save_gradient(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    def _scale_gradient(ctx, loss_gradient, _):
        (gradient,) = ctx.saved_tensors  # computed in the forward pass
        return gradient * loss_gradient.to(gradient.dtype), *[None] * 7

    torch.library.register_autograd("flywheel_fast::posterior_loss", _scale_gradient, setup_context=_save_gradient)
