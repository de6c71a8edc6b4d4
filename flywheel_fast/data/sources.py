"""From folders, a CSV or the digits of scikit-learn to manifests of the training and the test split."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from flywheel_fast.data import noise
from flywheel_fast.data.manifest import Manifest, read_columns
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.errors import BadInput

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"}
TEST_FOLDERS = ("test", "val", "validation")


@dataclass(frozen=True)
class DataConfig:
    source: Literal["digits", "folder", "csv"] = "digits"
    """digits: scikit-learn's; folder: root/train/CLASS/* and root/test/CLASS/*, or root/CLASS/*; csv: a file with
    columns file_name and label, and if there are any split (train, test) and true_label."""
    root: str = ""
    """The folder, or the CSV file (its paths are relative to it)."""
    train_size: int | None = None
    """Train on a seeded subset of this many samples, equally many of each class of the source."""
    imbalance: float = 1.0
    """How many times more samples the first class keeps than the last, those between in a geometric row (Cui et al.
    2019); the first one keeps what it has, or its part of train_size."""
    test_size: int | None = None
    """Likewise for the test split."""
    holdout: float = 0.1
    """Share of each class set aside as test split where the source has none; its labels are as good as the others."""
    seed: int = 0
    """Seed of subsets and of the holdout."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    threads: int = 2
    """Threads of the image pipeline."""
    cache_gb: float = 2.0
    """Small images stay decoded in memory up to this size in all."""

    def __post_init__(self):
        if self.source != "digits" and not self.root:
            raise ValueError(f"data.source={self.source} needs data.root=PATH")
        if not 0 < self.holdout < 1:
            raise ValueError(f"data.holdout must be in (0, 1), not {self.holdout}")
        for name in ("train_size", "test_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.imbalance < 1:
            raise ValueError(f"data.imbalance must be at least 1, not {self.imbalance}")
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative, not {self.seed}")
        if self.threads < 1:
            raise ValueError(f"data.threads must be at least 1, not {self.threads}")


class Data(NamedTuple):
    train: Manifest
    test: Manifest | None
    noisy_labels: np.ndarray  # of every file of the training split, before the holdout: what a noise file holds


def load(config: DataConfig) -> Data:
    """Reads the source, adds the noise, takes the subsets. Raises BadInput naming the file, row or key."""
    train, test = SOURCES[config.source](config)
    if len(train.classes) < 2:
        raise BadInput(f"{train.root}: holds one class only ({train.classes[0]!r}); a classifier needs at least two")
    source, source_labels = train, train.labels
    noisy = noise.apply(train.labels, train.classes, config.noise, train.root, train.files)
    if config.noise.kind != "none":
        train = Manifest(train.root, train.files, noisy, train.classes, true_labels=source_labels)
    if test is None:
        aside = _set_aside(source, config)
        test, train, source_labels = source.subset(aside), train.subset(~aside), source_labels[~aside]
    if config.train_size:
        chosen = _balanced(source_labels, train.classes, config.train_size, config.seed, "data.train_size")
        train, source_labels = train.subset(chosen), source_labels[chosen]
    if config.imbalance > 1:
        train = train.subset(_long_tailed(source_labels, len(train.classes), config.imbalance, config.seed))
    if config.test_size:
        test = test.subset(_balanced(test.labels, test.classes, config.test_size, config.seed, "data.test_size"))
    return Data(train, test, noisy)


def _set_aside(manifest: Manifest, config: DataConfig) -> np.ndarray:  # [N] bool
    rng = np.random.default_rng(config.seed)
    test = np.zeros(len(manifest), dtype=bool)
    for label, name in enumerate(manifest.classes):
        members = rng.permutation(np.flatnonzero(manifest.labels == label))
        if len(members) < 2:
            raise BadInput(
                f"{manifest.root}: class {name!r} has {len(members)} image; at least 2 are needed to set one aside"
            )
        test[members[: max(1, round(config.holdout * len(members)))]] = True
    return test


def _balanced(labels: np.ndarray, classes: tuple[str, ...], size: int, seed: int, key: str) -> np.ndarray:
    if size < len(classes):
        raise BadInput(
            f"{key}={size} leaves classes without an image; give at least {len(classes)}, one for each class"
        )
    rng = np.random.default_rng(seed)
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
    rng = np.random.default_rng(seed)
    first = np.count_nonzero(labels == 0)
    chosen = []
    for label in range(num_classes):
        wanted = max(1, round(first * imbalance ** (-label / (num_classes - 1))))
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:wanted])
    return np.sort(np.concatenate(chosen))


# -- folders -----------------------------------------------------------------------------------------------------------


def _folder(config: DataConfig) -> tuple[Manifest, Manifest | None]:
    root = Path(config.root)
    if not root.is_dir():
        raise BadInput(f"data.root {root}: is not a folder")
    if not (root / "train").is_dir():
        return _class_folders(root, "", None), None
    train = _class_folders(root, "train", None)
    test = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    return train, _class_folders(root, test, train.classes) if test else None


