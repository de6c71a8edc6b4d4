"""Class folders: root/train/CLASS/* and root/test/CLASS/*, or root/CLASS/*."""

import os
from pathlib import Path

import numpy as np

from flywheel_fast.data.manifest import Manifest
from flywheel_fast.errors import BadInput

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"}
TEST_FOLDERS = ("test", "val", "validation")


def read(root: Path) -> tuple[Manifest, Manifest | None]:
    if not root.is_dir():
        raise BadInput(f"data.root {root}: is not a folder")
    if not (root / "train").is_dir():
        return class_folders(root, "", None), None
    train = class_folders(root, "train", None)
    test = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    return train, class_folders(root, test, train.classes) if test else None


def class_folders(root: Path, split: str, classes: tuple[str, ...] | None) -> Manifest:
    """root/split/CLASS/*, deeper folders included; `classes`: those of the training split, where this is the other."""
    base = root / split
    found = [entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith(".")]
    if not found:
        raise BadInput(f"{base}: holds no class folders; images are expected as {base}/CLASS/IMAGE.jpg")
    of_class = {name: label for label, name in enumerate(classes or natural(found))}
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
    return Manifest(root, files, np.array(labels, dtype=np.int64), tuple(of_class))


def natural(names: list[str]) -> list[str]:
    """Numbers in numeric order, so that class 10 is 10 in a noise file too; anything else by the alphabet."""
    return sorted(names, key=int) if all(map(is_number, names)) else sorted(names)


def is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 19
