"""Label noise: seeded, exact in its rate, saved with its hash."""

import difflib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.progress import track

from flywheel_fast.data import cifar, noise_files
from flywheel_fast.errors import BadInput

MATRIX_CLASSES = 20  # up to which the realised matrix is printed whole


@dataclass(frozen=True)
class NoiseConfig:
    kind: Literal["none", "symmetric", "asymmetric", "pair", "instance", "matrix", "file"] = "none"
    """none: labels as they are; symmetric: any class; asymmetric: by `mapping`; pair: the next class; instance: by what
    is in the image (Xia et al. 2020); matrix: by the shares in `matrix`; file: labels from `file`. Other than with
    none, the source's own labels count as the true ones."""
    rate: float = 0.0
    """Share of the samples whose label is drawn anew: of each (mapped) class with asymmetric and pair; on average with
    instance."""
    exclude_true: bool = False
    """Symmetric noise draws over the other classes only, so that `rate` is the share of wrong labels."""
    mapping: dict[str, str] = field(default_factory=dict)
    """Asymmetric noise: the class that each mislabelled class becomes, for example {cat: dog, dog: cat}. Without it,
    the literature's map of CIFAR-10, or of CIFAR-100: the next class of the superclass."""
    matrix: str | None = None
    """Shares of the labels (columns) that each true class (rows) gets: .npy, C x C; or .csv with the classes' names
    above and before the shares, such as a run's labels/corruption.csv, or without."""
    file: str | None = None
    """Labels of the training files, class names or numbers, in the order of the class folders, the files of each
    sorted, or of the source's list: .npy, .npz, .json (DivideMix's), .pt (CIFAR-N's); or .csv with a column `label`, in
    that order or with `file_name`."""
    key: str | None = None
    """Array of a file that holds several, such as worse_label of CIFAR-10N's; null: the only one of noisy labels."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"data.noise.rate must be in [0, 1], not {self.rate}")
        if self.seed < 0:
            raise ValueError(f"data.noise.seed must not be negative, not {self.seed}")
        if (self.kind == "file") != (self.file is not None):
            raise ValueError("data.noise.kind=file and data.noise.file go together: give both or neither")
        if (self.kind == "matrix") != (self.matrix is not None):
            raise ValueError("data.noise.kind=matrix and data.noise.matrix go together: give both or neither")


def apply(
    labels: np.ndarray,
    classes: tuple[str, ...],
    config: NoiseConfig,
    root: Path = Path(),
    files: np.ndarray | None = None,
) -> np.ndarray:
    """Noisy labels [N] int64 for true labels [N] int64; `files` [N] str under `root`, for noise that looks at them."""
    rng = np.random.default_rng(config.seed)
    if config.kind == "symmetric":
        return _symmetric(labels, len(classes), config, rng)
    if config.kind == "asymmetric":
        mapping = config.mapping or cifar.asymmetric_map(classes)
        if mapping is None:
            raise BadInput("data.noise.kind=asymmetric needs data.noise.mapping, for example {cat: dog}")
        return _asymmetric(labels, classes, mapping, config.rate, rng)
    if config.kind == "pair":
        following = dict(zip(classes, classes[1:] + classes[:1], strict=True))
        return _asymmetric(labels, classes, following, config.rate, rng)
    if config.kind == "matrix":
        return _by_matrix(labels, noise_files.read_matrix(Path(config.matrix), classes), rng)
    if config.kind == "instance":
        return _instance(labels, len(classes), config.rate, [root / file for file in files], rng)
    if config.kind == "file":
        return noise_files.read(Path(config.file), config.key, labels, classes, files)
    return labels


def digest(labels: np.ndarray) -> str:
    """SHA-256 of the labels: two runs with equal digests had the same noise."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


def save(file, labels: np.ndarray, counts: np.ndarray) -> None:
    """Writes an .npz that `data.noise.kind=file` reads back: `label` [N] int64, its hash, `matrix` [C, C] int64."""
    np.savez_compressed(file, label=labels.astype(np.int64), sha256=digest(labels), matrix=counts)


def realised(true: np.ndarray, noisy: np.ndarray, num_classes: int) -> np.ndarray:  # [C, C] int64
    """How many labels of each true class (rows) became which (columns)."""
    return np.bincount(true * num_classes + noisy, minlength=num_classes**2).reshape(num_classes, num_classes)


