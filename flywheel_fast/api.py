"""What `import flywheel_fast as ff` offers: `ff.train`, as the command line trains, and `ff.Run`, what it left."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from flywheel_fast import config as configs
from flywheel_fast import report, run_folder
from flywheel_fast.audit import Labels, read_labels, read_samples
from flywheel_fast.data.sources import cache
from flywheel_fast.em import kept_posterior
from flywheel_fast.errors import BadInput
from flywheel_fast.predict import Predictor, find_images
from flywheel_fast.trainer import Config, Trainer

TABLE = "flywheel-fast.csv"  # of arrays that were written into the cache


class Run:
    """The folder of a finished run."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.result: dict = json.loads((self.folder / "result.json").read_bytes())
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder}: is not the folder of a finished run ({error})") from error

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def issues(self) -> pa.Table:
        """samples.parquet: a row a training image, in the order of the data set; `.to_pandas()` makes a DataFrame.

        label_score: 0 to 1, lower is worse. All columns: docs/run_folder.md.
        """
        self.labels  # noqa: B018  (says what is amiss, where there is none)
        return read_samples(self.folder / "labels")

    @cached_property
    def labels(self) -> Labels:
        """The same as arrays [N], with the classes, and the corruption matrix [C, C]."""
        return read_labels(self.folder / "labels")

    def pred_probs(self) -> np.ndarray:  # [N, C] float64
        """What the run thinks of each training image's class, for tools that take such a table: label_score at the
        given label, suggested_prob at the suggested one, and what is left over the others evenly."""
        labels = self.labels
        score, prob = (of.astype(np.float64) for of in (labels.clean_prob, labels.suggested_prob))
        kept = map(torch.tensor, (labels.given, score, labels.suggested, prob))
        return kept_posterior(*kept, len(labels.classes)).numpy()

    def predict(self, images: str | Path | Sequence) -> tuple[list[Path], np.ndarray]:
        """Files that can be read, K of them, and their probabilities [K, C] float32 in the order of `labels.classes`.

        `images`: a file, a folder, or a list of these.
        """
        words = [images] if isinstance(images, str | Path) else images
        files = find_images([str(word) for word in words])
        probabilities, index, _ = Predictor(self.folder).probabilities(files)
        return [files[i] for i in index], probabilities

    def report(self) -> Path:
        """Writes report.html into the folder, and returns where."""
        return report.write([self.folder])


def train(
    images=None,
    labels: Sequence | None = None,
    *,
    config: str = "cifar10_small",
    changes: Iterable[str] = (),
    classes: Sequence[str] | None = None,
    true_labels: Sequence | None = None,
    test: tuple | None = None,
    out: str | Path | None = None,
) -> Run:
    """Trains as `flywheel-fast train CONFIG key=value ...` does, and returns the run.

    `images`: a folder of class folders, a CSV or Parquet file; N paths of image files, or an array [N, H, W] or
    [N, H, W, 3] uint8, with `labels` [N]; a torchvision data set or any sequence of (PIL image, label); None: the data
    of the config.
    `labels`, `true_labels` [N]: numbers, or class names; `classes` [C]: names of the numbers.
    `test`: (images, labels), or such a sequence, to be tested on; without it a share of the images is set aside.
    `changes`: words as on the command line, such as "optim.epochs=8". Noise is added where they say so, whatever the
    config has for data of its own.
    `out`: the run's folder, which must be new (default: runs/NAME).

    Files are read where they are, and named from the deepest folder that holds all of them. Arrays and sequences are
    written once as PNG files into the cache; image i of the training set is train/000000i.png.
    Raises BadInput for what cannot be trained on.
    """
    words = [*_data(images, labels, classes, true_labels, test), *changes]
    if images is not None:
        words.insert(0, "data.noise.kind=none")  # a config's noise belongs to the config's data
    settings = configs.load(Config, config, words)
    folder = run_folder.create(str(out) if out else None, settings.name, overwrite=False, resuming=False)
    try:
        with run_folder.lock(folder):
            Trainer(settings, folder).run()
    except BadInput:
        run_folder.leave(folder)
        raise
    return Run(folder)


# -- data --------------------------------------------------------------------------------------------------------------


