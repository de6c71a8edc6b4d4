"""What a training would see of a data set, before it starts: `flywheel-fast data check` and `data noise`."""

import csv
import hashlib
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data import noise, noise_files, sources
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.noise import NoiseConfig
from flywheel_fast.errors import BadInput

DECODED = {"JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"}  # what the image pipeline takes
MOST_CLASSES = 30  # in a table
TILE, CAPTION, SHOWN = 112, 16, 64  # pixels, pixels, pictures of the contact sheet
CHUNK = 64  # images that a thread reads at a time


class Look(NamedTuple):
    """At one file."""

    problem: str  # empty: it can be trained on
    digest: int = 0  # of the content, 64 bits
    size: tuple[int, int] = (0, 0)
    format: str = ""
    tile: Image.Image | None = None


class Rows(NamedTuple):
    """Both splits, the training split first."""

    root: Path
    files: np.ndarray  # [N] str
    labels: np.ndarray  # [N] int64
    split: np.ndarray  # [N] str
    classes: tuple[str, ...]

    def cells(self, row: int) -> tuple[str, str, str]:
        return str(self.files[row]), str(self.split[row]), self.classes[self.labels[row]]


def check(config: sources.DataConfig, out: Path, console: Console) -> None:
    """Says what is in the data set, reads every image once, and writes bad_files.csv, duplicates.csv, contact.png and
    manifest.parquet into `out`. Noise and data.skip are not applied. Raises BadInput for a layout that is none."""
    train, test, _ = sources.load(replace(config, noise=NoiseConfig(), skip=None), present=False)
    _say_classes(train, test, console)
    rows = Rows(
        train.root,
        np.concatenate([train.files, test.files]),
        np.concatenate([train.labels, test.labels]),
        np.repeat(["train", "test"], [len(train), len(test)]),
        train.classes,
    )
    gone = np.concatenate([sources.absent(train, config), len(train) + sources.absent(test, config)])
    looks = _look(rows, set(gone.tolist()), config.threads, console)
    bad = [(row, look.problem) for row, look in enumerate(looks) if look.problem]
    groups = _duplicates(looks)
    _say_files(rows, looks, len(gone), bad, groups, console)

    _write_csv(out / "bad_files.csv", ("file_name", "split", "label", "problem"), ((*rows.cells(r), p) for r, p in bad))
    names = ("file_name", "split", "label")
    pairs = ((*rows.cells(row), *rows.cells(group[0])) for group in groups for row in group[1:])
    _write_csv(out / "duplicates.csv", (*names, *(f"same_as_{name}" for name in names)), pairs)
    write_atomic(out / "contact.png", _contact_sheet(rows, looks))
    write_atomic(out / "manifest.parquet", to_parquet(train, test))
    console.print(f"\nwritten to {out}: bad_files.csv, duplicates.csv, contact.png, manifest.parquet", markup=False)
    if bad:
        console.print(f"leave the bad files out of a training by data.skip={out / 'bad_files.csv'}", markup=False)


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


# -- looking at every file ---------------------------------------------------------------------------------------------


