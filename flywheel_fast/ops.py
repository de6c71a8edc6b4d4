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
    return torch.ops.flywheel_fast.main_estep(logits.contiguous(), labels.contiguous(), gamma, eps.contiguous())


def aux_estep(
    logits: Tensor, labels: Tensor, clean_prob: Tensor, corruption: Tensor, align: Tensor, kind: str
) -> AuxEStep:
    """Steps 2 and 3: resampled and suggested labels, eps, and the statistics of T_c; kind is mixture or joint."""
    joint = _is_joint(kind)
    if not native(logits):
        return reference.aux_estep(logits, labels, clean_prob, corruption, align, kind)
    return _aux(
        torch.ops.flywheel_fast.aux_estep(
            logits.contiguous(),
            labels.contiguous(),
            clean_prob.contiguous(),
            corruption.contiguous(),
            align.contiguous(),
            joint,
            *_by_label(logits, labels),
        )
    )


def em_step(
    main_logits: Tensor,
    aux_logits: Tensor,
    labels: Tensor,
    gamma: Tensor,
    eps: Tensor,
    corruption: Tensor,
    align: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, AuxEStep]:
    """`main_estep` and, with its clean_prob, `aux_estep`, in one pass over both networks' logits [N, C].

    Returns clean_prob [N], its sum [] float64, and the AuxEStep.
    """
    joint = _is_joint(kind)
    if not (native(main_logits) and native(aux_logits)):
        return reference.em_step(main_logits, aux_logits, labels, gamma, eps, corruption, align, kind)
    clean_prob, clean_sum, *aux = torch.ops.flywheel_fast.em_step(
        main_logits.contiguous(),
        aux_logits.contiguous(),
        labels.contiguous(),
        gamma,
        eps.contiguous(),
        corruption.contiguous(),
        align.contiguous(),
        joint,
        *_by_label(main_logits, labels),
    )
    return clean_prob, clean_sum, _aux(aux)


def posterior(logits: Tensor, labels: Tensor, clean_prob: Tensor, corruption: Tensor, kind: str) -> Tensor:
    """Step 2 alone: q [N, C] float32, the estimated distribution of the true class; kind is mixture or joint."""
    joint = _is_joint(kind)
    if not native(logits):
        return reference.posterior(logits, labels, clean_prob, corruption, kind)
    return torch.ops.flywheel_fast.posterior(
        logits.contiguous(), labels.contiguous(), clean_prob.contiguous(), corruption.contiguous(), joint
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
    teacher = [None if t is None else t.detach().contiguous() for t in (teacher_logits, clean_prob, corruption)]
    loss, _ = torch.ops.flywheel_fast.posterior_loss(
        logits.contiguous(), labels.contiguous(), *teacher, joint, confidence, delta
    )
    return loss


def _is_joint(kind: str) -> bool:
    if kind not in ("mixture", "joint"):
        raise ValueError(f"posterior kind must be 'mixture' or 'joint', not {kind!r}")
    return kind == "joint"


def _aux(found) -> AuxEStep:
    """The native statistics have a row for each observed label; the public ones a column."""
    resampled, suggested, suggested_prob, eps, corrupted_sum, posterior_sum, class_sum = found
    return AuxEStep(resampled, suggested, suggested_prob, eps, corrupted_sum.t(), posterior_sum.t(), class_sum)


def _by_label(logits: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Rows in the order of their labels [N] int32 and where each label starts [C + 1] int64, where CUDA needs them."""
    if logits.device.type != "cuda" or logits.shape[1] <= UNSORTED_CLASSES:
        return None, None
    ordered, order = labels.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(logits.shape[1] + 1, device=labels.device))
    return order.int(), starts


if not _WHY_NOT:

    def _fake_aux(logits: Tensor, labels: Tensor, per_sample: Tensor) -> tuple[Tensor, ...]:
        c = logits.shape[1]
        square, line = (logits.new_empty(shape, dtype=torch.float64) for shape in ((c, c), (c,)))
        per_label = torch.empty_like(labels)
        return (
            per_label,
            per_label.clone(),
            torch.empty_like(per_sample),
            torch.empty_like(per_sample),
            square,
            square.clone(),
            line,
        )

    @torch.library.register_fake("flywheel_fast::main_estep")
    def _(logits, labels, gamma, eps):
        return torch.empty_like(eps), torch.empty_like(gamma)

    @torch.library.register_fake("flywheel_fast::aux_estep")
    def _(logits, labels, clean_prob, corruption, align, joint, order, starts):
        return _fake_aux(logits, labels, clean_prob)

    @torch.library.register_fake("flywheel_fast::em_step")
    def _(main_logits, aux_logits, labels, gamma, eps, corruption, align, joint, order, starts):
        return torch.empty_like(eps), torch.empty_like(gamma), *_fake_aux(main_logits, labels, eps)

    @torch.library.register_fake("flywheel_fast::posterior")
    def _(logits, labels, clean_prob, corruption, joint):
        return torch.empty_like(logits, dtype=torch.float32)

    @torch.library.register_fake("flywheel_fast::posterior_loss")
    def _(logits, labels, teacher_logits, clean_prob, corruption, joint, confidence, delta):
        return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)

    def _save_gradient(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    def _scale_gradient(ctx, loss_gradient, _):
        (gradient,) = ctx.saved_tensors  # computed in the forward pass
        return gradient * loss_gradient.to(gradient.dtype), *[None] * 7

    torch.library.register_autograd("flywheel_fast::posterior_loss", _scale_gradient, setup_context=_save_gradient)
