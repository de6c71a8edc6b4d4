"""Tables: a CSV or Parquet file with a row an image, and Hugging Face's imagefolder, which has one in each split."""

import os
from pathlib import Path

import numpy as np

from flywheel_fast.data.manifest import Manifest, leads_out, read_columns, row_number
from flywheel_fast.data.sources.folders import TEST_FOLDERS, is_number, natural
from flywheel_fast.errors import BadInput

SPLITS = ("train", *TEST_FOLDERS)


def read(path: Path) -> tuple[Manifest, Manifest | None]:
    """A table with columns file_name (or image_path), label, and if there are any split and true_label; or a folder
    with metadata.csv or .parquet in it or in its train, test and validation folders. Paths are relative to it."""
    root = path if path.is_dir() else path.parent
    table = _Table(_metadata(path) if path.is_dir() else [(path, "")])
    in_train = table.split == "train"
    if not in_train.any():
        raise BadInput(f"{path}: holds no training rows")
    for row, name in enumerate(table.files.tolist()):
        if leads_out(name):
            raise BadInput(f"{table.place(row)}: {name!r} lies outside {root}; put the table above its images")
    classes = tuple(natural(np.unique(table.label[in_train]).tolist()))

    def part(rows: np.ndarray) -> Manifest:
        true = None if table.true is None else table.numbers("true_label", table.true, rows, classes)
        return Manifest(root, table.files[rows], table.numbers("label", table.label, rows, classes), classes, true)

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
    """The rows of all tables, one after the other, each column [rows] str."""

    def __init__(self, tables: list[tuple[Path, str]]):
        self.tables, self.starts, parts = [path for path, _ in tables], [0], []
        for path, folder in tables:
            optional = ("split", "true_label")
            columns = read_columns(f"data.root {path}", path, required=("file_name", "label"), optional=optional)
            if folder:
                columns["file_name"] = np.array(
                    [f"{folder}/{name}" for name in columns["file_name"].tolist()], dtype=str
                )
                columns["split"] = np.full(len(columns["label"]), folder)
            parts.append(columns)
            self.starts.append(self.starts[-1] + len(columns["label"]))
        if len({"true_label" in part for part in parts}) > 1:
            raise BadInput(f"{self.tables[0]} and {self.tables[-1]}: only one has a column true_label; give it to both")

        def column(name: str) -> np.ndarray:
            return np.concatenate([part[name] for part in parts])

        self.files, self.label = column("file_name"), column("label")
        self.split = column("split") if "split" in parts[0] else self._split_by_folder()
        self.true = column("true_label") if "true_label" in parts[0] else None
        strange = np.flatnonzero(~np.isin(self.split, SPLITS))
        if len(strange):
            raise BadInput(
                f"{self.place(strange[0])} has split {str(self.split[strange[0]])!r}; it must be train or test"
            )

    def place(self, row: int) -> str:
        table = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.tables[table]}: row {row_number(self.tables[table], row - self.starts[table])}"

    def _split_by_folder(self) -> np.ndarray:
        """What the first folder of each path says, where it says so of all; else everything is for training."""
        first = np.array([os.path.normpath(name).split("/")[0] for name in self.files.tolist()], dtype=str)
        by_folder = self.tables[0].stem == "metadata" and len(first) and np.isin(first, SPLITS).all()
        return first if by_folder else np.full(len(self.files), "train")

    def numbers(self, name: str, column: np.ndarray, rows: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
        """Labels [rows] int64; each must be the label of a training row."""
        of_class = {name: label for label, name in enumerate(classes)}
        texts = column[rows].tolist()
        for row, text in zip(rows.tolist(), texts, strict=True):
            if text in of_class:
                continue
            if is_number(text) != all(map(is_number, classes)):
                kinds = ("a number", "names") if is_number(text) else ("a name", "numbers")
                raise BadInput(
                    f"{self.place(row)}: {name} {text!r} is {kinds[0]}, but the labels of the training rows are "
                    f"{kinds[1]}; use one of the two"
                )
            raise BadInput(f"{self.place(row)}: {name} {text!r} is the label of no training row; add one, or remove it")
        return np.array([of_class[text] for text in texts], dtype=np.int64)
