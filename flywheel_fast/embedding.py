"""Where the test images lie for the inference network: its features in the plane, by t-SNE (the paper's Figure 4)."""

import hashlib
import io
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import sources
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.errors import BadInput

CACHE = "embedding.npz"  # in the run folder
MOST, CLASSES, SECONDS = 1000, 20, 10  # images, classes of them, and what the network may take to see them


@dataclass(frozen=True)
class Embedding:
    points: np.ndarray  # [K, 2] float32
    labels: np.ndarray  # [K] int64, of the test split
    classes: np.ndarray  # [C] str
    available: int  # test images


def of_run(run: Path, images: Path | None = None) -> Embedding:
    """Kept in the run folder, and drawn anew for another network.

    `images`: where the pictures lie now, if they have moved. Raises BadInput where network or images are gone.
    """
    network = _digest(run / "weights" / "model.safetensors")
    try:
        with np.load(run / CACHE) as kept:
            if str(kept["network"]) == network:
                return Embedding(kept["points"], kept["labels"], kept["classes"], int(kept["available"]))
    except (OSError, ValueError, KeyError):
        pass  # not there, or something else
    found = _embed(run, images)
    content = io.BytesIO()
    np.savez(content, network=np.array(network), **vars(found))
    write_atomic(run / CACHE, content.getbuffer())
    return found


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: the network cannot be read ({error.strerror})") from error


def _embed(run: Path, images: Path | None) -> Embedding:
    from flywheel_fast.predict import Predictor  # torch takes seconds to import

    predictor = Predictor(run)
    data = replace(predictor.config.data, noise=NoiseConfig(), reviews=None, download=False)
    test = sources.load(data, present=False).test
    root = images or test.root
    rows = np.flatnonzero(test.labels < CLASSES)
    rows = np.random.default_rng(0).permutation(rows)[:MOST]
    rows = rows[[os.path.isfile(root / file) for file in test.files[rows].tolist()]]
    if len(rows) < 4:
        raise BadInput(f"{root}: holds no test images any more, or too few")
    rows = rows[: _affordable(predictor)]
    features, index = predictor.features([root / file for file in test.files[rows].tolist()])
    return Embedding(_plane(features), test.labels[rows[index]], np.array(test.classes), len(test))


def _affordable(predictor, batch: int = 16) -> int:
    """Images that the network sees in SECONDS."""
    import torch

    size = predictor.config.views.image_size
    images = torch.zeros(batch, 3, size, size, device=predictor.device)
    for _ in range(2):  # the first time is slower
        start = time.perf_counter()
        predictor.learner.predict(images).cpu()
        took = time.perf_counter() - start
    return max(int(batch * SECONDS / took), batch)


def _plane(features: np.ndarray) -> np.ndarray:
    """[K, D] -> [K, 2] float32, t-SNE (van der Maaten and Hinton, JMLR 2008) of the 50 main directions."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    main = PCA(min(50, *features.shape), random_state=0).fit_transform(features)
    return TSNE(init="pca", perplexity=min(30, (len(main) - 1) / 3), random_state=0).fit_transform(main)
