"""A data set is a table: file, observed label, and the true label where it is known."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pyarrow import compute

from flywheel_fast.errors import BadInput

NOT_REVIEWED, DROPPED = -1, -2  # beside the classes in Manifest.reviewed


@dataclass(frozen=True)
class Manifest:
    root: Path
    files: np.ndarray  # [N] objects str, relative to root, in sorted order where the source has no order of its own
    labels: np.ndarray  # [N] int64, observed
    classes: tuple[str, ...]
    true_labels: np.ndarray | None = None  # [N] int64
    reviewed: np.ndarray | None = None  # [N] int64, the class that a person decided on, NOT_REVIEWED or DROPPED

    def __post_init__(self):
        object.__setattr__(self, "files", np.asarray(self.files, dtype=object))  # a fifth of the memory of a str array

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "Manifest":
        true, reviewed = (None if of is None else of[index] for of in (self.true_labels, self.reviewed))
        return replace(self, files=self.files[index], labels=self.labels[index], true_labels=true, reviewed=reviewed)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of files, given labels and class names: equal digests mean equal training sets, reviews apart."""
        sha = hashlib.sha256("\0".join(self.classes).encode())
        for at in range(0, len(self), 100_000):
            sha.update(("\0" * (at > 0) + "\0".join(self.files[at : at + 100_000].tolist())).encode())
        sha.update(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        return sha.hexdigest()


# -- what a list may name ----------------------------------------------------------------------------------------------


def leads_out(name: str) -> bool:
    """Whether a path in a list is none below the data root, by its letters alone; links are looked at by `missing`."""
    if ".." not in name and not name.startswith("/") and "\0" not in name:  # almost all
        return False
    return "\0" in name or os.path.isabs(name) or os.path.normpath(name).split("/")[0] == ".."


def first_repeated(names: Sequence[str]) -> int | None:
    """Index of the first path that was there before, `a/b` and `./a//b` being the same."""
    if all_differ(map(_plain, names), len(names)):  # as good as always
        return None
    seen = set()
    for index, name in enumerate(map(_plain, names)):
        if name in seen:
            return index
        seen.add(name)
    return None


def all_differ(names: Iterable[str], count: int) -> bool:
    """By their hashes, which is quicker than a set of millions of names, and takes less memory."""
    hashes = np.fromiter(map(hash, names), dtype=np.int64, count=count)
    hashes.sort()
    return not (hashes[1:] == hashes[:-1]).any()


def _plain(name: str) -> str:
    return os.path.normpath(name) if "./" in name or "//" in name else name


def missing(manifest: Manifest) -> np.ndarray:  # [missing] int64
    """Rows whose file is not there. Reads each folder once, which is quicker than asking for each file.

    Raises BadInput for a file that is only there by way of a link out of the data root.
    """
    root, files = manifest.root.resolve(), manifest.files
    folder_of, folders = np.empty(len(files), np.int64), {}
    for row, name in enumerate(files.tolist()):
        folder_of[row] = folders.setdefault(name.rpartition("/")[0], len(folders))
    order = np.argsort(folder_of, kind="stable")
    bounds = np.searchsorted(folder_of[order], range(len(folders) + 1))
    gone = []
    for number, folder in enumerate(folders):
        rows = order[bounds[number] : bounds[number + 1]]
        plain, links = _listing(root, root / folder)
        for row, name in zip(rows.tolist(), files[rows].tolist(), strict=True):
            last = name.rpartition("/")[2]
            if last in links:
                _refuse_if_outside(root, root / name)
                if (root / name).is_file():
                    continue
            if last not in plain:
                gone.append(row)
    return np.sort(np.array(gone, dtype=np.int64))


def _listing(root: Path, folder: Path) -> tuple[set[str], set[str]]:
    """Names of the folder's files and of its links."""
    _refuse_if_outside(root, folder)
    plain, links = set(), set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    links.add(entry.name)
                elif entry.is_file():
                    plain.add(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror or error})") from error
    return plain, links


