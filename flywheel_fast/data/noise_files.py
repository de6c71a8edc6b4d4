"""Label files, ours and others': .npz of a run, .csv, DivideMix's .json, and CIFAR-N's .pt and .npy as published."""

import csv
import json
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from flywheel_fast.data import pickles
from flywheel_fast.data.manifest import read_table
from flywheel_fast.errors import BadInput


def read(
    path: Path, key: str | None, labels: np.ndarray, classes: tuple[str, ...], files: np.ndarray | None
) -> np.ndarray:
    """Noisy labels [N] int64 in the order of `labels`, the source's own [N], and of `files` [N] str.

    Raises BadInput naming the file, the row and the cure.
    """
    where = f"data.noise.file {path}"
    if not path.is_file():
        raise BadInput(f"{where}: no such file")
    try:
        found = READERS.get(path.suffix, _numpy)(where, path)
        if path.suffix == ".csv":
            found = _by_file(where, found, files)
        elif isinstance(found, dict):
            found = _chosen(where, path, found, key, labels)
        found = np.asarray(found)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:  # json's and NumPy's are of these kinds
        raise BadInput(f"{where}: cannot be read as labels ({error})") from error
    if found.shape != labels.shape:
        raise BadInput(
            f"{where}: holds {found.size:,} labels, the data set has {len(labels):,} training files; give one for each"
        )
    return numbers(where, found, classes)


def write(path: Path, noisy: np.ndarray, true: np.ndarray) -> None:
    """Labels [N] int64, in the form that the name asks for: .json as DivideMix's, .npy as CIFAR-N's.

    Raises BadInput for another ending, or where there is a file already.
    """
    if path.suffix not in WRITERS:
        raise BadInput(f"--write {path}: the name must end in {', '.join(WRITERS)}")
    try:
        with open(path, "xb") as file:
            WRITERS[path.suffix](file, noisy, true)
    except FileExistsError:
        raise BadInput(f"--write {path}: is there already; name another file, or remove it") from None
    except OSError as error:
        raise BadInput(f"--write {path}: cannot be written ({error.strerror})") from error


WRITERS = {
    ".json": lambda file, noisy, true: file.write(json.dumps(noisy.tolist()).encode()),
    ".npy": lambda file, noisy, true: np.save(file, {"clean_label": true, "noisy_label": noisy}, allow_pickle=True),
    ".npz": lambda file, noisy, true: np.savez_compressed(file, clean_label=true, noisy_label=noisy),
}


def read_matrix(path: Path, classes: tuple[str, ...]) -> np.ndarray:  # [C, C] float64
    """Rows: true classes, columns: labels; each row sums to 1. Raises BadInput naming the row and the cure."""
    where, c = f"data.noise.matrix {path}", len(classes)
    try:
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False).astype(np.float64)
        else:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row]
            if rows and tuple(sorted(rows[0][1:])) == tuple(sorted(classes)):  # names above and before
                share = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}
                rows = [[share[true][label] for label in classes] for true in classes]
            matrix = np.array(rows, dtype=np.float64)
    except KeyError as error:
        raise BadInput(f"{where}: has no row for the class {error}; give one for each") from error
    except (OSError, ValueError, EOFError, csv.Error) as error:
        raise BadInput(
            f"{where}: cannot be read as {c} x {c} numbers, with or without the classes' names ({error})"
        ) from error
    if matrix.shape != (c, c):
        shape = " x ".join(map(str, matrix.shape))
        raise BadInput(f"{where}: is {shape}, the data set has {c} classes; give {c} x {c} shares")
    for name, row in zip(classes, matrix, strict=True):
        if not (row >= 0).all() or abs(row.sum() - 1) > 1e-3:
            raise BadInput(f"{where}: the row of class {name!r} must be shares that sum to 1, not to {row.sum():g}")
    return matrix / matrix.sum(axis=1, keepdims=True)


# -- what files hold: labels, or a dict of them ------------------------------------------------------------------------


