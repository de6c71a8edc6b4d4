"""From a source, as it was published or as a user has it, to manifests of the training and the test split."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from flywheel_fast.data import noise, reviews
from flywheel_fast.data.manifest import DROPPED, Manifest, missing, read_table
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.data.sources import arrays, features, folders, lists, shards, tables
from flywheel_fast.data.sources.features import Features
from flywheel_fast.errors import BadInput

# root -> training split, test split; and ImageNet's validation images, which WebVision is tested on too
SOURCES: dict[str, Callable[[Path], tuple[Manifest | None, ...]]] = {
    "digits": lambda root: arrays.digits(),
    "folder": folders.read,
    "csv": tables.read,
    "webdataset": shards.read,
    "cifar10": lambda root: arrays.cifar(root, "cifar10"),
    "cifar100": lambda root: arrays.cifar(root, "cifar100"),
    "mnist": lambda root: arrays.idx(root, "mnist"),
    "fashion_mnist": lambda root: arrays.idx(root, "fashion_mnist"),
    "tiny_imagenet": lists.tiny_imagenet,
    "clothing1m": lists.clothing1m,
    "webvision": lambda root: lists.webvision(root, mini=False),
    "webvision_mini": lambda root: lists.webvision(root, mini=True),
}
LISTED = {"csv", "tiny_imagenet", "clothing1m", "webvision", "webvision_mini"}  # a list may name what is not there


@dataclass(frozen=True)
class DataConfig:
    source: Literal[
        "digits",
        "folder",
        "csv",
        "webdataset",
        "cifar10",
        "cifar100",
        "mnist",
        "fashion_mnist",
        "tiny_imagenet",
        "clothing1m",
        "webvision",
        "webvision_mini",
        "features",
    ] = "digits"
    """digits: scikit-learn's; folder: root/train/CLASS/* and root/test/CLASS/*, or root/CLASS/*; csv: a CSV or Parquet
    file with columns file_name and label, and if there are any split (train, test) and true_label, or a folder with
    such a metadata.csv; webdataset: a folder of tar shards; features: see there; the others as they are published
    (docs/data.md)."""
    root: str = ""
    """The folder, or the table (its paths are relative to it)."""
    features: str = ""
    """Features in place of images: a folder that `flywheel-fast embed` wrote; a .npy file, whose rows `root` labels, a
    table with columns label, and if there are any file_name, split and true_label; or a Parquet file with both."""
    images: str = ""
    """The folder that a table's paths are relative to, where that is not the table's own."""
    download: bool = False
    """CIFAR-10 and -100 that are not in `root` yet are downloaded into it, by torchvision."""
    skip: str | None = None
    """A table of files to leave out, such as the bad_files.csv that `flywheel-fast data check` writes."""
    reviews: str | None = None
    """The reviews.csv that `flywheel-fast review` writes: labels that people decided on are pinned, dropped images left
    out."""
    train_size: int | None = None
    """Train on a seeded subset of this many samples, equally many of each class of the source."""
    imbalance: float = 1.0
    """How many times more samples the first class keeps than the last, those between in a geometric row (Cui et al.
    2019); the first one keeps what it has, or its part of train_size."""
    test_size: int | None = None
    """Likewise for the test split."""
    holdout: float = 0.1
    """Share of each class set aside as test split where the source has none; its labels are as good as the others. 0:
    none, and nothing is tested."""
    seed: int = 0
    """Seed of subsets and of the holdout."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    threads: int = 2
    """Threads of the image pipeline."""
    cache_gb: float | None = None
    """Images stay in memory up to this size: decoded on the GPU, else decoded in host memory, else as files there.
    null: up to a quarter of the free GPU memory and half of the free host memory; 0: they are read anew each time."""

    def __post_init__(self):
        if (self.source == "features") != bool(self.features):
            raise ValueError("data.features: data.source=features and data.features=PATH go together")
        if self.source not in ("digits", "features") and not self.root:
            raise ValueError(f"data.source={self.source} needs data.root=PATH")
        if self.images and self.source != "csv":
            raise ValueError(f"data.images is for data.source=csv, not for {self.source}; data.root names its folder")
        if self.download and self.source not in arrays.LAYOUT:
            raise ValueError(f"data.download=true is for {', '.join(arrays.LAYOUT)}, not for {self.source}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"data.holdout must be in [0, 1), not {self.holdout}")
        for name in ("train_size", "test_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.imbalance < 1:
            raise ValueError(f"data.imbalance must be at least 1, not {self.imbalance}")
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative, not {self.seed}")
        if self.cache_gb is not None and self.cache_gb < 0:
            raise ValueError(f"data.cache_gb must not be negative, not {self.cache_gb}")
        if self.threads < 1:
            raise ValueError(f"data.threads must be at least 1, not {self.threads}")


class Data(NamedTuple):
    train: Manifest
    test: Manifest
    noisy_labels: np.ndarray  # of every file of the training split, before the holdout: what a noise file holds
    imagenet: Manifest | None = None  # WebVision's second test set
    features: Features | None = None  # of all these, in place of images

    def splits(self) -> dict[str, Manifest]:
        """By name, the training split first."""
        named = {"train": self.train, "test": self.test, "imagenet": self.imagenet}
        return {name: part for name, part in named.items() if part is not None and len(part)}


def load(config: DataConfig, present: bool = True) -> Data:
    """Reads the source, adds the noise, takes the subsets. Raises BadInput naming the file, row or key.

    `present`: all files must be there.
    """
    embedded = features.read(Path(config.features), config.root) if config.features else None
    if config.download:
        arrays.download(Path(config.root), config.source)
    root, images = Path(config.root), Path(config.images) if config.images else None
    if embedded:
        train, *rest = embedded.train, embedded.test
    else:
        train, *rest = tables.read(root, images) if images else SOURCES[config.source](root)
    tests = {name: part for name, part in zip(("test", "imagenet"), rest, strict=False) if part is not None}
    if len(train.classes) < 2:
        raise BadInput(f"{train.root}: holds one class only ({train.classes[0]!r}); a classifier needs at least two")
    source, source_labels = train, train.labels
    noisy = noise.apply(train.labels, train.classes, config.noise, train.root, train.files)
    if config.noise.kind != "none":
        train = Manifest(train.root, train.files, noisy, train.classes, true_labels=source_labels)
    if config.reviews:
        train = replace(train, reviewed=reviews.of_manifest(Path(config.reviews), train))
    if "test" not in tests:
        aside = _set_aside(source, config)
        tests["test"], train, source_labels = source.subset(aside), train.subset(~aside), source_labels[~aside]
    if config.skip:  # only now: a noise file has a label for every file of the source
        skipped = _skipped(config.skip)
        kept = _kept(config.skip, skipped, train)
        train, source_labels = train.subset(kept), source_labels[kept]
        tests = {name: part.subset(_kept(config.skip, skipped, part)) for name, part in tests.items()}
    if config.train_size:
        chosen = _balanced(source_labels, train.classes, config.train_size, config.seed, "data.train_size")
        train, source_labels = train.subset(chosen), source_labels[chosen]
    if config.imbalance > 1:
        train = train.subset(_long_tailed(source_labels, len(train.classes), config.imbalance, config.seed))
    if config.test_size:
        for name, part in tests.items():
            chosen = _balanced(part.labels, part.classes, config.test_size, config.seed, "data.test_size")
            tests[name] = part.subset(chosen)
    if train.reviewed is not None and np.all(train.reviewed == DROPPED):
        raise BadInput(f"data.reviews {config.reviews}: drops every training image; nothing would be left")
    data = Data(train, tests["test"], noisy, tests.get("imagenet"), embedded)
    for manifest in data.splits().values() if present else ():
        gone = absent(manifest, config)
        if len(gone):
            more = f", nor do {len(gone) - 1:,} more of {len(manifest):,}" if len(gone) > 1 else ""
            raise BadInput(
                f"{manifest.root / manifest.files[gone[0]]}: does not exist{more}; add what is missing, or leave "
                f"it out by data.skip=bad_files.csv (`flywheel-fast data check` writes that file)"
            )
    return data


def absent(manifest: Manifest, config: DataConfig) -> np.ndarray:  # [missing] int64
    """Rows whose file is not there; folders were read from the disk, so theirs are."""
    return missing(manifest) if config.source in LISTED else np.empty(0, np.int64)


def _skipped(path: str) -> set[str]:
    table = read_table(f"data.skip {path}", Path(path), required=("file_name",), optional=())
    return set(table["file_name"].to_pylist())


def _kept(path: str, skipped: set[str], manifest: Manifest) -> np.ndarray:  # [kept] int64
    kept = np.flatnonzero([file not in skipped for file in manifest.files.tolist()])
    if not len(kept):
        raise BadInput(f"data.skip {path}: names every file of a split; nothing would be left")
    return kept


def _rng(seed: int, use: str) -> np.random.Generator:
    """A stream for each use: with one for all and the noise, a subset of equal seed would be of the mislabelled."""
    return np.random.default_rng((seed, *use.encode()))


def _set_aside(manifest: Manifest, config: DataConfig) -> np.ndarray:  # [N] bool
    rng = _rng(config.seed, "aside")
    test = np.zeros(len(manifest), dtype=bool)
    for label, name in enumerate(manifest.classes):
        members = rng.permutation(np.flatnonzero(manifest.labels == label))
        if len(members) < 2 and config.holdout:
            raise BadInput(
                f"{manifest.root}: class {name!r} has {len(members)} image; at least 2 are needed to set one aside"
            )
        if config.holdout:
            test[members[: max(1, round(config.holdout * len(members)))]] = True
    return test


def _balanced(labels: np.ndarray, classes: tuple[str, ...], size: int, seed: int, key: str) -> np.ndarray:
    if size < len(classes):
        raise BadInput(
            f"{key}={size} leaves classes without an image; give at least {len(classes)}, one for each class"
        )
    rng = _rng(seed, "subset")
    chosen = []
    for label, name in enumerate(classes):
        wanted = size // len(classes) + (label < size % len(classes))
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < wanted:
            raise BadInput(
                f"{key}={size} asks for {wanted} images of class {name!r}, which has {len(members)}; lower it"
            )
        chosen.append(members[:wanted])
    return np.sort(np.concatenate(chosen))


def _long_tailed(labels: np.ndarray, num_classes: int, imbalance: float, seed: int) -> np.ndarray:
    rng = _rng(seed, "tail")
    first = np.count_nonzero(labels == 0)
    chosen = []
    for label in range(num_classes):
        wanted = max(1, round(first * imbalance ** (-label / (num_classes - 1))))
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:wanted])
    return np.sort(np.concatenate(chosen))
