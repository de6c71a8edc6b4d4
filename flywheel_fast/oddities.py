"""What is odd about images, by their features: outliers, near-duplicates of another label, those of two classes."""

import csv
import io
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from flywheel_fast.audit import Labels
from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.em import EMState

FILE = "oddities.csv"  # in the folder of the labels
NEIGHBOURS = 10
EXACT = 100_000  # images of which every pair is compared; more take faiss
SAME = 0.97  # cosine of features from which two images show the same
BETWEEN = 0.3  # probability that each of two classes has at least, where an image fits both
BLOCK = 2048  # images at a time
MOST = 1000  # rows of a kind, the oddest first


@dataclass(frozen=True)
class Oddity:
    file_name: str
    kind: str  # outlier, near-duplicate, two classes
    score: float  # outlier: mean cosine to its neighbours; near-duplicate: cosine; two classes: the lesser probability
    detail: str  # near-duplicate: the other file; two classes: their names
    given_label: str


def find(features: np.ndarray, labels: Labels, second: tuple[np.ndarray, np.ndarray]) -> tuple[list[Oddity], str]:
    """Of N images with features [N, D]; `second`: class [N] int64 and probability [N] that come second in the
    posterior. And why something was not looked for, or nothing."""
    cosine, neighbour, why_not = neighbours(features)  # [N, K]
    names, found = labels.classes, []

    def add(i: int, kind: str, score: float, detail: str = "") -> None:
        found.append(Oddity(str(labels.files[i]), kind, float(score), detail, names[labels.given[i]]))

    if len(cosine):
        mean = cosine.mean(axis=1)
        low, high = np.quantile(mean, [0.25, 0.75])
        for i in _worst(mean < low - 1.5 * (high - low), mean):  # beyond Tukey's fence
            add(i, "outlier", mean[i])
        pairs = np.argwhere((cosine > SAME) & (labels.given[neighbour] != labels.given[:, None]))
        pairs = [(i, neighbour[i, k], cosine[i, k]) for i, k in pairs]
        for i, j, score in sorted(pairs, key=lambda pair: -pair[2])[:MOST]:
            add(i, "near-duplicate", score, str(labels.files[j]))
    other, share = second
    for i in _worst(np.minimum(share, labels.suggested_prob) > BETWEEN, -share):
        add(i, "two classes", share[i], f"{names[labels.suggested[i]]}, {names[other[i]]}")
    return found, why_not


def second_class(state: EMState, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Class [N] int64 that comes second in each posterior, and its probability [N]; the teacher must be at hand."""
    labels, probs = np.empty(len(state.labels), np.int64), np.empty(len(state.labels), np.float32)
    for index, q in state.posteriors(kind):
        top = q.topk(2, dim=1)
        labels[index], probs[index] = top.indices[:, 1].cpu().numpy(), top.values[:, 1].cpu().numpy()
    return labels, probs


def write(found: list[Oddity], folder: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(Oddity.__annotations__)
    writer.writerows((one.file_name, one.kind, f"{one.score:.4f}", one.detail, one.given_label) for one in found)
    write_atomic(folder / FILE, text.getvalue().encode("utf-8", "surrogateescape"))


def read(folder: Path) -> list[Oddity]:
    """What `write` wrote; nothing where it did not."""
    path = folder / FILE
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [Oddity(**row | {"score": float(row["score"])}) for row in csv.DictReader(file)]


def _worst(chosen: np.ndarray, score: np.ndarray) -> list[int]:
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(score[rows], kind="stable")][:MOST].tolist()


def neighbours(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Cosine [N, K] to the K nearest others, and which they are [N, K]; or why not."""
    n = len(features)
    k = min(NEIGHBOURS, n - 1)
    none = np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    if n > EXACT:
        if not find_spec("faiss"):
            return *none, f"outliers and near-duplicates are left out: {n:,} images take the extra faiss (faiss-cpu)"
        return *_by_faiss(features, k), ""
    unit = _unit(features)
    cosines, neighbours = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    starts = range(0, n, BLOCK)
    for at in track(starts, "comparing images", transient=True, disable=n < 20_000):
        block = unit[at : at + BLOCK] @ unit.T  # [B, N]
        block[torch.arange(len(block)), torch.arange(at, at + len(block))] = -2  # itself
        top = block.topk(k, dim=1)
        cosines[at : at + BLOCK], neighbours[at : at + BLOCK] = top.values.numpy(), top.indices.numpy()
    return cosines, neighbours, ""


def _unit(features: np.ndarray) -> torch.Tensor:  # [N, D] float32
    """Without what all have in common, and of length one."""
    values = torch.from_numpy(np.asarray(features, dtype=np.float32))
    return torch.nn.functional.normalize(values - values.mean(dim=0), dim=1)


def _by_faiss(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    unit = _unit(features).numpy()
    cells = int(np.sqrt(len(unit)))
    index = faiss.index_factory(unit.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(unit[:: max(1, len(unit) // (64 * cells))])
    index.add(unit)
    index.nprobe = 16
    cosines, neighbours = index.search(unit, k + 1)
    own = neighbours == np.arange(len(unit))[:, None]
    own[~own.any(axis=1), -1] = True  # not among them: the last one goes
    return cosines[~own].reshape(-1, k), neighbours[~own].reshape(-1, k)
