"""The order of an epoch is a pure function, so a resumed run needs no reader's state."""

import numpy as np


def epoch_order(n: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Indices [about n / world] int64 of one rank; over all ranks every sample comes exactly once."""
    return np.random.default_rng((seed, epoch)).permutation(n)[rank::world]
