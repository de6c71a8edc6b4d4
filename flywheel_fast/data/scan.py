"""Files that cannot be trained on are found before the training, which would stop at the first of them in hour nine.

Only DALI knows what DALI refuses: other decoders pass a PNG that lacks its last byte, and refuse JPEGs that it takes.
So every file is decoded once; those that were well are remembered by name, size and time of change.
"""

import csv
import hashlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.sources import cache
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput, Failure

CHUNK = 1000  # files that a thread asks for at a time
# How the lines start that libraries write of a file that they cannot decode
COMPLAINT = re.compile(rb"(\x1b\[[\d;]*m)*\[ *(ERROR|WARN)|TIFF|libpng|Corrupt JPEG|Unsupported marker|\s*$")


class BadFile(NamedTuple):
    file_name: str
    split: str
    label: str
    problem: str

    @classmethod
    def of(cls, manifest: Manifest, row: int, split: str, problem: str) -> "BadFile":
        return cls(str(manifest.files[row]), split, manifest.classes[manifest.labels[row]], problem)


def broken(
    manifest: Manifest, split: str, device: torch.device | str, threads: int, present: np.ndarray | None = None
) -> dict[int, BadFile]:
    """The files that DALI refuses on `device`, by row; `present` [n] int64: of these rows only."""
    rows = np.arange(len(manifest)) if present is None else present
    marks = _marks(manifest, rows, threads)
    loader = Loader(manifest, ViewsConfig(), 1, 0, device, threads)
    path = _remembered_in(manifest.root, loader)
    known = _recall(path)
    new = ~np.isin(marks, known)
    mark_of = dict(zip(rows[new].tolist(), marks[new].tolist(), strict=True))
    found, well = {}, []
    looks = track(
        loader.looked_at(rows[new]),
        f"reading the {split} images once",
        total=len(mark_of),
        transient=True,
        disable=len(mark_of) < cache.WORTH_A_BAR,
    )
    try:
        with _decoders_hushed():
            for row, problem in looks:
                if problem:
                    found[row] = BadFile.of(manifest, row, split, problem)
                else:
                    well.append(mark_of[row])
    finally:  # what was looked at before an interruption is not looked at again
        if well:
            _remember(path, np.union1d(known, np.array(well, dtype=np.uint64)))
    return found


def without_broken(
    manifest: Manifest, split: str, device: torch.device | str, threads: int
) -> tuple[Manifest, list[BadFile]]:
    """What DALI takes, and what was left out. Raises BadInput where a class to train on, or a split, is left empty."""
    bad = broken(manifest, split, device, threads)
    if not bad:
        return manifest, []
    kept = np.setdiff1d(np.arange(len(manifest)), list(bad))
    lost = np.setdiff1d(manifest.labels, manifest.labels[kept])
    if len(lost) and (split == "train" or not len(kept)):
        first = next(one for row, one in bad.items() if manifest.labels[row] == lost[0])
        raise BadInput(
            f"{manifest.root}: none of the {split} images of class {first.label!r} can be read; "
            f"{first.file_name} {first.problem}"
        )
    return manifest.subset(kept), list(bad.values())


def write(path: Path, files: list[BadFile]) -> None:
    """A table that `data.skip` reads. Raises Failure."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(BadFile._fields)
    writer.writerows(files)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


@contextmanager
def _decoders_hushed() -> Iterator[None]:
    """What DALI's decoders write of broken files to the error stream, without their names, is dropped; what else is
    written there meanwhile comes at the end."""
    if sys.stderr is None:  # it is closed
        yield
        return
    sys.stderr.flush()
    stream = os.dup(2)  # of the process: these libraries know nothing of sys.stderr
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stream, 2)
            os.close(stream)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not COMPLAINT.match(line)))


# -- what is remembered ------------------------------------------------------------------------------------------------


def _marks(manifest: Manifest, rows: np.ndarray, threads: int) -> np.ndarray:  # [n] uint64
    """Of each file by name, size and time of change: equal where it is as it was."""

    def of_chunk(chunk: np.ndarray) -> list[int]:
        marks = []
        for name in chunk.tolist():
            try:
                stat = (manifest.root / name).stat()
                text = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}"
            except OSError:  # the look will tell
                text = name
            digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            marks.append(int.from_bytes(digest))
        return marks

    files = manifest.files[rows]
    with ThreadPoolExecutor(threads) as pool:
        chunks = pool.map(of_chunk, [files[at : at + CHUNK] for at in range(0, len(files), CHUNK)])
        return np.array([mark for chunk in chunks for mark in chunk], dtype=np.uint64)


def _remembered_in(root: Path, loader: Loader) -> Path:
    """Another decoder works on a GPU, and without DALI."""
    reader = loader.device.type if loader.reader == "DALI" else loader.reader
    name = hashlib.blake2b(str(root.resolve()).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return cache.home() / "scans" / f"{name}-{reader}.npy"


def _recall(path: Path) -> np.ndarray:  # [files] uint64
    try:
        return np.load(path, allow_pickle=False).astype(np.uint64)
    except (OSError, ValueError, EOFError):  # not there yet, or damaged
        return np.empty(0, dtype=np.uint64)


def _remember(path: Path, marks: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, marks)
    try:
        write_atomic(path, content.getvalue())
    except (OSError, Failure):  # without it, the next run looks again
        pass
