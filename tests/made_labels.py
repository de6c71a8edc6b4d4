"""Labels of a run that was never made, for tests of what is said of them."""

from pathlib import Path

import numpy as np

from flywheel_fast import audit

NASTY = ("a,b", 'say "hi"', "=SUM(A1)", "猫 ünï", "$\\frac", "two\nlines")


def labels(given, suggested, clean_prob, true=None, classes=NASTY, root=".", posterior_sum=None):
    n, c = len(given), len(classes)
    return audit.Labels(
        root=Path(root),
        files=np.array([f"train/{i}, “{i}”.png" for i in range(n)]),
        classes=tuple(classes),
        given=np.array(given, np.int64),
        true=None if true is None else np.array(true, np.int64),
        clean_prob=np.array(clean_prob, np.float32),
        suggested=np.array(suggested, np.int64),
        suggested_prob=np.linspace(0.5, 1, n, dtype=np.float32),
        entropy=np.linspace(1, 0, n, dtype=np.float32),
        networks_agree=np.arange(n) % 2 == 0,
        times_suspected=np.arange(n, dtype=np.uint8) % 9,
        posterior_sum=np.eye(c) + 0.25 if posterior_sum is None else np.array(posterior_sum, np.float64),
    )


def drawn(n, c, root, known=True, seed=0):
    """Labels of which a third are wrong and most of those suspected."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, c, n)
    given = np.where(rng.random(n) < 1 / 3, (true + 1) % c, true)
    clean_prob = 1 / (1 + np.exp(np.where(given == true, -4, 4) + 2 * rng.standard_normal(n)))
    return labels(given, true, clean_prob, true if known else None, [f"class {k}" for k in range(c)], root)