def _class_folders(root: Path, split: str, classes: tuple[str, ...] | None) -> Manifest:
    """root/split/CLASS/*, deeper folders included; `classes`: those of the training split, where this is the other."""
    base = root / split
    found = [entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith(".")]
    if not found:
        raise BadInput(f"{base}: holds no class folders; images are expected as {base}/CLASS/IMAGE.jpg")
    of_class = {name: label for label, name in enumerate(classes or _natural(found))}
    unknown = sorted(set(found) - set(of_class))
    if unknown:
        raise BadInput(
            f"{base / unknown[0]}: this class has no training images; add some to {root / 'train'}, or remove it"
        )
    files, labels = [], []
    for name in sorted(found):
        inside = []
        for folder, inner, names in os.walk(base / name, followlinks=True):
            here = Path(folder).resolve()
            inner[:] = [one for one in inner if not here.is_relative_to((here / one).resolve())]  # no link back up
            within = os.path.relpath(folder, root)
            images = (file for file in names if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES)
            inside += [f"{within}/{file}" for file in images if not file.startswith(".")]
        if not inside and classes is None:
            raise BadInput(
                f"{base / name}: this class has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); add some or remove it"
            )
        files += sorted(inside)
        labels += [of_class[name]] * len(inside)
    if not files:
        raise BadInput(f"{base}: its class folders hold no images; add some, or remove the folder")
    return Manifest(root, np.array(files), np.array(labels, dtype=np.int64), tuple(of_class))


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _csv(config: DataConfig) -> tuple[Manifest, Manifest | None]:
    path = Path(config.root)
    optional = ("split", "true_label")
    table = read_columns(f"data.root {path}", path, required=("file_name", "label"), optional=optional)
    files, split = table["file_name"], table.get("split", np.full(len(table["label"]), "train"))
    strange = np.flatnonzero(~np.isin(split, ("train", *TEST_FOLDERS)))
    if len(strange):
        raise BadInput(f"{path}: row {strange[0] + 2} has split {split[strange[0]]!r}; it must be train or test")
    in_train = split == "train"
    if not in_train.any():
        raise BadInput(f"{path}: holds no training rows")
    for row, name in enumerate(files.tolist()):
        if os.path.isabs(name) or os.path.normpath(name).split("/")[0] == "..":
            raise BadInput(f"{path}: row {row + 2}: {name!r} lies outside {path.parent}; put the CSV above its images")
        if not os.path.isfile(path.parent / name):
            raise BadInput(
                f"{path}: row {row + 2}: {path.parent / name} does not exist; remove the row or add the file"
            )
    classes = tuple(_natural(np.unique(table["label"][in_train]).tolist()))
    of_class = {name: label for label, name in enumerate(classes)}

    def to_labels(column: str, rows: np.ndarray) -> np.ndarray:
        names = table[column][rows].tolist()
        unknown = [(row, name) for row, name in zip(rows, names, strict=True) if name not in of_class]
        if unknown:
            row, name = unknown[0]
            raise BadInput(
                f"{path}: row {row + 2}: {column} {name!r} is the label of no training row; add one, or remove it"
            )
        return np.array([of_class[name] for name in names], dtype=np.int64)

    def part(rows: np.ndarray) -> Manifest:
        true = to_labels("true_label", rows) if "true_label" in table else None
        return Manifest(path.parent, files[rows], to_labels("label", rows), classes, true)

    return part(np.flatnonzero(in_train)), None if in_train.all() else part(np.flatnonzero(~in_train))


def _natural(names: list[str]) -> list[str]:
    """Numbers in numeric order, so that class 10 is 10 in a noise file too; anything else by the alphabet."""
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else sorted(names)


# -- scikit-learn's digits ---------------------------------------------------------------------------------------------


def _digits(config: DataConfig) -> tuple[Manifest, Manifest]:
    """1,797 handwritten digits of 8 x 8 pixels, 1,347 of them to train on; written once as PNG files into the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flywheel-fast"
    folder = cache / "digits-v1"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=cache))
        except OSError as error:
            raise BadInput(f"{cache}: cannot be written ({error.strerror}); name a folder by XDG_CACHE_HOME") from error
        _write_digits(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(temporary)
    return _folder(DataConfig("folder", str(folder)))


def _write_digits(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    in_train, _ = train_test_split(np.arange(len(labels)), train_size=1347, random_state=0, stratify=labels)
    split = np.full(len(labels), "test", dtype=object)
    split[in_train] = "train"
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / split[number] / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


SOURCES: dict[str, Callable[[DataConfig], tuple[Manifest, Manifest | None]]] = {
    "digits": _digits,
    "folder": _folder,
    "csv": _csv,
}
