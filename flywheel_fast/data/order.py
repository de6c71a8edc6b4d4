"""The order of an epoch is a pure function, so a resumed run needs no reader's state."""

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [n] int64, every sample once."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def balanced_order(labels: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [size] int64: as many of each class that is in `labels` [N] as of any other, give or take one. A class
    goes round its samples from epoch to epoch, each turn in a new order."""
    members = np.argsort(labels, kind="stable")
    groups = [group for group in np.split(members, np.bincount(labels).cumsum()[:-1]) if len(group)]
    drawn = []
    for number, group in enumerate(groups):
        share = size // len(groups) + (number < size % len(groups))
        turn, place = np.divmod(np.arange(epoch * share, (epoch + 1) * share), len(group))
        for one in np.unique(turn):
            drawn.append(np.random.default_rng((seed, number, one)).permutation(group)[place[turn == one]])
    return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))
