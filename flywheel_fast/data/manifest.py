"""A data set is a table: file, observed label, and the true label where it is known."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from flywheel_fast.errors import BadInput


@dataclass(frozen=True)
class Manifest:
    root: Path
    files: np.ndarray  # [N] str, relative to root, in sorted order where the source has no order of its own
    labels: np.ndarray  # [N] int64, observed
    classes: tuple[str, ...]
    true_labels: np.ndarray | None = None  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "Manifest":
        true = None if self.true_labels is None else self.true_labels[index]
        return replace(self, files=self.files[index], labels=self.labels[index], true_labels=true)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of files, labels and class names: equal digests mean equal training sets."""
        sha = hashlib.sha256("\0".join(self.classes).encode())
        sha.update("\0".join(self.files.tolist()).encode())
        sha.update(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        return sha.hexdigest()


def read_columns(where: str, path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of a CSV file as text, each [rows] str; `where` opens every message.

    Raises BadInput for a column that is missing or doubled, an empty cell of a required one, a file named twice.
    """
    from pyarrow import ArrowInvalid, csv

    names = (*required, *optional)
    options = csv.ConvertOptions(column_types=dict.fromkeys(names, "string"), strings_can_be_null=False)
    try:
        table = csv.read_csv(path, convert_options=options, parse_options=csv.ParseOptions(newlines_in_values=True))
    except OSError as error:
        raise BadInput(f"{where}: cannot be read ({error.strerror or error})") from error
    except ArrowInvalid as error:
        raise BadInput(f"{where}: is not a CSV ({error})") from error
    for name in names:
        if table.column_names.count(name) > 1:
            raise BadInput(f"{where}: has {table.column_names.count(name)} columns {name!r}; keep one")
    for name in required:
        if name not in table.column_names:
            found = ", ".join(table.column_names)
            raise BadInput(f"{where}: has no column {name!r}, only {found}; rename the one that is meant")
    columns = {name: table[name].to_numpy().astype(str) for name in names if name in table.column_names}
    for name in required:
        empty = np.flatnonzero(columns[name] == "")
        if len(empty):
            raise BadInput(f"{where}: row {empty[0] + 2} has an empty {name}; fill it in or remove the row")
    files = columns.get("file_name", np.array([], dtype=str))
    unique, first = np.unique([os.path.normpath(name) for name in files.tolist()], return_index=True)
    if len(unique) < len(files):
        again = np.setdiff1d(np.arange(len(files)), first)[0]
        raise BadInput(f"{where}: row {again + 2} names '{files[again]}' again; keep one row a file")
    return columns
