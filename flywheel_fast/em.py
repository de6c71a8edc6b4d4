"""What the two EM cycles know: of each sample, by global index, and the two parameters gamma and T_c."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flywheel_fast import ops

MIN_CLASS_MASS = 1e-6  # of the mean prediction; keeps the alignment weight of a dying class finite


@dataclass
class EMState:
    """N samples, C classes; 37 bytes a sample."""

    labels: Tensor  # [N] int64           observed, never overwritten
    clean_prob: Tensor  # [N] float32     w: probability that the observed label is right
    eps: Tensor  # [N] float32            likelihood of the observed label under corruption
    resampled_label: Tensor  # [N] int64  argmax of the auxiliary network, for every sample
    suggested_label: Tensor  # [N] int64  argmax of the posterior
    suggested_prob: Tensor  # [N] float32
    suspicion: Tensor  # [N] uint8        was the label suspected? a bit a cycle, of the last eight
    gamma: Tensor  # [] float64           prior probability that a label is clean
    corruption: Tensor  # [C, C] float32  T_c(y, j), rows sum to 1, diagonal zero
    align: Tensor  # [C] float32          observed class share over mean prediction; ones before the first look
    posterior_sum: Tensor  # [C, C] float64   sum of q(y) by observed label j: T_full before it is normalised

    @classmethod
    def start(cls, labels: Tensor, num_classes: int, gamma: float) -> "EMState":
        """Nothing known yet: gamma as given, eps 1/C, corruption uniform off the diagonal."""
        n, device = len(labels), labels.device
        off_diagonal = 1 - torch.eye(num_classes, device=device)
        return cls(
            labels=labels,
            clean_prob=torch.full((n,), gamma, device=device),
            eps=torch.full((n,), 1 / num_classes, device=device),
            resampled_label=labels.clone(),
            suggested_label=labels.clone(),
            suggested_prob=torch.full((n,), gamma, device=device),
            suspicion=torch.zeros(n, dtype=torch.uint8, device=device),
            gamma=torch.tensor(gamma, dtype=torch.float64, device=device),
            corruption=off_diagonal.t() / max(num_classes - 1, 1),
            align=torch.ones(num_classes, device=device),
            posterior_sum=torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device),
        )

    @property
    def num_classes(self) -> int:
        return len(self.align)

    def main_estep(self, index: Tensor, logits: Tensor) -> None:
        """Step 1 for the samples `index` [B] with the main network's logits [B, C]."""
        clean_prob, _ = ops.main_estep(logits, self.labels[index], self.gamma, self.eps[index])
        self.clean_prob[index] = clean_prob

    def update_gamma(self) -> None:
        """gamma = mean of w."""
        self.gamma = self.clean_prob.mean(dtype=torch.float64)

    def loss(
        self,
        index: Tensor,
        logits: Tensor,
        teacher_logits: Tensor | None,
        kind: str,
        confidence: float = 0.0,
        delta: float = 1e-4,
    ) -> Tensor:
        """Loss [] of logits [V * B, C], V views of the samples `index` [B], against step 2's posterior.

        The posterior follows from the auxiliary network's teacher_logits [B, C] and is never stored; without them the
        target is the resampled label.
        """
        if teacher_logits is None:
            labels, clean_prob, corruption = self.resampled_label[index], None, None
        else:
            labels, clean_prob, corruption = self.labels[index], self.clean_prob[index], self.corruption
        return ops.posterior_loss(logits, teacher_logits, labels, clean_prob, corruption, kind, confidence, delta)

    def merged_classes(self) -> list[tuple[int, int]]:
        """Pairs (gone, into): classes of which fewer than a tenth as many samples are resampled as were observed, and
        what most of those samples are called instead. A cycle that collapses merges classes (docs/method.md)."""
        c = self.num_classes
        calls = torch.bincount(self.labels * c + self.resampled_label, minlength=c * c).view(c, c).cpu()  # [C, C]
        gone = (calls.sum(dim=0) < 0.1 * calls.sum(dim=1)).nonzero()[:, 0].tolist()
        return [(label, int(calls[label].argmax())) for label in gone]

    def state_dict(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for field in fields(self):
            setattr(self, field.name, state[field.name].to(self.labels.device))


class Resampling:
    """One pass of the auxiliary network over all samples: resampled labels, eps, T_c and the alignment weights."""

    def __init__(self, state: EMState, kind: str):
        self.state, self.kind = state, kind
        self.sums = ops.AuxEStep.empty(0, state.num_classes, state.labels.device)

    def add(self, index: Tensor, logits: Tensor) -> None:
        """The samples `index` [B] with the auxiliary network's logits [B, C]."""
        state = self.state
        labels, clean_prob = state.labels[index], state.clean_prob[index]
        out = self.sums.of_others(len(index))
        step = ops.aux_estep(logits, labels, clean_prob, state.corruption, state.align, self.kind, out)
        state.resampled_label[index] = step.resampled_label
        state.suggested_label[index] = step.suggested_label
        state.suggested_prob[index] = step.suggested_prob
        state.eps[index] = step.eps

    def finish(self, aligned: bool, smoothing: float) -> None:
        """T_c(y, j) proportional to smoothing/C + corrupted_sum, rows normalised, diagonal zero; new alignment."""
        state, c = self.state, self.state.num_classes
        off_diagonal = 1 - torch.eye(c, dtype=torch.float64, device=state.labels.device)
        counts = (self.sums.corrupted_sum + smoothing / c) * off_diagonal
        state.corruption = (counts / counts.sum(dim=1, keepdim=True).clamp_min(1e-300)).float()
        state.posterior_sum = self.sums.posterior_sum
        suspected = (state.clean_prob < 0.5) & (state.suggested_label != state.labels)
        state.suspicion = (state.suspicion << 1) | suspected
        if aligned:
            observed = torch.bincount(state.labels, minlength=c) / len(state.labels)
            predicted = self.sums.class_sum / len(state.labels)
            state.align = (observed / predicted.clamp_min(MIN_CLASS_MASS)).float()
