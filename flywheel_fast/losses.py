"""The losses of the two M-steps, per batch; logits of any floating type are computed in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """mean_i of -sum_y target_i(y) log softmax(logits_i)(y); both [B, C]."""
    return -(target * logits.float().log_softmax(dim=1)).sum(dim=1).mean()


def confidence_regulariser(logits: Tensor, delta: float) -> Tensor:
    """mean_i of (1/C) sum_y log(g_i(y) + delta): minus a cross-entropy to uniform labels, floored by delta.

    Kim et al., arXiv 2401.04390, Lemma 1: with weight 1 - gamma' the minimiser is the distribution of clean labels.
    logits [B, C].
    """
    return (logits.float().softmax(dim=1) + delta).log().mean()


def ntxent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, arXiv 2002.05709, equation 1) of two views' unit embeddings, each [B, P]."""
    embeddings = torch.cat([first, second]).float()  # [2B, P]
    similarity = embeddings @ embeddings.t() / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(embeddings), device=embeddings.device).roll(len(first))
    return F.cross_entropy(similarity, partner)
