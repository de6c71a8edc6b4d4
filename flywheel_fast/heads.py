"""Heads on features: one for each fold of the samples, which never learns from it, and one that learns from all.

The E-steps see a sample through the head that has not seen its label: heads that have can tell it by heart, and gamma
runs to 1 (docs/method.md has the figures). The head that learns from all is the one that is used at test time.
"""

import numpy as np
import torch
from torch import Tensor, nn

from flywheel_fast.data.feature_loader import FeatureLoader
from flywheel_fast.errors import BadInput
from flywheel_fast.models import NetworkConfig, head

MEASURED = 100_000  # samples at most, for mean and spread of the features


def fold_of(n: int, folds: int, seed: int) -> Tensor:
    """The fold of each sample [n] int64: a pure function of the seed and its index."""
    return torch.from_numpy((np.random.default_rng(seed).random(n) * folds).astype(np.int64))


class Heads(nn.Module):
    """features [B, D] -> logits [B, C]: in evaluation mode of the head for all, or of that which has not seen the fold,
    where `samples` [S] says whose features these are. In training mode [K * B, C]: of the K heads that may learn from
    each.

    B is S, or a multiple of it where there are several views of each sample, one after the other.
    """

    knows_samples = True  # so that `Learner` says whose features it passes

    def __init__(self, mean: Tensor, std: Tensor, num_classes: int, hidden: int, folds: Tensor | None):
        """mean, std [D] of the features; folds [N] int64 of the samples, None: one head, which sees all labels."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / std.clamp_min(1e-6))
        self.register_buffer("folds", folds, persistent=False)
        count = 1 if folds is None else int(folds.max()) + 2
        made = [head(len(mean), num_classes, hidden) for _ in range(count)]
        first = [one[0] if hidden else one for one in made]
        self.num_classes, self.hidden = num_classes, hidden
        # all heads' layers side by side, so that they are one product
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in first]))  # [K1 * H, D]
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in first]))
        if hidden:
            self.weight2 = nn.Parameter(torch.stack([one[2].weight.detach() for one in made]))  # [K1, C, H]
            self.bias2 = nn.Parameter(torch.stack([one[2].bias.detach() for one in made]))

    def forward(self, features: Tensor, samples: Tensor | None = None) -> Tensor:
        folded = self.folds is not None and samples is not None
        logits = self._all((features.float() - self.mean) * self.scale, only_last=not (folded or self.training))
        if not folded:  # new pictures, or there is one head
            return logits[:, -1]
        fold = self.folds[samples].repeat(len(features) // len(samples))  # [B]
        if not self.training:
            return logits.gather(1, fold[:, None, None].expand(-1, 1, self.num_classes))[:, 0]
        count = logits.shape[1]
        others = (fold[:, None] + torch.arange(1, count, device=fold.device)) % count  # [B, K]
        return logits.gather(1, others[:, :, None].expand(-1, -1, self.num_classes)).transpose(0, 1).flatten(0, 1)

    def _all(self, features: Tensor, only_last: bool) -> Tensor:  # [B, D] -> [B, K1, C]
        width = self.hidden or self.num_classes
        at = -width if only_last else 0
        out = nn.functional.linear(features, self.weight[at:], self.bias[at:]).unflatten(1, (-1, width))
        if not self.hidden:
            return out
        weight, bias = (self.weight2[-1:], self.bias2[-1:]) if only_last else (self.weight2, self.bias2)
        return torch.einsum("bkh,kch->bkc", out.relu(), weight) + bias

    def last(self) -> nn.Module:
        """The head for all as a plain one, which takes features as they are: [B, D] -> [B, C]."""
        made = head(len(self.mean), self.num_classes, self.hidden)
        first, width = (made[0] if self.hidden else made), self.hidden or self.num_classes
        with torch.no_grad():
            weight = self.weight[-width:] * self.scale
            first.weight.copy_(weight)
            first.bias.copy_(self.bias[-width:] - weight @ self.mean)
            if self.hidden:
                made[2].weight.copy_(self.weight2[-1])
                made[2].bias.copy_(self.bias2[-1])
        return made


def build(
    config: NetworkConfig, num_classes: int, seed: int, loader: FeatureLoader, folds: int, fold_seed: int
) -> Heads:
    """Fresh heads, a function of `seed`, for the training samples of `loader`. Raises BadInput for a class of which
    there are fewer samples than folds."""
    manifest = loader.manifest
    counts = np.bincount(manifest.labels, minlength=num_classes)
    if (few := int(counts.argmin())) >= 0 and counts[few] < folds:
        raise BadInput(
            f"model.folds={folds}: class {manifest.classes[few]!r} has {counts[few]} samples only; lower model.folds, "
            "or add some"
        )
    rows = loader.rows[np.sort(np.random.default_rng(fold_seed).permutation(len(manifest))[:MEASURED])]
    found = torch.from_numpy(loader.features.array[rows, 0]).double()  # [n, D]
    fold = fold_of(len(manifest), folds, fold_seed) if folds else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spread = found.var(dim=0).mean().sqrt().expand(found.shape[1])
        return Heads(found.mean(dim=0).float(), spread.float().clone(), num_classes, config.hidden, fold)
