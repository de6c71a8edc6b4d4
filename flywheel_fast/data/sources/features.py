"""Features in place of images: a folder that `flywheel-fast embed` wrote, or an array from elsewhere and its labels."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from flywheel_fast.data.manifest import Manifest, read_table
from flywheel_fast.data.sources import tables
from flywheel_fast.data.sources.folders import natural
from flywheel_fast.errors import BadInput

ARRAY, MANIFEST, ABOUT = "features.npy", "manifest.parquet", "about.json"  # of the folder
ROWS = 4096  # read at a time, where all are looked at


@dataclass(frozen=True)
class Features:
    path: Path
    array: np.ndarray  # [N, V, D] float16 or float32, memory-mapped where it is a file of its own
    views: tuple[str, ...]  # V names: clean first, then weak and strong ones; of one view, it is all of them
    names: pa.Array  # [N] str, the file of each row
    train: Manifest
    test: Manifest | None
    sha256: str
    about: dict  # of `embed`: the network and the views that made them; empty for features from elsewhere
    root: str  # the table of their labels, for features from elsewhere

    def __reduce__(self):  # to another process goes where they are, not what they are
        return read, (self.path, self.root)

    @property
    def width(self) -> int:  # D
        return self.array.shape[2]

    def columns(self, view: str) -> list[int]:
        """Those of the array that hold such views."""
        kind = "strong" if view == "strong2" else view
        return [at for at, name in enumerate(self.views) if name == kind] or [0]

    def rows(self, manifest: Manifest) -> np.ndarray:
        """Where the samples of a part of the data set are in the array [n] int64."""
        return pc.index_in(pa.array(manifest.files, pa.string()), value_set=self.names).to_numpy().astype(np.int64)


def read(path: Path, root: str) -> Features:
    """`path`: a folder that `embed` wrote; a .npy file [N, D] or [N, V, D] whose rows are labelled by the rows of the
    table `root`; a Parquet file with a column label, and numbers in all columns but file_name, split and true_label.

    Raises BadInput naming the file, and the row that is not finite.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".parquet":
        array, table = _of_parquet(path), path
    elif path.suffix == ".npy":
        if not root:
            raise BadInput(f"data.features={path} needs data.root=TABLE, a CSV or Parquet file with a label a row")
        array, table = _array(path), Path(root)
    else:
        raise BadInput(
            f"data.features={path}: is no folder that `flywheel-fast embed` wrote, no .npy and no .parquet file"
        )
    for at in range(0, len(array), ROWS):
        broken = np.flatnonzero(~np.isfinite(array[at : at + ROWS]).all(axis=(1, 2)))
        if len(broken):
            raise BadInput(f"{path}: row {at + broken[0] + 1} has a feature that is not finite; mend or remove it")
    views = ("clean", *("weak",) * (array.shape[1] - 1))
    return Features(path, array, views, *_labelled(table, len(array), path), digest(array), {}, root)