def _refuse_if_outside(root: Path, path: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise BadInput(f"{path}: cannot be followed ({error})") from error
    if not inside:
        raise BadInput(f"{path}: leads out of {root} by a link; put the files below the data root itself")


# -- tables ------------------------------------------------------------------------------------------------------------


def read_table(where: str, path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> pa.Table:
    """Those columns of a CSV or Parquet file, as text; `where` opens every message.

    A column image_path counts as file_name. Raises BadInput for a column that is missing or doubled, an empty cell of a
    required one, a file named twice.
    """
    names = (*required, *optional)
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.ParquetFile(path).read()  # read_table() imports pandas
        else:
            types = dict.fromkeys((*names, "image_path"), "string")
            options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
            parse = pa.csv.ParseOptions(newlines_in_values=True)
            table = pa.csv.read_csv(path, convert_options=options, parse_options=parse)
        header = [{"image_path": "file_name"}.get(name, name) for name in table.column_names]
    except pa.ArrowException as error:
        kind = "Parquet file" if path.suffix == ".parquet" else "CSV"
        raise BadInput(f"{where}: is not a {kind} ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: its column names are not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{where}: cannot be read ({error.strerror or error})") from error
    for name in names:
        if header.count(name) > 1:
            raise BadInput(f"{where}: has {header.count(name)} columns {name!r}; keep one")
    for name in required:
        if name not in header:
            found = ", ".join(table.column_names)
            raise BadInput(f"{where}: has no column {name!r}, only {found}; rename the one that is meant")
    columns = {}
    for name in (name for name in names if name in header):
        column = table.column(header.index(name))
        try:
            columns[name] = compute.fill_null(compute.cast(column, pa.string()), "")
        except pa.ArrowException as error:
            raise BadInput(f"{where}: column {name!r} is {column.type}, which is no text; convert it") from error
        empty = compute.index(columns[name], "").as_py() if name in required else -1
        if empty >= 0:
            raise BadInput(f"{where}: row {row_number(path, empty)} has an empty {name}; fill it in or remove the row")
    if "file_name" in columns:
        files = columns["file_name"]
        all_plain = not holds(files, "./", "//") and all_differ(files.to_numpy().tolist(), len(files))
        again = None if all_plain else first_repeated(files.to_pylist())
        if again is not None:
            name = columns["file_name"][again].as_py()
            raise BadInput(f"{where}: row {row_number(path, again)} names {name!r} again; keep one row a file")
    return pa.table(columns)


def holds(column: pa.ChunkedArray, *texts: str) -> bool:
    """Whether one of the texts is somewhere in the column; much quicker than to look at each cell in Python."""
    pattern = "|".join(map(re.escape, texts))
    return compute.any(compute.match_substring_regex(column, pattern)).as_py()


def row_number(path: Path, index: int) -> int:
    """As an editor counts the lines of a CSV: the header is 1; a Parquet file has none."""
    return int(index) + (1 if path.suffix == ".parquet" else 2)


def to_parquet(train: Manifest, test: Manifest) -> memoryview:
    """A table that data.source=csv opens, once it lies in the data root."""
    names = pa.array(train.classes, pa.string())

    def column(train_labels: np.ndarray, test_labels: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(np.concatenate([train_labels, test_labels]), pa.int32()), names)

    columns = {
        "file_name": pa.chunked_array([*_in_pieces(train.files), *_in_pieces(test.files)]),
        "label": column(train.labels, test.labels),
        "split": pa.DictionaryArray.from_arrays(
            pa.array(np.repeat([0, 1], [len(train), len(test)]), pa.int8()), ["train", "test"]
        ),
    }
    if train.true_labels is not None:
        true = test.labels if test.true_labels is None else test.true_labels
        columns["true_label"] = column(train.true_labels, true)
    content = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), content, compression="zstd", use_dictionary=["label", "split"])
    return content.getbuffer()


def _in_pieces(files: np.ndarray) -> list[pa.Array]:
    """Arrow makes one large array by doubling, which takes three times its memory."""
    return [pa.array(piece, pa.string()) for piece in np.array_split(files, len(files) // 100_000 + 1)]