def _look(rows: Rows, gone: set[int], threads: int, console: Console) -> list[Look]:
    shown = set(_spread(rows.labels[rows.split == "train"]))

    def look_at(chunk: range) -> list[Look]:
        return [Look("is missing") if row in gone else look(rows.root / rows.files[row], row in shown) for row in chunk]

    chunks = [range(at, min(at + CHUNK, len(rows.files))) for at in range(0, len(rows.files), CHUNK)]
    columns = (TextColumn("reading images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    looks: list[Look] = []
    with ThreadPoolExecutor(threads) as pool, Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(rows.files))
        try:
            for found in pool.map(look_at, chunks):
                looks += found
                bar.advance(task, len(found))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return looks


def look(path: Path, tile: bool = False) -> Look:
    """Decodes the image, as a training will; in the format's own small size where it has one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Look(f"cannot be read ({error.strerror})")
    if not content:
        return Look("is empty")
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
    try:
        with Image.open(io.BytesIO(content)) as image:
            size, kind = image.size, image.format
            if kind not in DECODED:
                return Look(f"is a {kind}, which cannot be trained on; convert it to JPEG or PNG", digest)
            image.draft("RGB", (TILE, TILE))
            image.load()
            return Look("", digest, size, kind, _tile(image) if tile else None)
    except Exception as error:  # every format has its own
        return Look(f"cannot be decoded ({str(error).split(' <_io.BytesIO')[0]})", digest)


def _tile(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    return ImageOps.pad(image.convert("RGB"), (TILE, TILE), color="#F3F4F6")


def _spread(labels: np.ndarray) -> list[int]:
    """Rows of up to 64 pictures, the classes by turns."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    turn = np.arange(len(labels)) - first  # of each in its class
    return order[np.lexsort((labels[order], turn))][:SHOWN].tolist()


def _duplicates(looks: list[Look]) -> list[list[int]]:
    """Rows with the same content, in groups of two and more."""
    digests = np.array([look.digest for look in looks], dtype=np.uint64)
    order = np.argsort(digests, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1 and digests[group[0]])


def _contact_sheet(rows: Rows, looks: list[Look]) -> memoryview:
    from matplotlib import font_manager

    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 10)
    tiles = [(look.tile, rows.classes[rows.labels[row]]) for row, look in enumerate(looks) if look.tile]
    tiles.sort(key=lambda tile: rows.classes.index(tile[1]))
    across = 8
    sheet = Image.new("RGB", (across * TILE, -(-max(len(tiles), 1) // across) * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tile, name) in enumerate(tiles):
        x, y = number % across * TILE, number // across * (TILE + CAPTION)
        sheet.paste(tile, (x, y))
        name = " ".join(name.split())
        draw.text((x + 2, y + TILE + 1), name if len(name) < 18 else f"{name[:16]}…", fill="#1F2328", font=font)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getbuffer()


def _write_csv(path: Path, header: tuple[str, ...], rows) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


# -- saying it ---------------------------------------------------------------------------------------------------------


def _say_classes(train: Manifest, test: Manifest, console: Console) -> None:
    counts = np.stack([np.bincount(part.labels, minlength=len(train.classes)) for part in (train, test)], axis=1)
    order = np.argsort(-counts[:, 0], kind="stable")
    names = [train.classes[label] for label in order]
    table = Table(title=f"\n{train.root}", title_justify="left", box=None, pad_edge=False)
    for name, side in (("class", "left"), ("train", "right"), ("test", "right")):
        table.add_column(name, justify=side)
    table.add_row(f"all {len(names)}", f"{len(train):,}", f"{len(test):,}", style="bold")
    half = MOST_CLASSES // 2
    few = len(names) <= MOST_CLASSES
    for label in order if few else [*order[:half], None, *order[-half:]]:
        cells = ("...", "", "") if label is None else (train.classes[label], *(f"{count:,}" for count in counts[label]))
        table.add_row(*map(Text, cells))
    console.print(table)
    most, least = counts[order[0], 0], counts[order[-1], 0]
    ratio = f"{most / least:.1f} times as many as" if least else "but none"
    console.print(f"imbalance: {names[0]!r} has {ratio} {names[-1]!r}", markup=False)
    untested = [train.classes[label] for label in np.flatnonzero(counts[:, 1] == 0)]
    if untested:
        more = ", ..." if len(untested) > 3 else ""
        count = f"{len(untested)} of {len(names)} classes"
        console.print(f"warning: {count} have no test images: {', '.join(untested[:3])}{more}", markup=False)
    console.print("first rows:")
    for name, part in (("train", train), ("test", test)):
        for row in range(min(3, len(part))):
            console.print(f"  {name}  {part.files[row]}  {part.classes[part.labels[row]]}", markup=False)


def _say_files(rows: Rows, looks: list[Look], gone: int, bad: list, groups: list[list[int]], console: Console) -> None:
    sizes = np.array([look.size for look in looks if not look.problem], dtype=np.int64).reshape(-1, 2)
    said = []
    if len(sizes):
        by_area = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
        small, middle, large = (by_area[at] for at in (0, len(by_area) // 2, -1))
        text = ", ".join(f"{w} x {h}" for w, h in (small, middle, large))
        said.append(("smallest, median, largest", text))
        formats = Counter(look.format for look in looks if not look.problem)
        said.append(("formats", ", ".join(f"{name} {count:,}" for name, count in formats.most_common())))
    said += [("missing", f"{gone:,}"), ("unreadable", f"{len(bad) - gone:,}")]
    for row, problem in bad[:3]:
        said.append(("  for example", f"{rows.files[row]} {problem}"))
    again = {
        split: sum(len(group) - 1 for group in groups if _splits(rows, group) == {split}) for split in ("train", "test")
    }
    across = [group for group in groups if len(_splits(rows, group)) == 2]
    leaked = sum(int(np.sum(rows.split[group] == "test")) for group in across)
    apart = sum(len(np.unique(rows.labels[group])) > 1 for group in groups)
    said.append(("same content again", f"{again['train']:,} in train, {again['test']:,} in test"))
    said.append(("test images in train too", f"{leaked:,}"))
    if apart:
        said.append(("  same content, unlike labels", f"{apart:,} groups"))
    table = Table(title="\nfiles", title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, text in said:
        table.add_row(Text(name), Text(text))
    console.print(table)


def _splits(rows: Rows, group: list[int]) -> set[str]:
    return set(rows.split[group].tolist())


# -- noise -------------------------------------------------------------------------------------------------------------


def say_noise(config: sources.DataConfig, write: Path | None, console: Console) -> None:
    """The realised noise on the whole training split; `write`: a file for its labels."""
    whole = replace(config, train_size=None, test_size=None, imbalance=1.0, skip=None)
    train = sources.load(whole, present=False).train
    if train.true_labels is None:
        raise BadInput(
            "data.noise.kind=none and no true labels: nothing to compare; give data.noise.kind=symmetric ..."
        )
    noisy, true, classes = train.labels, train.true_labels, train.classes
    if write:
        noise_files.write(write, noisy, true)
    c = len(classes)
    matrix = np.bincount(true * c + noisy, minlength=c * c).reshape(c, c)
    digest = noise.digest(noisy)[:16]
    console.print(f"{np.mean(noisy != true):.2%} of {len(noisy):,} labels are wrong, sha256 {digest}", markup=False)
    if c <= MOST_CLASSES:
        table = Table(title="\nrows: true class, columns: label, %", title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for label in range(c):
            table.add_column(str(label), justify="right")
        for label, counts in enumerate(matrix):
            share = counts * 100 / max(counts.sum(), 1)
            table.add_row(Text(f"{label} {classes[label]}"), *(f"{one:.1f}" if one else "." for one in share))
    else:
        table = Table(title="\nmost frequent", title_justify="left", show_header=False, box=None, pad_edge=False)
        wrong = matrix * ~np.eye(c, dtype=bool)
        for place in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CLASSES]:
            y, j = divmod(int(place), c)
            if wrong[y, j]:
                share = f"{wrong[y, j] / matrix[y].sum():.1%}"
                table.add_row(Text(f"{classes[y]} -> {classes[j]}"), f"{wrong[y, j]:,}", share)
    console.print(table)
    if write:
        console.print(f"written to {write}; data.noise.kind=file data.noise.file={write} reads it back", markup=False)