def _of_folder(path: Path) -> Features:
    try:
        about = json.loads((path / ABOUT).read_bytes())
        root, classes, views = Path(about["root"]), about["classes"], tuple(about["views"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"data.features={path}: is no folder that `flywheel-fast embed` wrote ({error})") from error
    if "sha256" not in about:
        raise BadInput(
            f"data.features={path}: is not whole yet; the same `flywheel-fast embed` goes on where it stopped"
        )
    array = _array(path / ARRAY)
    train, test = (_with_classes(part, classes) for part in tables.read(path / MANIFEST, root))
    count = len(train) + (0 if test is None else len(test))
    if array.shape[:2] != (count, len(views)):
        raise BadInput(
            f"{path / ARRAY}: has features of {array.shape[0]:,} images, {path / MANIFEST} names {count:,}; embed anew"
        )
    if digest(array) != about["sha256"]:
        raise BadInput(f"{path / ARRAY}: cut short or altered (its checksum does not fit); embed anew")
    names = pa.array(np.concatenate([train.files] + ([] if test is None else [test.files])), pa.string())
    return Features(path, array, views, names, train, test, about["sha256"], about, "")


def _with_classes(part: Manifest | None, classes: list[str]) -> Manifest | None:
    """With the classes in the order of the data set that was embedded."""
    if part is None:
        return None
    number = np.array([classes.index(name) for name in part.classes])
    true = None if part.true_labels is None else number[part.true_labels]
    return replace(part, labels=number[part.labels], true_labels=true, classes=tuple(classes))


def digest(array: np.ndarray) -> str:
    """SHA-256 of the rows."""
    sha = hashlib.sha256()
    for at in range(0, len(array), ROWS):
        sha.update(np.ascontiguousarray(array[at : at + ROWS]))
    return sha.hexdigest()


def _array(path: Path) -> np.ndarray:  # [N, V, D]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: is no array that NumPy can read ({error})") from error
    if array.ndim not in (2, 3) or array.dtype.kind != "f" or not array.size:
        raise BadInput(
            f"{path}: holds {array.dtype} of shape {list(array.shape)}; features are floats [images, width], or "
            "[images, views, width]"
        )
    return array if array.ndim == 3 else array[:, None]


def _of_parquet(path: Path) -> np.ndarray:  # [N, 1, D]
    try:
        table = pa.parquet.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: is not a Parquet file ({' '.join(str(error).split())})") from error
    known = ("file_name", "image_path", "label", "split", "true_label")
    columns = [name for name in table.column_names if name not in known]
    try:
        if len(columns) == 1 and not pa.types.is_primitive(table[columns[0]].type):  # a list a row
            rows = table[columns[0]].combine_chunks()
            array = np.stack(rows.to_numpy(zero_copy_only=False)).astype(np.float32)
        else:
            array = np.stack([table[name].to_numpy().astype(np.float32) for name in columns], axis=1)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise BadInput(
            f"{path}: the columns {', '.join(columns[:3]) or '(none)'} are no features ({error}); give a column of "
            "equal lists, or a column of numbers for each feature"
        ) from error
    return array[:, None]


def _labelled(path: Path, count: int, features: Path) -> tuple[pa.Array, Manifest, Manifest | None]:
    """Names of the rows, and both splits, by a table with a row for each row of features."""
    table = read_table(f"data.root {path}", path, ("label",), ("file_name", "split", "true_label"))
    if len(table) != count:
        raise BadInput(f"{path}: labels {len(table):,} rows, {features} has features of {count:,}; give one for each")
    names = table.column_names
    files = table["file_name"].to_numpy() if "file_name" in names else np.array([f"row {i + 1}" for i in range(count)])
    split = table["split"].to_numpy() if "split" in names else np.full(count, "train", object)
    strange = np.flatnonzero(~np.isin(split, tables.SPLITS))
    if len(strange):
        raise BadInput(f"{path}: row {strange[0] + 1} has split {split[strange[0]]!r}; it must be train or test")
    labels, in_train = table["label"].to_numpy(), split == "train"
    classes = tuple(natural(np.unique(labels[in_train].astype(str)).tolist()))

    def numbers(column: str, rows: np.ndarray) -> np.ndarray:
        found = pc.index_in(table[column], value_set=pa.array(classes, pa.string()))
        found = pc.fill_null(found, -1).to_numpy()[rows].astype(np.int64)
        if (found < 0).any():
            row = int(rows[found.argmin()])
            said = table[column][row].as_py()
            raise BadInput(f"{path}: row {row + 1} has {column} {said!r}, which is the label of no training row")
        return found

    def part(rows: np.ndarray) -> Manifest:
        true = numbers("true_label", rows) if "true_label" in names else None
        return Manifest(path.parent, files[rows], numbers("label", rows), classes, true)

    test = None if in_train.all() else part(np.flatnonzero(~in_train))
    return pa.array(files, pa.string()), part(np.flatnonzero(in_train)), test
