"""Miniatures of published data sets, in their exact layout: a config can be tried before the download."""

import colorsys
import pickle
import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flywheel_fast.data.cifar import CIFAR10_CLASSES, CIFAR100_SUPERCLASSES
from flywheel_fast.data.sources.folders import IMAGE_SUFFIXES
from flywheel_fast.data.sources.lists import CLOTHING1M_CLASSES
from flywheel_fast.errors import BadInput

WRONG = 0.4  # share of the labels that the miniatures of noisy data sets get wrong


def make(kind: str, folder: Path, images: Path | None = None) -> None:
    """Writes the miniature into a new folder; of pictures below `images`, those of one folder as one class, or of drawn
    ones. Raises BadInput."""
    if kind not in KINDS:
        raise BadInput(f"there is no miniature of {kind!r}; choose {', '.join(KINDS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is there already; name a new folder")
    pictures = _Pictures(images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        KINDS[kind](folder, pictures)
    except OSError as error:
        raise BadInput(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error


class _Pictures:
    """Pictures of a class; cut from given ones a little differently each time."""

    def __init__(self, images: Path | None):
        self.rng = np.random.default_rng(0)
        self.pools: list[list[Path]] = []
        if images:
            of_folder = defaultdict(list)
            for path in sorted(images.rglob("*")):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    of_folder[path.parent.name].append(path)
            self.pools = list(of_folder.values())
            if not self.pools:
                raise BadInput(f"--images {images}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.used = defaultdict(int)

    def draw(self, label: int, width: int, height: int) -> Image.Image:
        if not self.pools:
            return self._drawn(label, width, height)
        pool = label % len(self.pools)
        path = self.pools[pool][self.used[pool] % len(self.pools[pool])]
        self.used[pool] += 1
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for what is no image
            raise BadInput(f"{path}: cannot be read as an image ({error}); remove it from --images") from error
        part = self.rng.uniform(0.8, 1, 2)
        crop = [max(1, round(side * share)) for side, share in zip(image.size, part, strict=True)]
        left, top = (self.rng.integers(full - side + 1) for full, side in zip(image.size, crop, strict=True))
        return ImageOps.fit(image.crop((left, top, left + crop[0], top + crop[1])), (width, height))

    def _drawn(self, label: int, width: int, height: int) -> Image.Image:
        """Stripes, their colour and direction by class, under grain."""
        color = np.array(colorsys.hsv_to_rgb(label * 0.618 % 1, 0.8, 1))
        angle, phase = label * 2.4, self.rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:height, :width] / max(width, height)
        stripes = 0.5 + 0.5 * np.sin(25 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        pixels = 255 * (0.25 + 0.6 * stripes[..., None] * color) + self.rng.normal(0, 12, (height, width, 3))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def save(self, path: Path, label: int, width: int = 112, height: int = 96) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.draw(label, width, height).save(path, "JPEG")

    def noisy(self, label: int, num_classes: int) -> int:
        return int(self.rng.integers(num_classes)) if self.rng.random() < WRONG else label


# -- one function a data set -------------------------------------------------------------------------------------------


def _clothing1m(folder: Path, pictures: _Pictures) -> None:
    classes = len(CLOTHING1M_CLASSES)
    lists, noisy_kv, clean_kv = defaultdict(list), [], []
    number = 0
    for name, count in (("noisy_train", 8), ("clean_train", 1), ("clean_val", 1), ("clean_test", 2)):
        for label in np.repeat(np.arange(classes), count).tolist():
            key = f"images/{number % 10}/{number % 100:02}/{number:07},{number % 100:02}.jpg"
            pictures.save(folder / key, label)
            lists[name].append(key)
            if name != "clean_test":
                noisy_kv.append(f"{key} {pictures.noisy(label, classes)}")
            if name != "noisy_train":
                clean_kv.append(f"{key} {label}")
            number += 1
    for name, keys in lists.items():
        _write(folder / f"{name}_key_list.txt", [keys[row] for row in pictures.rng.permutation(len(keys))])
    _write(folder / "noisy_label_kv.txt", noisy_kv)
    _write(folder / "clean_label_kv.txt", clean_kv)
    _write(folder / "category_names_eng.txt", CLOTHING1M_CLASSES)


def _webvision(folder: Path, pictures: _Pictures) -> None:
    classes = 60  # more than the mini protocol keeps
    lines = defaultdict(list)
    for label in range(classes):
        for engine, count in (("google", 4), ("flickr", 2)):
            for number in range(count):
                name = f"{engine}/q{label + 1:04}/{number:03}_{label}.jpg"
                pictures.save(folder / name, pictures.noisy(label, classes))
                lines[f"train_filelist_{engine}"].append(f"{name} {label}")
        name = f"val{label + 1:06}.jpg"
        pictures.save(folder / "val_images_256" / name, label)
        lines["val_filelist"].append(f"{name} {label}")
        pictures.save(folder / "imagenet" / "val" / _wnid(label) / f"ILSVRC2012_val_{label + 1:08}.JPEG", label)
    for name, content in lines.items():
        _write(folder / "info" / f"{name}.txt", content)
    synsets = [f"{_wnid(label)} thing {label}, item {label}" for label in range(classes)]
    synsets[7] = f"{_wnid(7)} thing 8"  # two classes share a name, as crane and crane do
    _write(folder / "info" / "synsets.txt", synsets)


def _tiny_imagenet(folder: Path, pictures: _Pictures) -> None:
    classes = 10
    annotations = []
    for label in range(classes):
        wnid = _wnid(label)
        names = [f"{wnid}_{number}.JPEG" for number in range(12)]
        for name in names:
            pictures.save(folder / "train" / wnid / "images" / name, label, 64, 64)
        _write(folder / "train" / wnid / f"{wnid}_boxes.txt", [f"{name}\t0\t0\t63\t63" for name in names])
        for number in range(2 * label, 2 * label + 2):
            pictures.save(folder / "val" / "images" / f"val_{number}.JPEG", label, 64, 64)
            annotations.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63")
    pictures.save(folder / "test" / "images" / "test_0.JPEG", 0, 64, 64)
    _write(folder / "val" / "val_annotations.txt", annotations)
    _write(folder / "wnids.txt", [_wnid(label) for label in reversed(range(classes))])
    _write(folder / "words.txt", [f"{_wnid(label)}\tthing {label}, item {label}" for label in range(classes + 5)])


def _cifar10(folder: Path, pictures: _Pictures) -> None:
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    parts = [(f"data_batch_{number}", f"training batch {number} of 5") for number in range(1, 6)]
    for file, title in [*parts, ("test_batch", "testing batch 1 of 1")]:
        labels = pictures.rng.permutation(np.repeat(np.arange(10), 4)).tolist()
        _dump(base / file, _batch(pictures, title, labels) | {"labels": labels})
    _dump(base / "batches.meta", {"num_cases_per_batch": 40, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072})


def _cifar100(folder: Path, pictures: _Pictures) -> None:
    base = folder / "cifar-100-python"
    base.mkdir()
    coarse_of = {name: coarse for coarse, names in enumerate(CIFAR100_SUPERCLASSES.values()) for name in names}
    fine_names = sorted(coarse_of)
    for file, title, count in (("train", "training batch 1 of 1", 4), ("test", "testing batch 1 of 1", 1)):
        fine = pictures.rng.permutation(np.repeat(np.arange(100), count)).tolist()
        labels = {"fine_labels": fine, "coarse_labels": [coarse_of[fine_names[label]] for label in fine]}
        _dump(base / file, _batch(pictures, title, fine) | labels)
    _dump(base / "meta", {"fine_label_names": fine_names, "coarse_label_names": list(CIFAR100_SUPERCLASSES)})


KINDS: dict[str, Callable[[Path, _Pictures], None]] = {
    "clothing1m": _clothing1m,
    "webvision": _webvision,
    "tiny-imagenet": _tiny_imagenet,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}


# -- forms -------------------------------------------------------------------------------------------------------------


def _wnid(label: int) -> str:
    return f"n{1440764 + 1000 * label:08}"


def _write(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _batch(pictures: _Pictures, title: str, labels: list[int]) -> dict:
    images = [np.asarray(pictures.draw(label, 32, 32)).transpose(2, 0, 1).reshape(-1) for label in labels]
    names = [f"picture_s_{number:06}.png" for number in range(len(labels))]
    return {"batch_label": title, "data": np.stack(images), "filenames": names}


def _dump(path: Path, content: dict) -> None:
    with open(path, "wb") as file:
        _Python2Pickler(file, protocol=2).dump(content)
    written = path.read_bytes()
    path.write_bytes(written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, as the published CIFAR files have them."""

    def save_string(self, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}
