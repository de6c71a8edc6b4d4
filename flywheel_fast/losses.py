"""The auxiliary network's contrastive loss; the posterior's loss is an op (`ops.posterior_loss`)."""

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
