"""Tables: a CSV or Parquet file with a row an image, and Hugging Face's imagefolder, which has one in each split."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import compute

from flywheel_fast.data.manifest import Manifest, holds, leads_out, read_table, row_number
from flywheel_fast.data.sources.folders import TEST_FOLDERS, is_number, natural
from flywheel_fast.errors import BadInput

SPLITS = ("train", *TEST_FOLDERS)


def read(path: Path, images: Path | None = None) -> tuple[Manifest, Manifest | None]:
    """A table with columns file_name (or image_path), label, and if there are any split and true_label; or a folder
    with metadata.csv or .parquet in it or in its train, test and validation folders. Paths are relative to it, or to
    the folder `images`."""
    root = images or (path if path.is_dir() else path.parent)
    table = _Table(_metadata(path) if path.is_dir() else [(path, "")])
    in_train = table.split == "train"
    if not in_train.any():
        raise BadInput(f"{path}: holds no training rows")
    if (
        table.odd_paths
        and (row := next((i for i, name in enumerate(table.files) if leads_out(name)), None)) is not None
    ):
        cure = "put the table above its images, or name their folder by data.images"
        raise BadInput(f"{table.place(row)}: {table.files[row]!r} lies outside {root}; {cure}")
    values, codes = table.labels["label"]
    classes = tuple(natural(values[np.unique(codes[in_train])].tolist()))

    def part(rows: np.ndarray) -> Manifest:
        labels = {name: table.numbers(name, rows, classes) for name in table.labels}
        return Manifest(root, table.files[rows], labels["label"], classes, labels.get("true_label"))

    return part(np.flatnonzero(in_train)), None if in_train.all() else part(np.flatnonzero(~in_train))


def _metadata(root: Path) -> list[tuple[Path, str]]:
    """The tables of an imagefolder and the folders that their paths start from."""
    for folders in (("",), SPLITS):
        paths = [(root / folder / f"metadata{suffix}", folder) for folder in folders for suffix in (".csv", ".parquet")]
        found = [(path, folder) for path, folder in paths if path.is_file()]
        if found:
            return found
    raise BadInput(f"{root}: holds no metadata.csv, nor does {root / 'train'}; name a table, or use data.source=folder")


class _Table:
    """The rows of all tables, one after the other: `files` [rows] str, `split` [rows] str, and labels as text, each by
    its distinct values and the number of each row's in these."""

    def __init__(self, tables: list[tuple[Path, str]]):
        self.tables, self.starts, parts = [path for path, _ in tables], [0], []
        for path, folder in tables:
            optional = ("true_label",) if folder else ("true_label", "split")
            part = read_table(f"data.root {path}", path, required=("file_name", "label"), optional=optional)
            if folder:
                below = compute.binary_join_element_wise(folder, part["file_name"], "/")
                part = part.set_column(0, "file_name", below).append_column("split", pa.array([folder] * len(part)))
            parts.append(part)
            self.starts.append(self.starts[-1] + len(part))
        if len({tuple(part.column_names) for part in parts}) > 1:
            raise BadInput(f"{self.tables[0]} and {self.tables[-1]}: only one has a column true_label; give it to both")
        table = pa.concat_tables(parts)
        self.files = table["file_name"].to_numpy()
        self.odd_paths = (
            holds(table["file_name"], "..", "\0") or compute.any(compute.starts_with(table["file_name"], "/")).as_py()
        )
        self.labels = {name: _coded(table[name]) for name in ("label", "true_label") if name in table.column_names}
        self.split = self._splits(*_coded(table["split"])) if "split" in table.column_names else self._split_by_folder()

    def place(self, row: int) -> str:
        table = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.tables[table]}: row {row_number(self.tables[table], row - self.starts[table])}"

    def _splits(self, values: np.ndarray, codes: np.ndarray) -> np.ndarray:
        strange = np.flatnonzero(~np.isin(values, SPLITS)[codes])
        if len(strange):
            raise BadInput(
                f"{self.place(strange[0])} has split {values[codes[strange[0]]]!r}; it must be train or test"
            )
        return values[codes]

    def _split_by_folder(self) -> np.ndarray:
        """What the first folder of each path says, where it says so of all; else everything is for training."""
        first = [os.path.normpath(name).split("/")[0] for name in self.files.tolist()]
        by_folder = self.tables[0].stem == "metadata" and set(first) <= set(SPLITS)
        return np.array(first if by_folder else ["train"] * len(first), dtype=object)

    def numbers(self, name: str, rows: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
        """Labels [rows] int64; each must be the label of a training row."""
        values, codes = self.labels[name]
        of_class = {name: label for label, name in enumerate(classes)}
        found = np.array([of_class.get(text, -1) for text in values.tolist()], dtype=np.int64)[codes[rows]]
        unknown = np.flatnonzero(found < 0)
        if not len(unknown):
            return found
        row = rows[unknown[0]]
        text = values[codes[row]]
        if is_number(text) != all(map(is_number, classes)):
            kinds = ("a number", "names") if is_number(text) else ("a name", "numbers")
            raise BadInput(
                f"{self.place(row)}: {name} {text!r} is {kinds[0]}, but the labels of the training rows are {kinds[1]};"
                f" use one of the two"
            )
        raise BadInput(f"{self.place(row)}: {name} {text!r} is the label of no training row; add one, or remove it")


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values [V] str, and the number of each row's in these [rows] int64."""
    coded = column.combine_chunks().dictionary_encode()
    return coded.dictionary.to_numpy(zero_copy_only=False), coded.indices.to_numpy().astype(np.int64)
