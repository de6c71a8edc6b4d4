"""Images that show the same under different labels: one of these is wrong, whatever a network thinks of it."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from flywheel_fast import plots
from flywheel_fast.audit import Labels

COMPARED = 5000  # images that are compared by their looks, the likeliest wrong labels first; files are compared all
SIDE, ALIKE = 16, 0.99  # pixels, and the correlation of grey images from which two show the same


def groups(labels: Labels) -> list[list[int]]:
    """Samples that are copies of each other and do not all have the same label, those with the worst first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.array([*_equal(labels), *_alike(labels)], np.int64).reshape(-1, 2)
    if not len(pairs):
        return []
    n = len(labels.given)
    _, group = connected_components(coo_array((np.ones(len(pairs)), pairs.T), shape=(n, n)), directed=False)
    members = defaultdict(list)
    for i in labels.order[np.isin(labels.order, pairs)].tolist():
        members[group[i]].append(i)
    return [copies for copies in members.values() if len(set(labels.given[copies])) > 1]


def _equal(labels: Labels) -> Iterator[tuple[int, int]]:
    """Pairs of equal files, each with the one before it."""
    of_size = defaultdict(list)
    for i, file in enumerate(labels.files):
        try:
            of_size[os.stat(labels.root / file).st_size].append(i)
        except OSError:
            continue  # the report says which pictures are gone
    of_content = defaultdict(list)
    for same in of_size.values():
        for i in same if len(same) > 1 else []:
            of_content[hashlib.sha256((labels.root / labels.files[i]).read_bytes()).digest()].append(i)
    for same in of_content.values():
        yield from pairwise(same)


def _alike(labels: Labels) -> Iterator[tuple[int, int]]:
    """Pairs that look the same, scaled, compressed or lit otherwise."""
    compared = labels.order[:COMPARED]
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(_look, [labels.root / labels.files[i] for i in compared]))
    seen = [k for k, look in enumerate(looks) if look is not None]
    if not seen:
        return
    compared, vectors = compared[seen], np.stack([looks[k] for k in seen])  # [K], [K, SIDE * SIDE]
    for at in range(0, len(vectors), 1000):
        for row, column in np.argwhere(vectors[at : at + 1000] @ vectors[at:].T > ALIKE).tolist():
            if row < column:
                yield int(compared[at + row]), int(compared[at + column])


def _look(path: Path) -> np.ndarray | None:
    """[SIDE * SIDE] float32 of mean 0 and length 1: the product of two is their correlation. None: no picture, or an
    even area, which looks like any other."""
    image = plots.picture(path, 4 * SIDE)
    if image is None:
        return None
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32).ravel()
    grey -= grey.mean()
    length = np.linalg.norm(grey)
    return grey / length if length > SIDE else None  # a standard deviation of one step of 255
