"""Losses of the M-steps; that of the posterior is an op (`ops.posterior_loss`)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ntxent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, arXiv 2002.05709, equation 1) of two views' unit embeddings, each [B, P]."""
    embeddings = torch.cat([first, second]).float()  # [2B, P]
    similarity = embeddings @ embeddings.t() / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(embeddings), device=embeddings.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def told_loss(logits: Tensor, told: Tensor, confidence: float, delta: float) -> Tensor:
    """Mean [] of -sum_y q(y) log g(y) + (confidence / C) sum_y log(g(y) + delta), g = softmax(logits), over samples of
    which more or less is told: q is a row of `told` [B, C] over its sum, by which the sample counts.

    logits [V * B, C]: V views of B samples, row v * B + i of sample i. Zero where nothing is told of any.
    """
    log_g = logits.float().log_softmax(dim=1)
    told = told.repeat(len(logits) // max(len(told), 1), 1)
    loss = -(told * log_g).sum(dim=1)  # [V * B]
    weights = told.sum(dim=1)
    if confidence:
        loss = loss + weights * confidence * (log_g.exp() + delta).log().mean(dim=1)
    return loss.sum() / weights.sum().clamp_min(1e-12)
