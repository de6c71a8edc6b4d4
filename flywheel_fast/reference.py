"""The expectation steps in plain PyTorch: what each native op computes, its test oracle and its fallback.

The formulas are those of the method (docs/method.md), after Kim et al., "Learning with Noisy Labels: Interconnection of
Two Expectation-Maximizations", arXiv 2401.04390. A label observed as j is clean with prior probability gamma; when it
is corrupted, a true class y shows up as j with probability corruption[y, j], whose diagonal is zero.

Half-precision logits are computed in float32, float64 logits in float64; sums over samples are float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_EPS = 1e-12  # a likelihood under corruption below this would make a label clean beyond any doubt


class AuxEStep(NamedTuple):
    """What the auxiliary network says of N samples and C classes."""

    resampled_label: Tensor  # [N] int64   argmax_y f(y) * align(y): the class by the network alone
    suggested_label: Tensor  # [N] int64   argmax_y q(y): the class by the network and the observed label
    suggested_prob: Tensor  # [N] float    q(suggested_label)
    eps: Tensor  # [N] float              likelihood of the observed label under corruption
    corrupted_sum: Tensor  # [C, C] float64   row y, column j: sum of (1 - w) r(y) over the samples observed as j
    posterior_sum: Tensor  # [C, C] float64   row y, column j: sum of q(y) over the samples observed as j
    class_sum: Tensor  # [C] float64         sum of f(y)

    @classmethod
    def empty(cls, n: int, c: int, device: torch.device) -> "AuxEStep":
        """Room for N samples, and sums of none; the [C, C] ones lie by observed label in memory, as the ops want."""
        line = torch.zeros(c, dtype=torch.float64, device=device)
        squares = [line.new_zeros(c, c).t() for _ in range(2)]
        labels = [torch.empty(n, dtype=torch.int64, device=device) for _ in range(2)]
        return cls(*labels, *(torch.empty(n, device=device) for _ in range(2)), *squares, line)

    def of_others(self, n: int) -> "AuxEStep":
        """Room for N other samples, and the same sums, to go on adding to."""
        return AuxEStep(*(t.new_empty(n) for t in self[:4]), *self[4:])


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)


def main_estep(logits: Tensor, labels: Tensor, gamma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1, Bayes' rule: w = gamma g[label] / (gamma g[label] + (1 - gamma) eps), in log space.

    logits [N, C] of the main network, labels [N] int64 (observed), gamma [] float64, eps [N].
    Returns clean_prob [N] and its sum [] float64.
    """
    log_g = (
        _log_softmax(logits).gather(1, labels[:, None])[:, 0].clamp_min(-1e30)
    )  # [N]; finite, so that gamma = 1 is 1
    log_odds = log_g + torch.logit(gamma).to(log_g.dtype) - eps.clamp_min(MIN_EPS).to(log_g.dtype).log()
    clean_prob = torch.sigmoid(log_odds)
    return clean_prob, clean_prob.sum(dtype=torch.float64)


def refurbish(f: Tensor, labels: Tensor, corruption: Tensor) -> tuple[Tensor, Tensor]:
    """r(y) = f(y) corruption[y, label] / eps: the true class of a corrupted sample; eps is its normaliser.

    f [N, C] probabilities of the auxiliary network. Returns r [N, C], eps [N] (at least MIN_EPS).
    """
    r = f * corruption.to(f.dtype).t()[labels]  # [N, C]
    eps = r.sum(dim=1)
    return r / eps.clamp_min(MIN_EPS)[:, None], eps.clamp_min(MIN_EPS)


def posterior(logits: Tensor, labels: Tensor, clean_prob: Tensor, corruption: Tensor, kind: str) -> Tensor:
    """Step 2: q(y), the estimated distribution of the true class [N, C].

    mixture: q(y) = w 1[y = label] + (1 - w) r(y)
    joint:   q(y) proportional to f(y) (w 1[y = label] + (1 - w) corruption[y, label])
    """
    f = _log_softmax(logits).exp()
    w = clean_prob.to(f.dtype)[:, None]  # [N, 1]
    if kind == "mixture":
        r, _ = refurbish(f, labels, corruption)
        return ((1 - w) * r).scatter_add(1, labels[:, None], w)
    if kind == "joint":
        prior = ((1 - w) * corruption.to(f.dtype).t()[labels]).scatter_add(1, labels[:, None], w)
        q = f * prior
        return q / q.sum(dim=1, keepdim=True).clamp_min(MIN_EPS)
    raise ValueError(f"posterior kind must be 'mixture' or 'joint', not {kind!r}")


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
    """Steps 1 and 2 from one look at both networks' logits [N, C]: clean_prob [N], its sum, and `aux_estep` with it."""
    clean_prob, clean_sum = main_estep(main_logits, labels, gamma, eps)
    return clean_prob, clean_sum, aux_estep(aux_logits, labels, clean_prob, corruption, align, kind)


def aux_estep(
    logits: Tensor, labels: Tensor, clean_prob: Tensor, corruption: Tensor, align: Tensor, kind: str
) -> AuxEStep:
    """Resampling, and the statistics of steps 2 and 3, from one look at the auxiliary network's logits [N, C].

    corruption [C, C], align [C] (positive weights; ones where the resampled label is not aligned), kind as in
    `posterior`. Sums are over these N samples only; `em.EMState` adds them up and normalises.
    """
    num_classes = logits.shape[1]
    f = _log_softmax(logits).exp()
    r, eps = refurbish(f, labels, corruption)
    q = posterior(logits, labels, clean_prob, corruption, kind)
    suggested_prob, suggested_label = q.max(dim=1)

    def by_observed(p: Tensor) -> Tensor:  # [N, C] -> [C, C]: rows true class, columns observed label
        sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=p.device)
        return sums.index_add_(0, labels, p.double()).t()

    return AuxEStep(
        resampled_label=(f * align.to(f.dtype)).argmax(dim=1),
        suggested_label=suggested_label,
        suggested_prob=suggested_prob,
        eps=eps,
        corrupted_sum=by_observed((1 - clean_prob.to(f.dtype))[:, None] * r),
        posterior_sum=by_observed(q),
        class_sum=f.sum(dim=0, dtype=torch.float64),
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
    """Steps 3 and 4: mean of -sum_y q(y) log g(y) + (confidence / C) sum_y log(g(y) + delta), g = softmax(logits).

    logits [V * N, C]: V views of N samples, row v * N + i of sample i. q is the posterior by teacher_logits [N, C], of
    the same samples as labels and clean_prob [N]; without a teacher, q is the label (observed or resampled).
    Returns the loss []. A class with q(y) = 0 costs nothing, whatever its logit.
    """
    log_g = _log_softmax(logits)
    if teacher_logits is None:
        q = torch.nn.functional.one_hot(labels, logits.shape[1]).to(log_g.dtype)
    else:
        q = posterior(teacher_logits, labels, clean_prob, corruption, kind).to(log_g.dtype)
    q = q.detach().repeat(len(logits) // max(len(labels), 1), 1)  # [V * N, C]
    loss = -torch.where(q == 0, 0, q * log_g).sum(dim=1)
    if confidence:
        loss = loss + confidence * (log_g.exp() + delta).log().mean(dim=1)
    return loss.mean()