def _data(images, labels, classes, true_labels, test) -> list[str]:
    """Words that name the data."""
    if images is None or isinstance(images, str | Path) or _is_image_folder(images):
        if any(given is not None for given in (labels, classes, true_labels, test)):
            raise BadInput("labels, classes, true_labels and test go with arrays; folders and tables have their own")
        if images is None:
            return []
        path = Path(images if isinstance(images, str | Path) else images.root)
        return [f"data.source={'csv' if path.suffix in ('.csv', '.parquet') else 'folder'}", f"data.root={path}"]
    train, names = _samples(images, labels, "images"), classes
    if names is None:
        names = getattr(images, "classes", None)
    parts = [("train", *train, true_labels)]
    if test is not None:
        pair = isinstance(test, tuple) and len(test) == 2
        parts.append(("test", *_samples(*(test if pair else (test, None)), "test"), None))
    if _are_files(train[0]):
        return _of_files(parts, names)
    rows = _table(parts, names, lambda split, number, image: f"{split}/{number:07}.png")
    sha = hashlib.sha256()
    for name, content in _pictures(parts):
        sha.update(f"{name}\0{len(content)}\0".encode() + content)
    sha.update(rows)
    files = ((name, content) for part in (_pictures(parts), [(TABLE, rows)]) for name, content in part)
    root = cache.made_once(f"arrays-{sha.hexdigest()[:16]}", files, sum(len(part[1]) for part in parts))
    return ["data.source=csv", f"data.root={root / TABLE}"]


def _of_files(parts: list[tuple], names: Sequence[str] | None) -> list[str]:
    """A table in the cache of files that stay where they are."""
    for split, images, _, _ in parts:
        if not _are_files(images):
            raise BadInput(f"{split}: is no list of files, but the training images are; give files for both")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for part in parts for file in part[1]])
    rows = _table(parts, names, lambda split, number, file: os.path.relpath(file, root))
    name = f"files-{hashlib.sha256(rows).hexdigest()[:16]}"
    table = cache.made_once(name, [(TABLE, rows)], total=1) / TABLE
    return ["data.source=csv", f"data.root={table}", f"data.images={root}"]


def _is_image_folder(images) -> bool:
    """torchvision's ImageFolder reads class folders as `data.source=folder` does: no copy is needed."""
    names = {kind.__name__ for kind in type(images).__mro__ if kind.__module__.startswith("torchvision")}
    return "ImageFolder" in names


def _samples(images, labels, what: str) -> tuple[Sequence, list]:
    """Images, each an array, a PIL image or a path, and their labels."""
    if _are_files(images):
        if labels is None:
            raise BadInput(f"{what}: a list of files needs labels")
        images = list(images)
    if labels is None:
        if hasattr(images, "ndim") or not hasattr(images, "__len__"):
            raise BadInput(f"{what}: an array needs labels; a data set without them must yield (image, label)")
        if (targets := getattr(images, "targets", None)) is None or len(targets) != len(images):
            targets = [images[i][1] for i in range(len(images))]
        return _Firsts(images), _list(targets)
    if len(images) != len(labels):
        raise BadInput(f"{what}: {len(images):,} images, but {len(labels):,} labels")
    return images, _list(labels)


def _are_files(images) -> bool:
    return hasattr(images, "__getitem__") and isinstance(next(iter(images), None), str | os.PathLike)


class _Firsts:
    """The images of a sequence of (image, label)."""

    def __init__(self, samples: Sequence):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index][0]


def _list(labels) -> list:
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def _table(parts: list[tuple], names: Sequence[str] | None, file_name: Callable[[str, int, Any], str]) -> bytes:
    """The table of all images as CSV; `file_name` of split, number and image."""
    text = io.StringIO()
    writer = csv.writer(text)
    known = parts[0][3] is not None
    writer.writerow(["file_name", "label", "split"] + ["true_label"] * known)
    for split, images, labels, true in parts:
        if true is not None and len(true) != len(images):
            raise BadInput(f"true_labels: {len(true):,} of them, but {len(images):,} images")
        true = labels if true is None else _list(true)  # those of the test split count as right
        for number, (label, right) in enumerate(zip(labels, true, strict=True)):
            name = file_name(split, number, images[number])
            writer.writerow([name, _name(label, names), split] + [_name(right, names)] * known)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _pictures(parts: list[tuple]) -> Iterator[tuple[str, bytes]]:
    for split, images, _, _ in parts:
        for number in range(len(images)):
            yield f"{split}/{number:07}.png", _png(images[number], f"{split} image {number}")


def _name(label, names: Sequence[str] | None) -> str:
    if names is None or isinstance(label, str):
        return str(label)
    if not 0 <= label < len(names):
        raise BadInput(f"label {label} is none of the {len(names)} classes")
    return str(names[label])


def _png(image, what: str) -> bytes:
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
            raise BadInput(
                f"{what}: is {array.dtype} {list(array.shape)}; an image is [H, W] or [H, W, 3] of uint8, 0 to 255 "
                "(a data set must be made without a transform)"
            )
        image = Image.fromarray(array)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