def describe(counts: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    """The realised matrix as lines of text, in per cent; of many classes the most frequent mistakes."""
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if len(classes) <= MATRIX_CLASSES:
        names = [f"{label} {name}"[:20] for label, name in enumerate(classes)]
        rows = ["".join(f"{share:6.1f}" if share else "     ." for share in row) for row in shares]
        head = " " * 20 + "".join(f"{label:6}" for label in range(len(classes)))
        return [
            "true class (rows) and label (columns), %:",
            head,
            *(f"{n:20}{r}" for n, r in zip(names, rows, strict=True)),
        ]
    wrong = np.where(np.eye(len(classes), dtype=bool), 0, counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MATRIX_CLASSES]
    pairs = [divmod(int(place), len(classes)) for place in order if wrong.flat[place]]
    return [
        "most frequent mistakes:",
        *(f"  {classes[y]} -> {classes[j]}: {wrong[y, j]:,} ({shares[y, j]:.1f} %)" for y, j in pairs),
    ]


def _symmetric(labels: np.ndarray, num_classes: int, config: NoiseConfig, rng: np.random.Generator) -> np.ndarray:
    noisy = labels.copy()
    hit = rng.permutation(len(labels))[: round(config.rate * len(labels))]
    if config.exclude_true:
        noisy[hit] = (labels[hit] + rng.integers(1, max(num_classes, 2), size=len(hit))) % num_classes
    else:
        noisy[hit] = rng.integers(num_classes, size=len(hit))
    return noisy


def _asymmetric(
    labels: np.ndarray, classes: tuple[str, ...], mapping: dict[str, str], rate: float, rng: np.random.Generator
) -> np.ndarray:
    noisy = labels.copy()
    for source, target in mapping.items():
        for name in (source, target):
            if name not in classes:
                near = difflib.get_close_matches(name, classes, n=1) or classes[:1]
                raise BadInput(f"data.noise.mapping: there is no class {name!r}; did you mean {near[0]!r}?")
        members = rng.permutation(np.flatnonzero(labels == classes.index(source)))
        noisy[members[: round(rate * len(members))]] = classes.index(target)
    return noisy


def _by_matrix(labels: np.ndarray, matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each class's labels in the shares of its row, as near as whole numbers come."""
    noisy = labels.copy()
    for label, row in enumerate(matrix):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.round(row.cumsum() * len(members)).astype(np.int64)
        noisy[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    return noisy


def _instance(
    labels: np.ndarray, num_classes: int, rate: float, paths: list[Path], rng: np.random.Generator
) -> np.ndarray:
    """Xia et al., "Part-dependent Label Noise", NeurIPS 2020, Algorithm 2: a sample's rate is drawn from a normal
    distribution around `rate`, cut to [0, 1]; its wrong class by a random projection of the image, one a class."""
    rates = np.empty(0)
    while len(rates) < len(labels):
        drawn = rng.normal(rate, 0.1, len(labels))
        rates = np.concatenate([rates, drawn[(drawn >= 0) & (drawn <= 1)]])
    rates = rates[: len(labels)] if rate > 0 else np.zeros(len(labels))
    images = np.stack(
        [_pixels(path) for path in track(paths, "reading images for the noise", transient=True)]
    )  # [N, S]
    noisy = labels.copy()
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        scores = images[members] @ rng.standard_normal((images.shape[1], num_classes), dtype=np.float32)  # [members, C]
        scores[:, label] = -np.inf
        wrong = np.exp(scores - scores.max(axis=1, keepdims=True))
        chance = rates[members, None] * wrong / wrong.sum(axis=1, keepdims=True)
        chance[:, label] = 1 - rates[members]
        drawn = rng.random(len(members))[:, None]
        noisy[members] = np.minimum((chance.cumsum(axis=1) < drawn).sum(axis=1), num_classes - 1)
    return noisy


def _pixels(path: Path) -> np.ndarray:
    """An image as [3072] float32 around zero, at 32 x 32."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((32, 32))
    except Exception:  # every format has its own; a broken file is left out of the training later
        return np.zeros(32 * 32 * 3, dtype=np.float32)
    return (np.asarray(small, dtype=np.float32).reshape(-1) / 255 - 0.5) / 0.25
