"""Data sets that are arrays, not files: CIFAR's pickles, MNIST's idx files, scikit-learn's digits; written once as PNG
into the cache."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flywheel_fast.data import pickles
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.sources import cache, folders
from flywheel_fast.errors import BadInput

LAYOUT = {  # folder as unpacked, training and test batches, key of the labels; file and key of the class names
    "cifar10": (
        *("cifar-10-batches-py", [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"], "labels"),
        *("batches.meta", "label_names"),
    ),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "fine_labels", "meta", "fine_label_names"),
}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IDX_CLASSES = {"mnist": tuple("0123456789"), "fashion_mnist": FASHION}
Split = tuple[np.ndarray, np.ndarray]  # pixels [N, H, W] or [N, H, W, 3] uint8, labels [N] int64


def cifar(root: Path, name: str) -> tuple[Manifest, Manifest]:
    """CIFAR-10 or CIFAR-100 from the published "python version" in root, or in the folder that it unpacks to.

    The order is that of the pickles, batch 1 to 5, as torchvision and CIFAR-N have it: file train/00007.png is image 7.
    """
    folder, train, test, label_key, meta, names_key = LAYOUT[name]
    base = root / folder if (root / folder).is_dir() else root
    if not (base / meta).is_file():
        raise BadInput(f"{root}: holds no {folder} with a file {meta}; unpack the published python version there")
    content = pickles.load(base / meta)
    classes = _of(content, names_key)
    if not isinstance(classes, list) or not classes:
        raise BadInput(f"{base / meta}: has no list {names_key!r} of class names")
    classes = tuple(_text(one) for one in classes)
    if len(set(classes)) < len(classes):
        raise BadInput(f"{base / meta}: {names_key!r} names a class twice")
    parts = {}
    for split, batches in (("train", train), ("test", test)):
        read = [_batch(base / batch, label_key, len(classes)) for batch in batches]
        parts[split] = tuple(np.concatenate(columns) for columns in zip(*read, strict=True))
    return _written({split: (_upright(pixels), labels) for split, (pixels, labels) in parts.items()}, classes, name)


def idx(root: Path, name: str) -> tuple[Manifest, Manifest]:
    """MNIST or Fashion-MNIST from their four published files, `train-images-idx3-ubyte` and so on, packed or not."""
    classes = IDX_CLASSES[name]
    parts = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (_idx(root, f"{prefix}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        if len(images) != len(labels) or not len(labels) or labels.max() >= len(classes):
            raise BadInput(
                f"{root}: the {prefix} files hold {len(images)} images and {len(labels)} labels; as many are needed of "
                f"both, and labels below {len(classes)}"
            )
        parts[split] = images, labels.astype(np.int64)
    return _written(parts, classes, name)


def _idx(root: Path, name: str) -> np.ndarray:
    """The array of an idx file: two zeros, 8 for bytes, the number of axes, their lengths, the bytes."""
    path = next((root / file for file in (f"{name}.gz", name) if (root / file).is_file()), None)
    if path is None:
        raise BadInput(f"{root}: holds no {name} or {name}.gz; put the four published files there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be unpacked ({error}); get it anew") from error
    axes = int(name[-len("1-ubyte")])
    shape = np.frombuffer(content[4 : 4 + 4 * axes], ">u4") if len(content) >= 4 + 4 * axes else np.array([])
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) - 4 - 4 * axes != shape.prod(dtype=object):
        raise BadInput(f"{path}: is no idx file of bytes with {axes} axes, or is cut short; get it anew")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _written(parts: dict[str, Split], classes: tuple[str, ...], name: str) -> tuple[Manifest, Manifest]:
    """The training and the test split, in this order, as PNG files in the cache."""
    sha = hashlib.sha256()
    for pixels, _ in parts.values():
        sha.update(str(len(pixels)).encode())
        sha.update(np.ascontiguousarray(pixels))
    pictures = (
        (f"{split}/{number:05}.png", _png(image))
        for split, (pixels, _) in parts.items()
        for number, image in enumerate(pixels)
    )
    total = sum(len(labels) for _, labels in parts.values())
    pngs = cache.made_once(f"{name}-{sha.hexdigest()[:16]}", pictures, total)

    def manifest(split: str) -> Manifest:
        labels = parts[split][1]
        files = [f"{split}/{number:05}.png" for number in range(len(labels))]
        return Manifest(pngs, files, labels, classes)

    return manifest("train"), manifest("test")


def _upright(pixels: np.ndarray) -> np.ndarray:
    """[N, 3072], channels first -> [N, 32, 32, 3]."""
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def download(root: Path, name: str) -> None:
    """The published archive into root, checked and unpacked by torchvision, where it is not there. Raises BadInput."""
    folder, *_, meta, _ = LAYOUT[name]
    if (root / folder / meta).is_file() or (root / meta).is_file():
        return
    from torchvision import datasets

    try:
        {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, download=True)
    except (OSError, RuntimeError) as error:  # no network, no room; or a damaged archive
        reason = " ".join(str(error).split())
        raise BadInput(
            f"data.download=true: {name} cannot be downloaded into {root} ({reason}); is there a network? "
            f"Else unpack the published python version there"
        ) from error


def _batch(path: Path, label_key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 3072] uint8, channels first, and labels [n] int64."""
    content = pickles.load(path)
    pixels, labels = _of(content, "data"), _of(content, label_key)
    if not (
        isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,) and len(pixels)
    ):
        raise BadInput(f"{path}: its 'data' must be an array [images, 3072] of uint8")
    numbers = isinstance(labels, list) and all(type(one) is int and 0 <= one < num_classes for one in labels)
    if not numbers or len(labels) != len(pixels):
        raise BadInput(
            f"{path}: its {label_key!r} must be a list of {len(pixels)} numbers in 0..{num_classes - 1}, one an image"
        )
    return np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64)


def _of(content: object, key: str) -> object:
    """Python 2's strings are bytes to those who pickle them again."""
    return content.get(key, content.get(key.encode())) if isinstance(content, dict) else None


def _text(name: object) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def digits() -> tuple[Manifest, Manifest]:
    """1,797 handwritten digits of 8 x 8 pixels, 1,347 of them to train on."""
    return folders.read(cache.made_once("digits-v1", _digits(), total=1797))


def _digits() -> Iterator[tuple[str, bytes]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    in_train, _ = train_test_split(np.arange(len(labels)), train_size=1347, random_state=0, stratify=labels)
    split = np.full(len(labels), "test", dtype=object)
    split[in_train] = "train"
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        yield f"{split[number]}/{label}/{number:04}.png", _png(image)


def _png(pixels: np.ndarray) -> bytes:  # [H, W] or [H, W, 3] uint8
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