def _numpy(where: str, path: Path) -> Any:
    with open(path, "rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            file.seek(0)
            content = np.load(file, allow_pickle=False)
            return {name: content[name] for name in content.files}
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:  # CIFAR-N's: a dict in an array without dimensions
            content = pickles.read(file, where)
            return content.item() if isinstance(content, np.ndarray) and content.shape == shape == () else content
        file.seek(0)
        return np.load(file, allow_pickle=False)


def _torch(where: str, path: Path) -> Any:
    import torch

    arrays = [(kind, f"{module}.{name}") for (module, name), kind in pickles.ALLOWED.items() if module != "_codecs"]
    dtypes = [type(np.dtype(code)) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    try:
        with torch.serialization.safe_globals([*arrays, *dtypes]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split())[:120]
        raise BadInput(
            f"{where}: holds more than tensors and arrays, or is damaged ({reason}); if you trust it, load it yourself "
            f"and np.save the labels"
        ) from error
    return content


def _json(where: str, path: Path) -> Any:
    return json.loads(path.read_bytes())


def _csv(where: str, path: Path) -> pa.Table:
    return read_table(where, path, required=("label",), optional=("file_name",))


READERS = {".pt": _torch, ".pth": _torch, ".json": _json, ".csv": _csv}


# -- from there to labels in the data set's order ----------------------------------------------------------------------


def _by_file(where: str, table: pa.Table, files: np.ndarray | None) -> np.ndarray:
    """Labels [rows] str, in the order of `files` where the table names them."""
    labels = table["label"].to_numpy()
    if "file_name" not in table.column_names or files is None:
        return labels
    row_of = {name: row for row, name in enumerate(table["file_name"].to_pylist())}
    gone = next((file for file in files.tolist() if file not in row_of), None)
    if gone is not None:
        raise BadInput(f"{where}: has no row for the training file {gone!r}; give one for each")
    return labels[[row_of[file] for file in files.tolist()]]


def _chosen(where: str, path: Path, arrays: dict, key: str | None, labels: np.ndarray) -> np.ndarray:
    """The array that is meant: `key`, or label, noisy_label, or the only one of noisy labels. The clean ones tell a
    wrong order."""
    noisy = [name for name in arrays if not str(name).startswith(("clean", "sha256", "matrix"))]
    usual = [name for name in ("label", "noisy_label") if name in arrays] or (noisy if len(noisy) == 1 else [None])
    key = key or usual[0]
    if key not in arrays:
        choice = ", ".join(map(str, noisy or arrays))
        raise BadInput(f"{where}: data.noise.key={key} is not one of its arrays; choose {choice}")
    chosen, clean = np.asarray(arrays[key]), np.asarray(arrays.get("clean_label", labels))
    if clean.shape != labels.shape or chosen.shape != labels.shape or np.array_equal(clean, labels):
        return chosen
    # CIFAR-N's .npy is in the order of TensorFlow Datasets: its row i is image order[i] of the pickles.
    name = f"image_order_c{'100' if '100' in path.stem else '10'}.npy"
    found = next((folder / name for folder in (path.parent, path.parent.parent) if (folder / name).is_file()), None)
    if found:
        order = np.load(found, allow_pickle=False)
        if np.array_equal(np.sort(order, axis=None), np.arange(len(labels))):
            back = np.argsort(order)
            if np.array_equal(clean[back], labels):
                return chosen[back]
    agree = np.mean(clean == labels)
    raise BadInput(
        f"{where}: its clean_label is the data set's for {agree:.1%} of the files only, so its order is another; "
        f"CIFAR-N's .npy needs {name} beside it, or take CIFAR-N's .pt"
    )


def numbers(where: str, found: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:  # [N] -> [N] int64
    """Class names, or class numbers where they are no names of classes."""
    if found.dtype.kind in "OUS":
        found = _of_names(where, found.astype(str), classes)
    if found.dtype.kind not in "iu":
        raise BadInput(f"{where}: labels must be whole numbers or class names, not {found.dtype}")
    outside = np.flatnonzero((found < 0) | (found >= len(classes)))
    if len(outside):
        raise BadInput(f"{where}: row {outside[0]} has label {found[outside[0]]}, outside 0..{len(classes) - 1}")
    return found.astype(np.int64)


def _of_names(where: str, labels: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:  # [N] str -> [N] int64
    of_class = {name: label for label, name in enumerate(classes)}
    unknown = next(((row, name) for row, name in enumerate(labels.tolist()) if name not in of_class), None)
    if unknown is None:
        return np.array([of_class[name] for name in labels.tolist()], dtype=np.int64)
    try:
        return labels.astype(np.int64)
    except (ValueError, OverflowError):
        raise BadInput(
            f"{where}: row {unknown[0]} has label {unknown[1]!r}, which is no class of the data set"
        ) from None
