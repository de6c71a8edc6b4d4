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


def observed_loss(logits: Tensor, labels: Tensor, weights: Tensor, confidence: float, delta: float) -> Tensor:
    """Mean [] over samples, by `weights` [B], of -log g(label) + (confidence / C) sum_y log(g(y) + delta), g =
    softmax(logits): the M-step of the main network on the objective, its confidence regulariser with it.

    logits [V * B, C]: V views of B samples with labels [B]; row v * B + i of sample i. Zero where all weights are.
    """
    views = len(logits) // max(len(labels), 1)
    log_g = logits.float().log_softmax(dim=1)
    loss = F.nll_loss(log_g, labels.repeat(views), reduction="none")  # [V * B]
    if confidence:
        loss = loss + confidence * (log_g.exp() + delta).log().mean(dim=1)
    weights = weights.repeat(views)
    return (weights * loss).sum() / weights.sum().clamp_min(1e-12)
